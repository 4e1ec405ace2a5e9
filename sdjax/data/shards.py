"""Reads shards, files that hold many pictures: parquet files and tars.

A shard is read once. Where its pictures lie, their captions, digests and sizes are kept in a cache entry, which belongs
to the name, size and time of the file. So a shard that has another size or time is read again, and a start costs a
look at each shard.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Int32, Int64, Shaped, UInt8

from sdjax.data.entries import SETTLED, Missing, Rows, entries
from sdjax.data.files import Found, Member, size_or_none
from sdjax.data.images import Size
from sdjax.data.parquet import ParquetReader
from sdjax.data.strings import Strings
from sdjax.data.tar import TarReader
from sdjax.errors import DataError
from sdjax.runtime import processes

FORMAT = 1
"""Version of the entries of shards. Raise it whenever the readers list another thing."""

_AT_ONCE = 1024
"""Pictures that are listed at a time."""


class Shard(NamedTuple):
    """A file of many pictures."""

    path: Path
    name: str
    """Path relative to the data folder, with forward slashes."""


class Columns(NamedTuple):
    """What is read of each record of a shard. An empty name stands for the usual ones."""

    image: str = ""
    """Column of a parquet file that holds the pictures."""
    caption: str = ""
    """Column of a parquet file, or key of a .json file in a tar, that holds the captions."""


class Reader(Protocol):
    """Reads a shard. Raises DataError for a damaged one."""

    def pictures(self) -> Iterator[Found]:
        """Reads all pictures, from the first to the last."""
        ...

    def read(self, place: tuple[int, int]) -> bytes:
        """Reads one picture. Neighbours are fast to read in order."""
        ...


READERS: dict[str, Callable[[Path, Columns], Reader]] = {
    ".parquet": lambda path, columns: ParquetReader(path, columns.image, columns.caption),
    ".tar": lambda path, columns: TarReader(path, columns.caption),
}
"""Suffix of a shard -> what reads it."""


def index(
    shards: Sequence[Shard], columns: Columns, keep: Path | None
) -> tuple[Strings, Strings, Callable[[int, str], Member]]:
    """The names and captions of all pictures, and what gives the file of each, by its number and name.

    Pictures are in the order of the shards. Processes share out the shards that have not been read before.
    keep: the folder of the cache entries. None: all shards are read. Raises DataError for a shard that cannot be read.
    """
    states = [_state(shard) for shard in shards]

    def entry(begin: int, _: Sequence[Shard]) -> Missing:
        shard = shards[begin]
        key = {"kind": "shard", "version": FORMAT, "name": shard.name, "state": states[begin], "columns": columns}
        return Missing(key, _rows(shard, columns), {})

    if keep is None or not all(_is_settled(state) for state in states):
        parts = [_joined(_rows(shard, columns)) for shard in shards]
        if keep is not None:
            processes.wait("cache")  # as `entries` does: another process may have looked a moment later
    else:
        parts = [
            {name: np.array(array.open()) for name, array in found.arrays.items()}  # closes the file
            for _, found in entries(keep, shards, entry, most=1)
        ]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    members = _Members(
        shards,
        states,
        columns,
        np.cumsum([len(part["places"]) for part in parts]),
        *(whole[name] for name in ("places", "digests", "sizes")),
    )
    names = Strings.from_arrays(whole["names"], whole["name_lengths"])
    return names, Strings.from_arrays(whole["captions"], whole["caption_lengths"]), members.file


class _Members:
    """The pictures of shards as arrays, about 50 bytes each."""

    def __init__(
        self,
        shards: Sequence[Shard],
        states: Sequence[list[int]],
        columns: Columns,
        ends: Int64[np.ndarray, " S"],
        places: Int64[np.ndarray, "N 2"],
        digests: UInt8[np.ndarray, "N 32"],
        sizes: Int32[np.ndarray, "N 2"],
    ) -> None:
        self._shards, self._states, self._ends = shards, states, ends
        self._places, self._digests, self._sizes = places, digests, sizes
        # Only the last shard is held open: pictures are read in order.
        self._reader = functools.lru_cache(maxsize=1)(functools.partial(self._open, columns))

    def file(self, row: int, name: str) -> Member:
        """The file of a picture."""
        size = Size(*self._sizes[row].tolist())
        return Member(name, self._digests[row].tobytes().hex(), size, functools.partial(self._read, row))

    def _read(self, row: int) -> bytes:
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._reader(shard).read((int(self._places[row, 0]), int(self._places[row, 1])))

    def _open(self, columns: Columns, shard: int) -> Reader:
        found = self._shards[shard]
        if _state(found) != self._states[shard]:
            raise DataError(f"{found.path} has changed since the run began")
        return READERS[found.path.suffix.lower()](found.path, columns)


def _state(shard: Shard) -> list[int]:
    try:
        stat = shard.path.stat()
    except OSError as e:
        raise DataError(f"{shard.path}: {e.strerror or e}") from None
    return [stat.st_size, stat.st_mtime_ns]


def _is_settled(state: Sequence[int]) -> bool:
    return time.time() - state[1] / 1e9 > SETTLED


def _joined(rows: Rows) -> Mapping[str, Shaped[np.ndarray, "..."]]:
    pieces = list(rows)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _rows(shard: Shard, columns: Columns) -> Iterator[Mapping[str, Shaped[np.ndarray, "..."]]]:
    """What is kept of the pictures of a shard, in pieces of at most _AT_ONCE. The last piece may be empty."""
    found: list[tuple[str, str, tuple[int, int], bytes, Size]] = []
    for picture in READERS[shard.path.suffix.lower()](shard.path, columns).pictures():
        name = f"{shard.name}/{picture.key}"
        digest = hashlib.sha256(picture.content).digest()
        member = Member(name, "", Size(0, 0), lambda content=picture.content: content)
        found.append((name, picture.caption, picture.place, digest, size_or_none(member)))
        if len(found) == _AT_ONCE:
            yield _arrays(found)
            found = []
    yield _arrays(found)


def _arrays(found: Sequence[tuple[Any, ...]]) -> dict[str, Shaped[np.ndarray, "..."]]:
    names, captions, places, digests, sizes = zip(*found, strict=True) if found else ((),) * 5
    arrays: dict[str, np.ndarray] = {}
    arrays["names"], arrays["name_lengths"] = Strings.of(names).arrays()
    arrays["captions"], arrays["caption_lengths"] = Strings.of(captions).arrays()
    arrays["places"] = np.array(places, np.int64).reshape(-1, 2)
    arrays["digests"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    arrays["sizes"] = np.array(sizes, np.int32).reshape(-1, 2)
    return arrays
