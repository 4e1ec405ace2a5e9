"""Converts between PyTorch's state dicts and sdjax's parameter trees: names and layouts.

A path in a tree is the module's name with each number joined to the name before it by `_`: `to_out.0.weight` is
`to_out_0/kernel`. The expected tree, not the file, says whether a leaf belongs to a linear layer, a convolution, a norm
or an embedding.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from sdjax.errors import DataError
from sdjax.formats.deferred import Deferred
from sdjax.formats.safetensors_file import is_floating
from sdjax.trees import Path, leaves, nest

_INDEXED = re.compile(
    r"(down_blocks|up_blocks|attentions|resnets|transformer_blocks|downsamplers|upsamplers|layers|net|to_out|body)_(\d+)"
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# Names in the VAE's attention before diffusers 0.14.
_OLD_ATTENTION = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ALIGNMENT = 64  # bytes; XLA's CPU backend uses an aligned host array without copying it


def module_name(path: Path) -> str:
    """PyTorch's name of a module: `("mid_block", "attentions_0", "to_out_0")` -> `mid_block.attentions.0.to_out.0`."""
    return ".".join(_INDEXED.sub(r"\1.\2", part) if _INDEXED.fullmatch(part) else part for part in path)


def text_module_name(path: Path) -> str:
    """The name of a text model's module in transformers: below `text_model`, except for the projection."""
    return module_name(path) if path[0] == "text_projection" else f"text_model.{module_name(path)}"


def listing(names: Iterable[str]) -> str:
    """The first ten names, and the number of all if there are more."""
    names = list(names)
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def load_params(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], *, dtype: Any, what: str, sharding: Any = None
) -> dict[str, Any]:
    """The parameter tree of a state dict. Leaves move to the device one by one, so host memory holds no second copy.

    tensors: in PyTorch's names and layouts. Keys of a text model may begin with `text_model.`, and the attention of a
    VAE may have its old names. expected: tree of jax.ShapeDtypeStruct, whose dtypes are ignored. dtype: of the leaves.
    what: the file or model that errors name. sharding: a jax.Device or jax.sharding.Sharding for every leaf, or a tree
    of them like `expected`; None is JAX's default device.
    Raises DataError before anything is loaded with a list of all missing, extra and misshapen keys. Raises DataError
    for integers, NaN and Inf.
    """
    dtype = np.dtype(dtype)
    params: dict[Path, jax.Array] = {}
    for path, (key, view) in _matched(tensors, expected, what).items():
        host = _host_copy(view, dtype)
        if not np.isfinite(host).all():
            raise DataError(f"{what}: {key} holds NaN or Inf (as {dtype})")
        place = sharding
        for part in path if isinstance(sharding, Mapping) else ():
            place = place[part]
        params[path] = _on_device(host, place)
    return nest(params)


def view_params(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], *, what: str) -> dict[str, Any]:
    """The parameter tree of a state dict, whose leaves are read from the disk when they are written.

    The arguments and errors are those of `load_params`; NaN and Inf raise when a leaf is read. A leaf keeps its dtype.
    """

    def read(key: str, view: np.ndarray) -> np.ndarray:
        if not np.isfinite(view).all():
            raise DataError(f"{what}: {key} holds NaN or Inf")
        return view

    matched = _matched(tensors, expected, what)
    return nest(
        {path: Deferred(view.shape, view.dtype, partial(read, key, view)) for path, (key, view) in matched.items()}
    )


