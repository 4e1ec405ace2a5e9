"""Arrays that are read from the disk, and computed, when they are written: so memory holds one of them at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """An array whose values `compute` gives each time that NumPy asks for them. Its shape and dtype are known before.

    It can be transposed, reshaped and indexed without being computed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    compute: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def T(self) -> "Deferred":
        """The array with its axes in reverse order."""
        return self._view(np.transpose)

    def transpose(self, *axes: int) -> "Deferred":
        """The array with its axes in another order."""
        return self._view(lambda array: array.transpose(*axes))

    def __getitem__(self, index: Any) -> "Deferred":
        return self._view(lambda array: array[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.compute(), self.dtype if dtype is None else dtype)

    def _view(self, change: Callable[[np.ndarray], np.ndarray]) -> "Deferred":
        shape = change(np.broadcast_to(np.zeros((), self.dtype), self.shape)).shape  # no memory: one zero, repeated
        return Deferred(shape, self.dtype, lambda: change(np.asarray(self)))
