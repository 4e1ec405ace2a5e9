"""Arrays that lie in several files, read as one."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Stored(NamedTuple):
    """An array in a raw file."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def open(self) -> np.ndarray:
        """The array, memory-mapped. The file is open as long as the array lives."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.path, dtype=self.dtype, mode="r", shape=self.shape)

    def check(self) -> None:
        """Raises ValueError if the file does not have the size of the array."""
        expected = math.prod(self.shape) * self.dtype.itemsize
        if self.path.stat().st_size != expected:
            raise ValueError(f"{self.path.name} has {self.path.stat().st_size} bytes, expected {expected}")


class Joined:
    """Arrays joined along axis 0. Nothing is read until it is indexed, and no file stays open.

    The first index may be a number, a slice or an array of rows. Arrays that follow it are indexed together with it,
    as in NumPy.
    """

    def __init__(self, parts: Sequence[Stored]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *others = index if isinstance(index, tuple) else (index,)
        rows = np.arange(*first.indices(len(self))) if isinstance(first, slice) else np.asarray(first)
        if ((rows < -len(self)) | (rows >= len(self))).any():
            raise IndexError(f"{first} is out of range for {len(self)} rows")
        rows = rows % len(self)
        of = np.searchsorted(self._starts, np.atleast_1d(rows), side="right") - 1
        if not rows.ndim:
            return self._parts[of[0]].open()[(rows - self._starts[of[0]], *others)]
        found = None
        for number in np.unique(of) if len(rows) else [0]:
            here = of == number
            beside = [other[here] if isinstance(other, np.ndarray) else other for other in others]
            values = self._parts[number].open()[(rows[here] - self._starts[number], *beside)]
            found = np.empty((len(rows), *values.shape[1:]), values.dtype) if found is None else found
            found[here] = values
        assert found is not None
        return found


def joined(parts: Sequence[Stored]) -> Any:
    """Returns arrays as one; a single array as it is."""
    return parts[0].open() if len(parts) == 1 else Joined(parts)
