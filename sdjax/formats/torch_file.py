"""Reads PyTorch's files (.bin, .pt, .ckpt) without torch and without running anything in them.

`torch_pickle` runs the pickle in a file. Tensors are read-only views into the mapped file.
"""

import io
import mmap
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.torch_pickle import MAX_PICKLE, FindStorage, Storage, run_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_torch(path: str | os.PathLike) -> Any:
    """The object that torch.save wrote, with NumPy arrays for tensors.

    Raises DataError for a file that is damaged or holds anything but plain containers and tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise DataError(f"{path}: the file is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if mapped[:4] == b"PK\x03\x04":
            return _read_zip(path, mapped)
        if mapped[:1] == b"\x80":
            return _read_legacy(mapped)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    raise DataError(f"{path}: not a PyTorch file (neither a zip nor a pickle)")


def read_state_dict(path: str | os.PathLike, entries: Sequence[str] = ("state_dict",)) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, from the first of these entries that it has. Other entries are left out."""
    content = read_torch(path)
    if isinstance(content, Mapping):
        content = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, np.ndarray)
    }
    if not tensors:
        raise DataError(f"{path}: holds no tensors at its top level or under {', '.join(map(repr, entries))}")
    return tensors


def _read_zip(path: Path, mapped: mmap.mmap) -> Any:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises many kinds for a damaged file
        raise DataError(f"broken or truncated zip file: {error}") from None
    if len({entry.filename for entry in entries}) != len(entries):
        raise DataError("duplicate entries in the zip file")
    for entry in entries:
        _check_entry(entry)
    # The entries are not compressed, so together they are no larger than the file unless they overlap.
    if sum(entry.file_size for entry in entries) > len(mapped):
        raise DataError("the zip entries claim more bytes than the file has (a zip bomb?)")
    places = {entry.filename: (_data_offset(mapped, entry), entry.file_size) for entry in entries}
    roots = [name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise DataError("not a PyTorch zip file: it must hold exactly one NAME/data.pkl")
    root = roots[0]

    def content(name: str) -> bytes:
        offset, size = places[name]
        if size > MAX_PICKLE:
            raise DataError(f"zip entry {name!r} of {size} bytes is over the limit of {MAX_PICKLE}")
        return mapped[offset : offset + size]

    byteorder = content(root + "byteorder") if root + "byteorder" in places else b"little"
    if byteorder not in (b"little", b"big"):
        raise DataError(f"unknown byteorder {byteorder!r}; known: little, big")

    def read(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if f"{root}data/{key}" not in places:
            raise DataError(f"the storage {key!r} is missing")
        offset, size = places[f"{root}data/{key}"]
        if count * dtype.itemsize > size:
            raise DataError(f"storage {key!r} needs {count * dtype.itemsize} bytes, the file has {size}: truncated?")
        return _vector(mapped, dtype, count, offset, byteorder == b"big")

    return run_pickle(io.BytesIO(content(root + "data.pkl")), _each_once(read))


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename:
        raise DataError(f"unsafe zip entry name {entry.filename!r}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise DataError(f"zip entry {entry.filename!r} is compressed or encrypted, which torch.save never does")


def _data_offset(mapped: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """The position of an entry's bytes. Its local header tells how long the name and the extra field are there."""
    start = entry.header_offset
    local = mapped[start : start + 30]
    if local[:4] != b"PK\x03\x04" or len(local) < 30:
        raise DataError(f"zip entry {entry.filename!r} has no local header: truncated?")
    offset = start + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if offset + entry.file_size > len(mapped):
        raise DataError(f"zip entry {entry.filename!r} runs past the end of the file: truncated?")
    return offset


def _read_legacy(mapped: mmap.mmap) -> Any:
    """The object in a file of torch before 1.6: five pickles, then the count (8 bytes) and numbers of each storage."""
    magic = run_pickle(mapped, _no_storage)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise DataError("a plain Python pickle, not a PyTorch file")
    run_pickle(mapped, _no_storage)  # the version of the protocol
    system = run_pickle(mapped, _no_storage)
    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    wanted: dict[str, tuple[np.dtype, int]] = {}

    def note(dtype: np.dtype, key: str, count: int) -> Storage:
        wanted[key] = (dtype, count)
        return Storage(None)

    # The numbers come after the pickle that describes them. The first run learns the storages' sizes and so their
    # places, the second makes the tensors.
    start = mapped.tell()
    run_pickle(mapped, note)
    keys = run_pickle(mapped, _no_storage)
    position = mapped.tell()
    storages = {}
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str):
            raise DataError(f"the key of a storage is a {type(key).__name__}, not text")
        if key not in wanted:
            raise DataError(f"storage {key!r} belongs to no tensor")
        dtype, count = wanted[key]
        stored = int.from_bytes(mapped[position : position + 8], "big" if big_endian else "little")
        position += 8
        if stored != count or position + count * dtype.itemsize > len(mapped):
            raise DataError(f"storage {key!r} of {count} numbers is not whole: truncated?")
        storages[key] = _vector(mapped, dtype, count, position, big_endian)
        position += count * dtype.itemsize

    def read(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        if key not in storages:
            raise DataError(f"the storage {key!r} is missing")
        return storages[key]

    mapped.seek(start)
    return run_pickle(mapped, _each_once(read))


def _no_storage(dtype: np.dtype, key: str, count: int) -> Storage:
    raise DataError("holds a tensor where none belongs")


def _each_once(read: Callable[[np.dtype, str, int], np.ndarray]) -> FindStorage:
    """Makes `read` run once for each storage, since tensors share storages and a big-endian storage is copied."""
    known: dict[str, tuple[np.dtype, int, Storage]] = {}

    def find(dtype: np.dtype, key: str, count: int) -> Storage:
        if key not in known:
            known[key] = (dtype, count, Storage(read(dtype, key, count)))
        if known[key][:2] != (dtype, count):
            raise DataError(f"storage {key!r} is described in two ways")
        return known[key][2]

    return find


def _vector(mapped: mmap.mmap, dtype: np.dtype, count: int, offset: int, big_endian: bool) -> np.ndarray:
    if count == 0:
        return np.empty(0, dtype)
    if not big_endian or dtype == np.bool_:
        return np.frombuffer(mapped, dtype, count, offset)
    if dtype == np.uint8:
        raise DataError("a big-endian file with bytes or an untyped storage is not supported")
    integers = np.dtype(f"u{dtype.itemsize}")  # dtypes of ml_dtypes cannot swap bytes
    return np.frombuffer(mapped, integers, count, offset).byteswap().view(dtype)
