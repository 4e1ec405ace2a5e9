"""Runs the pickles in PyTorch's files on a small machine that cannot run foreign code.

A pickle is a program for a stack machine that can call any importable function. The machine here knows only the
instructions that torch.save writes, and calls only the functions of `_CALLS`, which are all in this module. Nothing in
it imports a module.
"""

import math
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.errors import DataError

MAX_PICKLE = 16 * 2**20
"""Largest size of a pickle in bytes, without the numbers of its tensors. That of Stable Diffusion has about 1 MiB."""

MAX_STEPS = 1_000_000
"""Most instructions of a pickle. That of Stable Diffusion with its optimizer has about 200,000."""
MAX_NESTING = 20
"""Most tuples that lie one in another. Hashing or printing a deeper one could overflow the stack of the interpreter."""

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


class _StandIn(dict):
    """Takes the place of an object whose class is not here: a dict of its attributes."""


class Storage(NamedTuple):
    """The numbers that tensors are views of.

    data: [n] in the dtype of the storage, or bytes in an untyped storage. None makes every tensor None, for a run that
    only learns which storages there are.
    """

    data: np.ndarray | None


class _Global(NamedTuple):
    """The name of a function in `_CALLS` that the pickle refers to."""

    name: str


_MARK = object()
FindStorage = Callable[[np.dtype, str, int], Storage]
"""(dtype, key, count of numbers) -> the storage."""


def run_pickle(stream: Any, find: FindStorage) -> Any:
    """The object of the pickle at the position of a BytesIO or mmap, which then moves to the end of the pickle.

    Raises DataError for a pickle that is broken, too large, or uses anything that torch.save does not write.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    nesting: dict[int, tuple[int, tuple]] = {}
    start = stream.tell()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of odd escapes in the old form of text
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                if stream.tell() - start > MAX_PICKLE or count > MAX_STEPS:
                    raise DataError(f"the pickle is over the limit of {MAX_PICKLE} bytes or {MAX_STEPS} instructions")
                if opcode.name == "STOP":
                    return stack.pop()
                _step(opcode.name, argument, stack, memo, find)
                if opcode.name.startswith("TUPLE"):
                    _check_nesting(stack[-1], nesting)
    except DataError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        # The error itself may hold a value of the pickle, which could be endless.
        raise DataError(f"broken or truncated pickle ({type(error).__name__})") from None
    raise DataError("truncated pickle")


def _check_nesting(made: tuple, nesting: dict[int, tuple[int, tuple]]) -> None:
    """Notes how deep a new tuple is nested. nesting: id of a tuple -> its depth, and the tuple, to keep it alive."""
    depth = 1 + max((nesting[id(item)][0] for item in made if id(item) in nesting), default=0)
    if depth > MAX_NESTING:
        raise DataError(f"tuples are nested more than {MAX_NESTING} deep")
    if depth > 1 or made:
        nesting[id(made)] = (depth, made)


# The functions that take the place of those a pickle may call.


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> np.ndarray | None:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
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
    # A tensor with more numbers than its storage has a stride of 0. A small file could then fill the memory.
    if last >= data.size or count > data.size:
        raise DataError(f"a tensor of shape {shape} reaches past its storage of {data.size} numbers")
    bytes_apart = [stride * data.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(data[offset:], shape, bytes_apart, writeable=False)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any):
    """Version 3 of the function: for dtypes that have no typed storage, such as float8 and unsigned integers."""
    if not isinstance(storage, Storage) or not isinstance(dtype, np.dtype):
        raise DataError("a tensor is described wrongly")
    if storage.data is not None:
        if storage.data.size % dtype.itemsize:
            raise DataError(f"a storage of {storage.data.size} bytes does not hold whole numbers of {dtype}")
        storage = Storage(storage.data.view(dtype))
    return _rebuild_tensor(storage, offset, shape, strides)


def _rebuild_from_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    return _call(function, arguments)


# No function copies a long argument. Otherwise a short pickle that copies a list a million times would fill the memory.


def _unchanged(value: Any = (), *_: Any) -> Any:
    return value


def _ordered_dict() -> dict:
    return {}


def _size(sizes: Any = ()) -> tuple:
    if not isinstance(sizes, (tuple, list)) or len(sizes) > 16:
        raise DataError("a torch.Size is described wrongly")
    return tuple(sizes)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, which protocol 2 writes as text. Only short ones, because this function copies them."""
    if not isinstance(text, str) or encoding != "latin1" or len(text) > 4096:
        raise DataError("bytes are described wrongly")
    return text.encode("latin1", errors="replace")


def _stand_in(*_: Any) -> _StandIn:
    return _StandIn()


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
    "torch.nn.parameter.Parameter": _stand_in,  # an argument that `_rebuild_from_type` ignores
    # Holds the vectors in early Textual Inversion files.
    "torch.nn.modules.container.ParameterDict": _stand_in,
    # Found in CompVis' checkpoints beside the weights.
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
    if not isinstance(module, str) or not isinstance(name, str):
        raise DataError("the pickle names a function by something that is not text; nothing was run")
    full = f"{module}.{name}"[:200]
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


def _step(opcode: str, argument: Any, stack: list[Any], memo: dict[int, Any], find: FindStorage) -> None:
    """Executes one instruction, as pickletools documents it. Refuses an instruction that torch.save never writes."""
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


def _set_items(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # The hash of a deeply nested tuple would overflow the interpreter's stack.
        if not isinstance(key, (str, int, float, bytes, _Global, type(None))):
            raise DataError(f"a dict has a {type(key).__name__} for a key")
        target[key] = value


def _build(state: Any, target: Any) -> None:
    """Sets the attributes of a stand-in. Those of a state dict (its `_metadata`) are ignored."""
    if isinstance(target, _StandIn):
        target.update(state if isinstance(state, dict) else {})
    elif not isinstance(target, dict):
        raise DataError(f"the pickle sets attributes of a {type(target).__name__}; nothing was run")


def _storage(description: Any, find: FindStorage) -> Storage:
    """The storage of ('storage', dtype, key, device, count). Old files have a sixth field, which must be None."""
    if not isinstance(description, tuple) or len(description) not in (5, 6) or description[0] != "storage":
        raise DataError("a persistent id that is not a storage")
    _, dtype, key, _, count = description[:5]
    if not isinstance(dtype, np.dtype) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise DataError("a storage is described wrongly")
    if description[5:] not in ((), (None,)):
        raise DataError("views of storages, as very old PyTorch wrote them, are not supported; save the file anew")
    return find(dtype, key, count)
