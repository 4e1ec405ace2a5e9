"""Keeps computed arrays on disk, in entries that are complete, compared with their digests, and shared by processes.

An entry is a folder named after the digest of everything that the entry depends on. It holds one raw file per array
and index.json with the arrays' shapes and digests. An entry is written under another name and renamed when it is
complete, so a killed run leaves no partial entry. An entry that does not match its digests is computed again.

Processes that train together share out the entries of a set: each computes one run of neighbours.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from sdjax.data.joined import Stored
from sdjax.errors import DataError
from sdjax.runtime import processes

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the entries, part of what each depends on. Raise it whenever an entry's contents change their meaning."""

_FAULTS = (OSError, ValueError, KeyError, TypeError)
"""What `_open` raises for a damaged entry."""

SETTLED = 2.0
"""Seconds after which a file's times tell whether it has changed. A file system may give two changes in quick
succession the same time."""

Rows = Iterable[Mapping[str, Shaped[np.ndarray, " N *S"]]]
"""Pieces of arrays by name, which are joined along axis 0."""


class Missing(NamedTuple):
    """What an entry depends on, and how it is made if it is missing."""

    key: Mapping[str, Any]
    """Values for JSON. `kind` begins the name of the entry."""
    rows: Rows
    notes: dict[str, Any]
    """Iterating over the rows may change it."""


class Entry(NamedTuple):
    """An entry on disk."""

    arrays: dict[str, Stored]
    notes: dict[str, Any]


def entries(
    folder: Path, items: Sequence[Any], entry: Callable[[int, Sequence[Any]], Missing], *, most: int
) -> list[tuple[int, Entry]]:
    """The entries of all items, each with the number of its first item. Missing ones are computed.

    entry(begin, members): of the items from number `begin` on, at most `most` of them.
    """
    starts = range(0, max(1, len(items)), most)
    mine = processes.share(len(starts))

    def found(number: int) -> Entry:
        return _entry(folder, *entry(starts[number], items[starts[number] : starts[number] + most]))

    first = {number: found(number) for number in mine}
    processes.wait("cache")
    return [(start, first[n] if n in first else found(n)) for n, start in enumerate(starts)]


def _entry(folder: Path, key: Mapping[str, Any], rows: Rows, notes: dict[str, Any]) -> Entry:
    """The entry of `key`; see `Missing`. If there is no good one, it is written."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()
    place = folder / f"{key['kind']}-{digest[:16]}"
    if place.exists():
        try:
            return _open(place)
        except _FAULTS as e:
            log.warning("cache entry %s is damaged (%s) and is computed again", place, e)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    except OSError as e:
        raise DataError(
            f"cannot write the cache in {folder}: {e.strerror or e}; set data.cache to another folder"
        ) from e
    try:
        _write(temporary, rows, notes)
        return _publish(temporary, place)
    except OSError as e:
        raise DataError(f"cannot write the cache in {folder}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, place: Path) -> Entry:
    """Renames a complete entry to its place and opens it, or opens the good entry that another run has put there.

    An entry is never removed while it is good, since other runs may be reading it.
    """
    for _ in range(10):
        try:
            temporary.rename(place)
        except OSError:
            if not place.exists():
                raise
        try:
            return _open(place)
        except _FAULTS:
            aside = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
            with contextlib.suppress(FileNotFoundError):  # another run has moved it away
                place.rename(aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"cache entry {place} is damaged again and again; set data.cache to another folder")


def _write(place: Path, rows: Rows, notes: dict[str, Any]) -> None:
    """Writes each array's rows to a raw file, then index.json with shapes, number types, digests and notes."""
    index: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    for arrays in rows:
        os.utime(place)  # see `_sweep`
        for name, array in arrays.items():
            entry = index.setdefault(name, {"dtype": array.dtype.name, "shape": [0, *array.shape[1:]]})
            if entry["shape"][1:] != list(array.shape[1:]) or entry["dtype"] != array.dtype.name:
                row = f"{array.dtype}{list(array.shape[1:])}"
                raise DataError(f"{name}: {row} after {entry['dtype']}{entry['shape'][1:]}; rows must be alike")
            entry["shape"][0] += len(array)
            data = np.ascontiguousarray(array).tobytes()
            digests.setdefault(name, hashlib.sha256()).update(data)
            with (place / f"{name}.bin").open("ab") as file:
                file.write(data)
    for name, entry in index.items():
        entry["sha256"] = digests[name].hexdigest()
    (place / "index.json").write_text(json.dumps({"arrays": index, "notes": notes}), encoding="utf-8")


def _open(place: Path) -> Entry:
    """Opens an entry. Raises ValueError if a file does not match its digest.

    A file that matched it once is not read again while its inode, size and times stay as they were: to read all of a
    large cache at each start would take hours.
    """
    index = json.loads((place / "index.json").read_text(encoding="utf-8"))
    arrays, states, youngest = {}, {}, 0.0
    for name, entry in index["arrays"].items():
        arrays[name] = Stored(place / f"{name}.bin", np.dtype(entry["dtype"]), tuple(entry["shape"]))
        arrays[name].check()
        stat = arrays[name].path.stat()
        states[name] = [entry["sha256"], stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        youngest = max(youngest, stat.st_mtime)
    note = json.dumps(states)
    if _text(place / "checked.json") == note:
        return Entry(arrays, index["notes"])
    for name, array in arrays.items():
        with array.path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != index["arrays"][name]["sha256"]:
                raise ValueError(f"{array.path.name} does not match its digest")
    if time.time() - youngest > SETTLED:
        with contextlib.suppress(OSError):  # in a folder that cannot be written, files are read each time
            temporary = place / f".checked-{os.getpid()}"
            temporary.write_text(note, encoding="utf-8")
            temporary.rename(place / "checked.json")
    return Entry(arrays, index["notes"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _sweep(folder: Path) -> None:
    """Removes the temporary folders of killed runs. Those changed within a day may belong to a run."""
    for path in folder.glob(".new-*"):
        with contextlib.suppress(FileNotFoundError):  # another run sweeps too
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
