"""The files of pictures: whole files and members of shards, and what is known of them without reading them again."""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sdjax.data.entries import SETTLED, Missing, entries
from sdjax.data.images import Size, read_size
from sdjax.errors import DataError


class Member(NamedTuple):
    """A picture in a shard. Like a path, it has a name for messages and can be opened."""

    name: str
    digest: str
    """The sha256 of the picture."""
    size: Size
    """When turned upright; 0x0 if it cannot be read."""
    read: Callable[[], bytes]

    def open(self, mode: str = "rb") -> BinaryIO:
        """The picture as a file in memory."""
        return io.BytesIO(self.read())

    def __str__(self) -> str:
        return self.name


File = Path | Member


def loaded(file: File) -> File:
    """The file; a member of a shard with its contents read. Raises DataError if the shard cannot be read."""
    if isinstance(file, Path):
        return file
    content = file.read()
    return file._replace(read=lambda: content)


class Found(NamedTuple):
    """A picture as a shard is read."""

    key: str
    caption: str
    """Empty if there is none."""
    place: tuple[int, int]
    """Where the reader of the shard finds the picture again."""
    content: bytes


MANY = 1000
"""From this number of files on, their digests and sizes are kept for the next start."""

_AT_ONCE = 4096
"""Files of an entry that keeps them."""

_known: dict[bytes, bytes] = {}
"""Digest of a file's absolute path and state -> sha256 of its contents, perhaps followed by `_size_bytes`.

Bytes, because an object for each of many files would need several times the memory.
"""


def file_digest(file: File) -> str:
    """The sha256 of a file's contents; the empty string for a file that cannot be read, which its decoder will report.

    A process reads a file once, and again after the file's inode, size or times have changed. A file changed less than
    SETTLED seconds ago is always read. Threads may call this at the same time; at worst, two of them read the same
    file.
    """
    if isinstance(file, Member):
        return file.digest
    try:
        state, settled = _state(file)
        known = _known.get(state)
        if known is None:
            with file.open("rb") as opened:
                known = hashlib.file_digest(opened, "sha256").digest()
            if settled:
                _known[state] = known
        return known[:32].hex()
    except OSError:
        return ""


def picture_size(file: File) -> Size:
    """The size of a picture when turned upright. Raises DataError for one that cannot be read."""
    if isinstance(file, Member):
        known = file.size
    else:
        try:
            known = _as_size(_known.get(_state(file)[0], b"")[32:])
        except OSError:
            known = NO_SIZE
    return known if known != NO_SIZE else read_size(file)


NO_SIZE = Size(0, 0)
"""Stands for the size of a picture that cannot be read."""


def size_or_none(file: File) -> Size:
    """The size of a picture from its header, or NO_SIZE."""
    try:
        return read_size(file)
    except DataError:
        return NO_SIZE


def learn(files: Sequence[Path], keep: Path) -> None:
    """Reads the digests and sizes of many files, or takes those of an earlier start from the entries in `keep`.

    Processes share the files out. A file that changed since, or within SETTLED seconds, is read when it is asked for.
    """
    states = [_state_or_none(file) for file in files]

    def entry(begin: int, members: Sequence[tuple[bytes, bool]]) -> Missing:
        key = {"kind": "files", "states": hashlib.sha256(b"".join(state for state, _ in members)).hexdigest()}
        return Missing(key, rows(begin, members), {})

    def rows(begin: int, members: Sequence[tuple[bytes, bool]]) -> Iterator[Mapping[str, UInt8[np.ndarray, "N 40"]]]:
        facts = np.zeros((len(members), 40), np.uint8)
        for i, (state, settled) in enumerate(members):
            file = files[begin + i]
            if settled and (digest := file_digest(file)):
                fact = bytes.fromhex(digest) + _size_bytes(size_or_none(file))
                if _state_or_none(file)[0] == state:
                    facts[i] = np.frombuffer(fact, np.uint8)
        yield {"facts": facts}

    for begin, found in entries(keep, states, entry, most=_AT_ONCE):
        for (state, _), known in zip(states[begin:], found.arrays["facts"].open(), strict=False):
            if known.any():
                _known[state] = known.tobytes()


def _state(path: Path) -> tuple[bytes, bool]:
    """A digest of a file's path, inode, size and times, and whether the times are old enough to tell."""
    path = path.absolute()
    stat = path.stat()
    content = f"{path} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    digest = hashlib.blake2b(content.encode(errors="surrogateescape"), digest_size=16).digest()
    return digest, time.time() - stat.st_mtime > SETTLED


def _state_or_none(path: Path) -> tuple[bytes, bool]:
    try:
        return _state(path)
    except OSError:
        return b"", False


def _size_bytes(size: Size) -> bytes:
    return np.array(size, "<i4").tobytes()


def _as_size(content: bytes) -> Size:
    return Size(*np.frombuffer(content, "<i4").tolist()) if content else NO_SIZE
