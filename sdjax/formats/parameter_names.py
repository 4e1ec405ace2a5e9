"""Names and layouts of PyTorch's state dicts <-> our parameter trees.

Names are mechanical: our path is the module path with each number joined to the name before it by `_`
(`to_out.0.weight` <-> `to_out_0/kernel`). What a leaf is (linear, convolution, norm, embedding) is read off our own
expected tree, never guessed from the file.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import is_floating
from sdjax.trees import Path, leaves, nest

_INDEXED = re.compile(
    r"(down_blocks|up_blocks|attentions|resnets|transformer_blocks|downsamplers|upsamplers|layers|net|to_out)_(\d+)"
)
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
# The VAE's attention before diffusers 0.14.
_OLD_ATTENTION = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ALIGNMENT = 64  # bytes; XLA's CPU backend then takes a host array as it is, without a copy


def module_name(path: Path) -> str:
    """`("up_blocks_0", "attentions_1", "proj_in")` -> `"up_blocks.0.attentions.1.proj_in"`."""
    return ".".join(_INDEXED.sub(r"\1.\2", part) if _INDEXED.fullmatch(part) else part for part in path)


def listing(names: Iterable[str]) -> str:
    """The first ten names, and how many there are in all."""
    names = list(names)
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def load_params(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], *, dtype: Any, what: str, sharding: Any = None
) -> dict[str, Any]:
    """State dict -> parameter tree of `dtype` on the device, one leaf at a time: no second copy in host memory.

    tensors: PyTorch names and layouts; text-encoder keys with or without `text_model.`, old VAE attention names.
    expected: tree of jax.ShapeDtypeStruct (shapes alone count). what: the file or model named in errors.
    sharding: a jax.Device or jax.sharding.Sharding for every leaf, or a tree of them like `expected`; None is JAX's
    default device.
    Raises DataError listing missing, extra and misshapen keys before anything is loaded, and for NaN or Inf.
    """
    dtype = np.dtype(dtype)
    found = _canonical_names(tensors, what)
    wanted = {tensor_name(path): (path, leaf.shape) for path, leaf in leaves(expected)}
    missing = [name for name in wanted if name not in found]
    extra = [key for name, key in found.items() if name not in wanted]
    views: dict[str, np.ndarray] = {}
    misshapen = []
    for name in wanted.keys() & found.keys():
        path, shape = wanted[name]
        tensor = tensors[found[name]]
        view = _to_layout(tensor, path[-1], shape)
        if view is None:
            misshapen.append(f"{found[name]} {list(tensor.shape)} for {list(shape)}")
        else:
            views[name] = view
    faults = [
        f"{len(names)} {fault}: {listing(names)}"
        for fault, names in (("missing", missing), ("not expected", extra), ("misshapen", sorted(misshapen)))
        if names
    ]
    if faults:
        raise DataError(f"{what} does not fit the model: {'; '.join(faults)}")
    integers = [f"{found[name]} {view.dtype}" for name, view in views.items() if not is_floating(view.dtype)]
    if integers:
        raise DataError(f"{what} holds integer weights (quantised?), which are not supported: {listing(integers)}")

    params: dict[Path, jax.Array] = {}
    for name, (path, _) in wanted.items():
        host = _host_copy(views[name], dtype)
        if not np.isfinite(host).all():
            raise DataError(f"{what}: {found[name]} holds NaN or Inf (as {dtype})")
        place = sharding
        for part in path if isinstance(sharding, Mapping) else ():
            place = place[part]
        params[path] = _on_device(host, place)
    return nest(params)


def to_state_dict(params: Mapping[str, Any], *, prefix: str = "") -> dict[str, np.ndarray]:
    """Parameter tree -> PyTorch names and layouts, the inverse of `load_params`; arrays are strided views.

    prefix: "text_model." for text encoders, which every version of transformers reads (without it, 4.x does not);
    `text_projection` stands outside of it.
    """
    tensors = {}
    for path, leaf in leaves(params):
        name = tensor_name(path)
        array = np.asarray(leaf)
        if path[-1] == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)  # [in, out] / HWIO -> [out, in] / OIHW
        tensors[name if path[0] == "text_projection" else prefix + name] = array
    return tensors


def tensor_name(path: Path) -> str:
    """`("conv_in", "kernel")` -> `"conv_in.weight"`."""
    return f"{module_name(path[:-1])}.{_LEAVES[path[-1]]}"


def _canonical_names(tensors: Mapping[str, np.ndarray], what: str) -> dict[str, str]:
    """Today's name without `text_model.` -> the key in the file. `position_ids` are a buffer, not a weight."""
    found: dict[str, str] = {}
    for key in tensors:
        if key.endswith("position_ids"):
            continue
        name = key.removeprefix("text_model.")
        if old := _OLD_ATTENTION.fullmatch(name):
            name = f"{old[1]}.{_OLD_NAMES[old[2]]}.{old[3]}"
        if name in found:
            raise DataError(f"{what} holds the same parameter twice: {found[name]} and {key}")
        found[name] = key
    return found


def _to_layout(array: np.ndarray, leaf: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """A view of a PyTorch tensor in our layout, None if it cannot have `shape`."""
    if leaf == "kernel":
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)  # OIHW -> HWIO
        elif array.ndim == 2:
            array = array.T  # [out, in] -> [in, out]
        # A linear layer and a 1x1 convolution are one thing; files disagree on which to write.
        if array.ndim == 4 and len(shape) == 2 and array.shape[:2] == (1, 1):
            array = array[0, 0]
        elif array.ndim == 2 and len(shape) == 4:
            array = array[None, None]
    return array if array.shape == shape else None


def _host_copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy in `dtype`, laid where the CPU backend can use it without copying again."""
    size = view.size * dtype.itemsize
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    host = buffer[start : start + size].view(dtype).reshape(view.shape)
    with np.errstate(over="ignore"):  # too large for `dtype` becomes Inf, which the caller looks for
        np.copyto(host, view, casting="unsafe")
    return host


def _on_device(host: np.ndarray, place: Any) -> jax.Array:
    if isinstance(place, jax.sharding.Sharding):
        return jax.make_array_from_callback(host.shape, place, host.__getitem__)
    return jax.device_put(host, place)