def _matched(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], what: str
) -> dict[Path, tuple[str, np.ndarray]]:
    """Path of each leaf -> the key of its tensor, and a view of it in sdjax's layout; see `load_params`."""
    keys = _canonical_names(tensors, what)
    wanted = {tensor_name(path): (path, leaf.shape) for path, leaf in leaves(expected)}
    missing = [name for name in wanted if name not in keys]
    extra = [key for name, key in keys.items() if name not in wanted]
    views: dict[str, np.ndarray] = {}
    misshapen = []
    for name in wanted.keys() & keys.keys():
        path, shape = wanted[name]
        tensor = tensors[keys[name]]
        view = from_torch_layout(tensor, len(shape)) if path[-1] == "kernel" else tensor
        if view.shape == shape:
            views[name] = view
        else:
            misshapen.append(f"{keys[name]} {list(tensor.shape)} for {list(shape)}")
    faults = [
        f"{len(names)} {fault}: {listing(names)}"
        for fault, names in (("missing", missing), ("not expected", extra), ("misshapen", sorted(misshapen)))
        if names
    ]
    if faults:
        raise DataError(f"{what} does not fit the model: {'; '.join(faults)}")
    integers = [f"{keys[name]} {view.dtype}" for name, view in views.items() if not is_floating(view.dtype)]
    if integers:
        raise DataError(f"{what} holds integer weights (quantised?), which are not supported: {listing(integers)}")
    return {path: (keys[name], views[name]) for name, (path, _) in wanted.items()}


def to_state_dict(params: Mapping[str, Any], *, prefix: str = "") -> dict[str, np.ndarray]:
    """The state dict of a parameter tree, in PyTorch's names and layouts: the inverse of `load_params`.

    The arrays are strided views. prefix: "text_model." for a text model, because transformers 4.x reads no names
    without it. The name of `text_projection` has no prefix.
    """
    tensors = {}
    for path, leaf in leaves(params):
        name = tensor_name(path)
        array: Any = leaf if isinstance(leaf, Deferred) else np.asarray(leaf)
        if path[-1] == "kernel":
            array = to_torch_layout(array)
        tensors[name if path[0] == "text_projection" else prefix + name] = array
    return tensors


def tensor_name(path: Path) -> str:
    """`("conv_in", "kernel")` -> `"conv_in.weight"`."""
    return f"{module_name(path[:-1])}.{_LEAVES[path[-1]]}"


def _canonical_names(tensors: Mapping[str, np.ndarray], what: str) -> dict[str, str]:
    """Today's name without `text_model.` -> the key in the file. `position_ids` are left out: they are no weights."""
    keys: dict[str, str] = {}
    for key in tensors:
        if key.endswith("position_ids"):
            continue
        name = key.removeprefix("text_model.")
        if old := _OLD_ATTENTION.fullmatch(name):
            name = f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}"
        if name in keys:
            raise DataError(f"{what} holds the same parameter twice: {keys[name]} and {key}")
        keys[name] = key
    return keys


def from_torch_layout(kernel: np.ndarray, axes: int) -> np.ndarray:
    """A view of a kernel of PyTorch in sdjax's layout: [out, in] -> [in, out], [out, in, h, w] -> [h, w, in, out].

    axes: 2 for a linear layer, 4 for a convolution. A linear layer and a convolution of 1 x 1 compute the same, and
    files differ in which of the two they store, so either is accepted for the other.
    """
    if kernel.ndim == 4:
        kernel = kernel.transpose(2, 3, 1, 0)
        return kernel[0, 0] if axes == 2 and kernel.shape[:2] == (1, 1) else kernel
    if kernel.ndim == 2:
        return kernel.T[None, None] if axes == 4 else kernel.T
    return kernel


def to_torch_layout(kernel: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch_layout`, for a kernel of 2 or 4 axes."""
    return kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)


def _host_copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy in `dtype`, aligned so that XLA's CPU backend uses it without another copy."""
    size = view.size * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    host = buffer[start : start + size].view(dtype).reshape(view.shape)
    with np.errstate(over="ignore"):  # a number too large for `dtype` becomes Inf, which the caller looks for
        np.copyto(host, view, casting="unsafe")
    return host


def _on_device(host: np.ndarray, place: Any) -> jax.Array:
    if isinstance(place, jax.sharding.Sharding):
        return jax.make_array_from_callback(host.shape, place, host.__getitem__)
    return jax.device_put(host, place)
