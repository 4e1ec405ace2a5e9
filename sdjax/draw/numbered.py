"""The names of pictures in their folder: `00012-0-red-heart.png` is number 12, of seed 0."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sdjax.errors import ConfigError

_LONGEST_NAME = 80  # bytes of a prompt kept in a file name; file systems allow 255 in all


def writable_folder(path: Path, flag: str = "--out") -> Path:
    """Makes a folder and returns it. Raises ConfigError, which names the flag, if it cannot be written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written to: {error.strerror or error}") from None
    return path


def safe_name(prompt: str) -> str:
    """Makes a prompt part of a file name: letters and digits of any script and hyphens, 1 to 80 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")
    return words.encode()[:_LONGEST_NAME].decode(errors="ignore").strip("-") or "picture"


@contextlib.contextmanager
def claimed(folder: Path, count: int) -> Iterator[int]:
    """Yields the first of `count` numbers for the names of pictures, which no other run gets during the block.

    They follow the highest number in the folder, so that no picture is overwritten. A hidden file holds the last one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ImportError):  # network drives may have no locks, and Windows has no fcntl
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        matches = (re.match(r"\.?(\d{5,})-.*\.png$", name) for name in os.listdir(folder))
        first = max((int(match[1]) + 1 for match in matches if match), default=0)
        claim = folder / f".{first + count - 1:05d}-claimed.png"
        claim.touch()
    finally:
        os.close(descriptor)
    try:
        yield first
    finally:
        claim.unlink(missing_ok=True)
