"""safetensors files. Reading maps the file into memory; writing takes one pass.

Format: the length of the header in 8 bytes, little-endian; the header in JSON; then the tensors without gaps.
The library `safetensors` is not used because it accepts duplicate keys, does not name every fault in one line, and
writes non-contiguous arrays wrongly.
"""

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.errors import DataError
from sdjax.runtime import strict_json
from sdjax.runtime.whole_file import replacing

_MAX_HEADER = 100_000_000  # bytes, the reference implementation's limit
_MAX_RANK = 16
_MAX_SPAN = 2**60  # product of the sizes other than 0, which the number of bytes does not limit in an empty tensor

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# How a file of another kind begins, and what the error says about it.
_IMPOSTORS = (
    (b"PK\x03\x04", "is a PyTorch pickle (zip) under a safetensors name; rename it to .ckpt and it is read safely"),
    (b"\x80", "is a Python pickle under a safetensors name; rename it to .ckpt and it is read safely"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the weights; run `git lfs pull`"),
    (b"<", "is a web page, not weights: the download went wrong"),
    (b"GGUF", "is a GGUF file, which is not supported"),
)


class SafetensorsFile(NamedTuple):
    """tensors: name -> read-only view into the mapped file, read from the disk when it is used. metadata: by name."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def read_safetensors(path: str | os.PathLike) -> SafetensorsFile:
    """Reads the header of a safetensors file and maps its tensors. bfloat16 and float8 are dtypes of ml_dtypes.

    Raises DataError for every fault, in one line that names the file.
    """
    path = Path(path)
    size, length, head = _read_head(path)
    with path.open("rb") as file:
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise DataError(f"{path}: {_impostor(head) or _bad_length(size, length)}")
        file.seek(8)
        header = _parse_header(path, file.read(length), head)
        # The mapping lives as long as a view of it.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{path}: __metadata__ in the header is not an object of strings")
    entries = sorted(((_parse_entry(path, name, entry), name) for name, entry in header.items()), key=_by_place)
    position = 0
    for (_, _, begin, end), name in entries:
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise DataError(f"{path}: tensor {name!r} at bytes {begin}..{end} {fault} (ends at {position})")
        position = end
    data = 8 + length
    if data + position > size:
        raise DataError(f"{path}: truncated: the tensors need {data + position} bytes, the file has {size}")
    if data + position < size:
        raise DataError(f"{path}: {size - data - position} trailing bytes after the last tensor")
    tensors = {name: _view(mapped, dtype, shape, data + begin) for (dtype, shape, begin, _), name in entries}
    return SafetensorsFile(tensors, metadata)


def save_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: Any = None,
) -> None:
    """Writes a safetensors file. An earlier file stays as it was if writing fails.

    tensors: of any strides; they are copied one at a time. dtype: of floating-point tensors in the file; None keeps
    the dtype of each.
    """
    with replacing(Path(path)) as file:
        for chunk in encode(tensors, metadata, dtype=dtype):
            file.write(chunk)


def encode(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None, *, dtype: Any = None
) -> Iterator[bytes | memoryview]:
    """Yields the content of a file: first length and header together, then the bytes of each tensor."""
    targets = {name: _target_dtype(array.dtype, dtype) for name, array in tensors.items()}
    for name, target in targets.items():
        if target not in _NAMES:
            raise DataError(f"tensor {name!r}: safetensors has no dtype {target}; it has {', '.join(_DTYPES)}")
    # Widest dtype first, as in the reference implementation: then each tensor starts at a multiple of its item size.
    names = sorted(tensors, key=lambda name: (-targets[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name in names:
        end = position + tensors[name].size * targets[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[targets[name]], "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        array = np.asarray(tensors[name])  # computes a `Deferred`
        with np.errstate(over="ignore"):
            contiguous = np.ascontiguousarray(array, dtype=targets[name])
        narrowed = targets[name] == np.float16 and array.dtype != np.float16
        if narrowed and not (np.isfinite(contiguous) | ~np.isfinite(array)).all():
            raise DataError(f"tensor {name!r} holds numbers above 65504, which do not fit in float16: choose bfloat16")
        yield contiguous.reshape(-1).view(np.uint8).data


def _read_head(path: Path) -> tuple[int, int, bytes]:
    """The size of the file, the length of its header, and its first 64 bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            return path.stat().st_size, int.from_bytes(head[:8], "little"), head
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _impostor(head: bytes) -> str | None:
    return next((message for start, message in _IMPOSTORS if head.lstrip().startswith(start)), None)


def _bad_length(size: int, length: int) -> str:
    if size < 8:
        return f"too short for a safetensors file ({size} bytes)"
    return f"not a safetensors file, or truncated: a header of {length} bytes in a file of {size} (limit {_MAX_HEADER})"


def _parse_header(path: Path, text: bytes, head: bytes) -> dict[str, Any]:
    try:
        header = strict_json.parse(text, pairs=_reject_duplicates)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except ValueError as error:
        raise DataError(f"{path}: {_impostor(head) or f'the safetensors header is not JSON: {error}'}") from None
    if not isinstance(header, dict):
        raise DataError(f"{path}: the safetensors header is not a JSON object")
    return header


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise DataError(f"duplicate key in the header: {repeated!r}")
    return entries


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """The dtype, shape, begin and end of a tensor; begin and end in bytes from the start of the data."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{where}: the header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise DataError(f"{where}: unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    if not _is_sizes(shape) or len(shape) > _MAX_RANK:
        raise DataError(f"{where}: shape must be a list of at most {_MAX_RANK} sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise DataError(f"{where}: data_offsets must be two byte positions")
    begin, end = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise DataError(f"{where}: {dtype} {shape} needs {needed} bytes, the header gives {end - begin}")
    if math.prod(size or 1 for size in shape) > _MAX_SPAN:
        raise DataError(f"{where}: shape {shape} is too large")
    return _DTYPES[dtype], tuple(shape), begin, end


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _by_place(entry: tuple[tuple[np.dtype, tuple[int, ...], int, int], str]) -> tuple[int, int]:
    (_, _, begin, end), _ = entry
    return begin, end


def _view(mapped: mmap.mmap, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> np.ndarray:
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(mapped, dtype, count, offset).reshape(shape)


def _target_dtype(dtype: np.dtype, wanted: Any) -> np.dtype:
    return np.dtype(wanted) if wanted is not None and is_floating(dtype) else dtype


def is_floating(dtype: np.dtype) -> bool:
    """Whether numbers of this dtype are floating-point numbers, of NumPy or of ml_dtypes."""
    try:
        ml_dtypes.finfo(dtype)
    except (ValueError, TypeError):
        return False
    return True
