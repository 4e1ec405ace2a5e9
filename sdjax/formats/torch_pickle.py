"""PyTorch's files (.bin, .pt, .ckpt) read without torch and without running anything.

A pickle is a program for a small stack machine that can call any importable function. The machine here knows only the
instructions torch.save uses, and its only calls are the few functions of `_CALLS`, all ours: there is nothing in it
that could import a module or run foreign code. Tensors are read-only views into the mapped file.
"""

import io
import math
import mmap
import os
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.errors import DataError

_MAX_PICKLE = 16 * 2**20  # bytes of the object graph alone; Stable Diffusion's is about one MiB
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
}
_STORAGES = {
    "DoubleStorage": _DTYPES["float64"],
    "FloatStorage": _DTYPES["float32"],
    "HalfStorage": _DTYPES["float16"],
    "BFloat16Storage": _DTYPES["bfloat16"],
    "LongStorage": _DTYPES["int64"],
    "IntStorage": _DTYPES["int32"],
    "ShortStorage": _DTYPES["int16"],
    "CharStorage": _DTYPES["int8"],
    "ByteStorage": _DTYPES["uint8"],
    "BoolStorage": _DTYPES["bool"],
}


class StandIn(dict):
    """What an object of a class we do not have becomes: its state, as a dict."""


class _Storage(NamedTuple):
    data: np.ndarray | None  # [numel], in the storage's dtype, bytes if untyped; None while only looking for places


class _Global(NamedTuple):
    """A name the pickle refers to; only names in `_CALLS` and `_CONSTANTS` get this far."""

    name: str


_MARK = object()
_Find = Callable[[np.dtype, str, int], _Storage]  # (dtype, key, count) -> the numbers


def read_torch(path: str | os.PathLike) -> Any:
    """The object torch.save wrote, tensors as numpy arrays. DataError for anything but plain containers and tensors."""
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


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, out of its `state_dict` where it has one; other entries are left out."""
    content = read_torch(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a table of tensors")
    tensors = {
        name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, np.ndarray)
    }
    if not tensors:
        raise DataError(f"{path}: holds no tensors at its top level or under 'state_dict'")
    return tensors


def _read_zip(path: Path, mapped: mmap.mmap) -> Any:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:  # what zipfile has for broken files
        raise DataError(f"broken or truncated zip file: {error}") from None
    if len({entry.filename for entry in entries}) != len(entries):
        raise DataError("duplicate entries in the zip file")
    for entry in entries:
        _check_entry(entry)
    # Entries are stored, not packed, so together they cannot exceed the file unless they overlap.
    if sum(entry.file_size for entry in entries) > len(mapped):
        raise DataError("the zip entries claim more bytes than the file has (a zip bomb?)")
    places = {entry.filename: (_data_offset(mapped, entry), entry.file_size) for entry in entries}
    roots = [name.removesuffix("data.pkl") for name in places if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise DataError("not a PyTorch zip file: it must hold exactly one NAME/data.pkl")
    root = roots[0]

    def content(name: str) -> bytes:
        offset, size = places[name]
        if size > _MAX_PICKLE:
            raise DataError(f"zip entry {name!r} of {size} bytes is over the limit of {_MAX_PICKLE}")
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

    return _run(io.BytesIO(content(root + "data.pkl")), _each_once(read))


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = PurePosixPath(entry.filename)
    if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or ":" in entry.filename:
        raise DataError(f"unsafe zip entry name {entry.filename!r}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
        raise DataError(f"zip entry {entry.filename!r} is compressed or encrypted, which torch.save never does")


def _data_offset(mapped: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored entry begin; the local header's own name and extra lengths decide."""
    start = entry.header_offset
    local = mapped[start : start + 30]
    if local[:4] != b"PK\x03\x04" or len(local) < 30:
        raise DataError(f"zip entry {entry.filename!r} has no local header: truncated?")
    offset = start + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if offset + entry.file_size > len(mapped):
        raise DataError(f"zip entry {entry.filename!r} runs past the end of the file: truncated?")
    return offset


