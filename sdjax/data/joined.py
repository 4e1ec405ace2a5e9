"""Arrays that lie in several files, read as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped


class Joined:
    """Arrays joined along axis 0. Nothing is copied until it is indexed.

    The first index may be a number, a slice or an array of rows. Arrays that follow it are indexed together with it,
    as in NumPy.
    """

    def __init__(self, parts: Sequence[Shaped[np.ndarray, "N ..."]]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = np.arange(len(self))[first]
        of = np.searchsorted(self._starts, np.atleast_1d(rows), side="right") - 1
        if not rows.ndim:
            return self._parts[of[0]][(rows - self._starts[of[0]], *others)]
        found = None
        for number in np.unique(of) if len(rows) else [0]:
            here = of == number
            beside = [other[here] if isinstance(other, np.ndarray) else other for other in others]
            values = self._parts[number][(rows[here] - self._starts[number], *beside)]
            found = np.empty((len(rows), *values.shape[1:]), values.dtype) if found is None else found
            found[here] = values
        assert found is not None
        return found


def joined(parts: Sequence[Shaped[np.ndarray, "N ..."]]) -> Any:
    """Returns arrays as one; a single array as it is."""
    return parts[0] if len(parts) == 1 else Joined(parts)
