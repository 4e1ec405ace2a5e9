"""Many texts in one block of bytes: a million of them take their characters and 16 bytes each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from jaxtyping import Int64, UInt8

_CODING: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files may be any bytes


@dataclass(frozen=True, eq=False)
class Strings(Sequence[str]):
    """A sequence of texts. A part of it shares the block."""

    block: bytes
    starts: Int64[np.ndarray, " N"]
    ends: Int64[np.ndarray, " N"]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        """The texts, which are read one by one."""
        block, ends = bytearray(), [0]
        for text in texts:
            block += text.encode(**_CODING)
            ends.append(len(block))
        bounds = np.array(ends, np.int64)
        return cls(bytes(block), bounds[:-1], bounds[1:])

    @classmethod
    def from_arrays(cls, block: UInt8[np.ndarray, " M"], lengths: Int64[np.ndarray, " N"]) -> "Strings":
        """The texts that lie in `block` one after the other, each of so many bytes."""
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(np.asarray(block).tobytes(), ends - lengths, ends)

    @classmethod
    def joined(cls, parts: Sequence["Strings"]) -> "Strings":
        """The texts of several parts of the same texts."""
        return cls(
            parts[0].block,
            np.concatenate([part.starts for part in parts]),
            np.concatenate([part.ends for part in parts]),
        )

    def filled(self, text: str) -> "Strings":
        """The texts, with this one in place of each empty one."""
        content = text.encode(**_CODING)
        empty, start = self.starts == self.ends, len(self.block)
        starts = np.where(empty, start, self.starts)
        return Strings(self.block + content, starts, np.where(empty, start + len(content), self.ends))

    def arrays(self) -> tuple[UInt8[np.ndarray, " M"], Int64[np.ndarray, " N"]]:
        """What `from_arrays` takes. Only for texts that are not a part of others."""
        return np.frombuffer(self.block, np.uint8), self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: Any) -> "Strings": ...
    def __getitem__(self, index: Any) -> "str | Strings":
        start, end = self.starts[index], self.ends[index]
        if isinstance(start, np.ndarray):
            return Strings(self.block, start, end)
        return self.block[start:end].decode(**_CODING)