def _read_legacy(mapped: mmap.mmap) -> Any:
    """torch < 1.6: five pickles in a row, then for each storage its 8-byte count and its numbers."""
    if _run(mapped, _no_storage) != _LEGACY_MAGIC:
        raise DataError("a plain Python pickle, not a PyTorch file")
    _run(mapped, _no_storage)  # the protocol's version
    system = _run(mapped, _no_storage)
    big_endian = isinstance(system, dict) and system.get("little_endian") is False
    wanted: dict[str, tuple[np.dtype, int]] = {}

    def note(dtype: np.dtype, key: str, count: int) -> _Storage:
        wanted[key] = (dtype, count)
        return _Storage(None)

    # The numbers lie behind the graph that says what they are: walk it once to learn the places, again for the views.
    graph = mapped.tell()
    _run(mapped, note)
    keys = _run(mapped, _no_storage)
    position = mapped.tell()
    storages = {}
    for key in keys if isinstance(keys, list) else []:
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

    mapped.seek(graph)
    return _run(mapped, _each_once(read))


def _no_storage(dtype: np.dtype, key: str, count: int) -> _Storage:
    raise DataError("a tensor where none belongs")


def _each_once(read: Callable[[np.dtype, str, int], np.ndarray]) -> _Find:
    """Tensors share storages; a storage that had to be copied is copied once, however often the pickle asks."""
    known: dict[str, tuple[np.dtype, int, _Storage]] = {}

    def find(dtype: np.dtype, key: str, count: int) -> _Storage:
        if key not in known:
            known[key] = (dtype, count, _Storage(read(dtype, key, count)))
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
    integers = np.dtype(f"u{dtype.itemsize}")  # ml_dtypes cannot swap bytes themselves
    return np.frombuffer(mapped, integers, count, offset).byteswap().view(dtype)


# The functions a pickle may call, each replaced by one of ours.


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray | None:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise DataError("a tensor is described wrongly")
    sizes = [offset, *shape, *strides]
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise DataError("a tensor is described wrongly")
    if len(shape) != len(strides) or len(shape) > 16 or max(sizes) >= 2**40:
        raise DataError(f"a tensor has shape {shape} and strides {strides}")
    data, count = storage.data, math.prod(shape)
    if data is None:
        return None
    if count == 0:
        return np.empty(shape if math.prod(size or 1 for size in shape) < 2**40 else 0, data.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # More numbers than the storage has means a stride of zero: small on the disk, any size once it is copied.
    if last >= data.size or count > data.size:
        raise DataError(f"a tensor of shape {shape} reaches past its storage of {data.size} numbers")
    bytes_apart = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, bytes_apart, writeable=False)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any):
    """As v2, for dtypes that never had a typed storage (f8, unsigned integers)."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
        raise DataError("a tensor is described wrongly")
    if storage.data is not None:
        if storage.data.size % dtype.itemsize:
            raise DataError(f"a storage of {storage.data.size} bytes does not hold whole numbers of {dtype}")
        storage = _Storage(storage.data.view(dtype))
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    return _call(function, arguments)


# None of these copies what it is given: a short pickle that copies one long list a million times would fill the memory.


def _unchanged(value: Any = (), *_: Any) -> Any:
    return value


def _ordered_dict() -> dict:
    return {}


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 16:
        raise DataError("a torch.Size is described wrongly")
    return tuple(sizes)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 spells bytes; short ones only, for the same reason."""
    if not isinstance(text, str) or encoding != "latin1" or len(text) > 4096:
        raise DataError("bytes are described wrongly")
    return text.encode("latin1", errors="replace")


def _stand_in(*_: Any) -> StandIn:
    return StandIn()


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _unchanged,
    "torch._utils._rebuild_parameter_with_state": _unchanged,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.Size": _size,
    "torch.device": _stand_in,
    "_codecs.encode": _encode,
    "__builtin__.set": _unchanged,
    "builtins.set": _unchanged,
    "torch.nn.parameter.Parameter": _stand_in,  # the type `_rebuild_from_type_v2` is told, which it ignores
    # Wraps the embeddings of early Textual Inversion files.
    "torch.nn.modules.container.ParameterDict": _stand_in,
    # Found among the bookkeeping of CompVis's checkpoints.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": _stand_in,
    "numpy.core.multiarray.scalar": _stand_in,
    "numpy._core.multiarray.scalar": _stand_in,
    "numpy.dtype": _stand_in,
}
_CONSTANTS: dict[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.storage.{name}": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    "torch.UntypedStorage": _DTYPES["uint8"],
}


