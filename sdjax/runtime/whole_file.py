"""Writes files and folders that are either complete or absent, whenever the process or the machine stops.

The new content is written beside its target under a hidden name, reaches the disk, and is then renamed.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a binary file, open for writing, that takes the place of `path` when the block ends.

    If the block raises, `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder that takes the place of `path` when the block ends. Makes the parents of `path`.

    If the block raises, `path` stays as it was. A process that was killed in the block leaves a hidden folder, which
    the next call removes. No system call replaces a folder that has content: for a moment between two renames there is
    no `path`, and the old folder is `.NAME.old` beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(leftover)
    new, old = (path.with_name(f".{path.name}.{suffix}") for suffix in (f"{os.getpid()}.partial", "old"))
    try:
        new.mkdir()
        yield new
        sync_below(new)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        new.rename(path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync_below(folder: Path) -> None:
    """Waits until a folder and everything below it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Waits until a file, or the names of the files in a folder, are on the disk and survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
