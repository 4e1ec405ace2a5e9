"""The adapter of one layer: its tensors in a file, and their conversion between PyTorch's layout and sdjax's."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.parameter_names import from_torch_layout, listing, to_torch_layout
from sdjax.formats.weights_file import to_float32
from sdjax.trees import Path


class TorchAdapter(NamedTuple):
    """An adapter in PyTorch's layout, as files hold it: `W' = W + scale * up down`."""

    down: np.ndarray  # [R, in], in a convolution [R, in, h, w]
    up: np.ndarray  # [out, R], in a convolution [out, R, 1, 1]
    scale: float
    magnitude: np.ndarray | None = None  # of DoRA: [out], or [in, 1] for one number for each input


def group_tensors(
    tensors: Mapping[str, np.ndarray], parse: Callable[[str], tuple[Path, str] | None]
) -> dict[Path, dict[str, np.ndarray]]:
    """Path of a layer -> the tensors of its adapter by name, such as `down`, `up`, `alpha` and `magnitude`.

    parse: key in the file -> path of the layer and name of the tensor; None for a key of no layer.
    Raises DataError for keys of no layer, and for two keys with the same meaning.
    """
    adapters: dict[Path, dict[str, np.ndarray]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        place = parse(key)
        if place is None:
            unknown.append(key)
            continue
        path, name = place
        if name in adapters[path]:
            raise DataError(f"{key} and another key mean the same tensor of {'/'.join(path)}")
        adapters[path][name] = tensor
    if unknown:
        raise DataError(f"{len(unknown)} keys of no layer of this model: {listing(unknown)}")
    return adapters


def check_complete(parts: Mapping[str, np.ndarray], needed: set[str], path: Path) -> None:
    """Raises DataError if the tensors of a layer's adapter lack some of those needed."""
    if not needed <= parts.keys():
        raise DataError(f"{'/'.join(path)} has {listing(sorted(parts))} but needs {' and '.join(sorted(needed))}")


def rank_of(down: np.ndarray) -> int:
    """The rank R of an adapter, by its `down` in PyTorch's layout."""
    return np.atleast_1d(down).shape[0]


def alpha_of(parts: Mapping[str, np.ndarray], path: Path) -> float | None:
    """The alpha among the tensors of an adapter; None if there is none. DataError if it is more than one number."""
    if "alpha" not in parts:
        return None
    alpha = parts["alpha"]
    if alpha.size != 1:
        raise DataError(f"{'/'.join(path)}: alpha has shape {list(alpha.shape)} where one number is expected")
    return float(alpha.astype(np.float32).reshape(()))


def from_torch(adapter: TorchAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    """The adapter in sdjax's layout and in float32: `down`, `up`, `scale` and, for DoRA, `magnitude`.

    kernel: shape of the layer's kernel, `[in, out]` or `[h, w, in, out]`.
    Raises DataError naming `name` for shapes that do not fit the kernel, integers, NaN and Inf.
    """
    down, up = (to_float32(array, name) for array in (adapter.down, adapter.up))
    if not math.isfinite(adapter.scale):
        raise DataError(f"{name}: a scale of {adapter.scale}")
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    down = from_torch_layout(down, len(kernel))
    fits = down.shape[:-1] == kernel[:-1] and up.ndim == 2 and up.shape == (kernel[-1], down.shape[-1])
    if not fits or up.shape[1] == 0:
        raise DataError(
            f"{name}: down {list(adapter.down.shape)}, up {list(adapter.up.shape)} for a kernel {list(kernel)}"
        )
    layer = {
        "down": np.ascontiguousarray(down),
        "up": np.ascontiguousarray(up.T),
        "scale": np.array(adapter.scale, np.float32),
    }
    if adapter.magnitude is not None:
        layer["magnitude"] = magnitude_of(adapter.magnitude, kernel, name)
    return layer


def magnitude_of(magnitude: np.ndarray, kernel: tuple[int, ...], name: str) -> np.ndarray:
    """DoRA's magnitude for a kernel of this shape in float32, [out] or [in, 1]; DataError if it has another size."""
    if magnitude.shape not in ((kernel[-1],), (kernel[-2], 1)):
        expected = f"{kernel[-1]} for the outputs, or {kernel[-2]} for the inputs"
        raise DataError(f"{name}: a DoRA magnitude {list(magnitude.shape)}; expected {expected}")
    return to_float32(magnitude, name)


def to_torch(layer: Mapping[str, Any], name: str) -> TorchAdapter:
    """The inverse of `from_torch`, in float32. DataError naming `name` for the stacked adapters of a batch."""
    down, up, scale = (np.asarray(layer[part], np.float32) for part in ("down", "up", "scale"))
    if scale.ndim:
        raise DataError(f"{name}: holds an adapter for each example of a batch; choose one to save")
    up = up.T if down.ndim == 2 else up.T[:, :, None, None]
    magnitude = np.asarray(layer["magnitude"], np.float32) if "magnitude" in layer else None
    return TorchAdapter(to_torch_layout(down), up, float(scale), magnitude)