def _lookup(module: Any, name: Any) -> Any:
    full = f"{module}.{name}"
    if full in _CONSTANTS:
        return _CONSTANTS[full]
    if full in _CALLS:
        return _Global(full)
    raise DataError(f"the pickle asks for {full!r}, which is not on the list of harmless names; nothing was run")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise DataError("the pickle calls something that is not a function; nothing was run")
    try:
        return _CALLS[function.name](*arguments)
    except TypeError:
        raise DataError(f"the pickle calls {function.name} with wrong arguments") from None


def _run(stream: Any, find: _Find) -> Any:
    """Runs the pickle a BytesIO or mmap stands at -> its object; the stream then stands behind it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    start = stream.tell()
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if stream.tell() - start > _MAX_PICKLE:
                raise DataError(f"the pickle is over the limit of {_MAX_PICKLE} bytes")
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo, find)
    except DataError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"broken or truncated pickle: {type(error).__name__}: {error}") from None
    raise DataError("truncated pickle")


def _step(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any], find: _Find) -> None:
    """One instruction, as pickletools documents it. The ones torch.save never emits are refused."""
    match opcode:
        case "PROTO" | "FRAME":
            pass
        case "NONE":
            stack.append(None)
        case "NEWTRUE" | "NEWFALSE":
            stack.append(opcode == "NEWTRUE")
        case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
            stack.append(argument)
        case "BINBYTES" | "SHORT_BINBYTES" | "BINSTRING" | "SHORT_BINSTRING":
            stack.append(argument)
        case "MARK":
            stack.append(_MARK)
        case "EMPTY_LIST" | "EMPTY_SET":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "EMPTY_TUPLE":
            stack.append(())
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        case "TUPLE":
            items = _pop_to_mark(stack)
            stack.append(tuple(items))
        case "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        case "APPENDS" | "ADDITEMS":
            items = _pop_to_mark(stack)
            stack[-1].extend(items)
        case "SETITEM":
            items = stack[-2:]
            del stack[-2:]
            _set_items(stack[-1], items)
        case "SETITEMS":
            items = _pop_to_mark(stack)
            _set_items(stack[-1], items)
        case "BINPUT" | "LONG_BINPUT":
            memo[argument] = stack[-1]
        case "MEMOIZE":
            memo[len(memo)] = stack[-1]
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "GLOBAL":
            stack.append(_lookup(*argument.split(" ", 1)))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_lookup(module, name))
        case "REDUCE" | "NEWOBJ":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        case "BUILD":
            _build(stack.pop(), stack[-1])
        case "BINPERSID":
            stack.append(_storage(stack.pop(), find))
        case _:
            raise DataError(f"the pickle uses {opcode}, which torch.save never does; nothing was run")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1
    while stack[start] is not _MARK:
        start -= 1
        if start < 0:
            raise DataError("broken pickle: no mark on the stack")
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _set_items(table: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple nested a million deep would overflow the interpreter's own stack.
        if not isinstance(key, (str, int, float, bytes, _Global, type(None))):
            raise DataError(f"a table has a {type(key).__name__} for a key")
        table[key] = value


def _build(state: Any, target: Any) -> None:
    """Sets an object's attributes: kept for stand-ins, of no use on a state dict (its `_metadata`)."""
    if isinstance(target, StandIn):
        target.update(state if isinstance(state, dict) else {})
    elif not isinstance(target, dict):
        raise DataError(f"the pickle sets attributes of a {type(target).__name__}; nothing was run")


def _storage(description: Any, find: _Find) -> _Storage:
    """('storage', dtype, key, location, count), in old files with a sixth field, always None."""
    if not isinstance(description, tuple) or len(description) not in (5, 6) or description[0] != "storage":
        raise DataError("a persistent id that is not a storage")
    _, dtype, key, _, count = description[:5]
    if not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise DataError("a storage is described wrongly")
    if description[5:] not in ((), (None,)):
        raise DataError("views of storages, as very old PyTorch wrote them, are not supported; save the file anew")
    return find(dtype, key, count)
