"""One layer's adapter: PyTorch's layout <-> ours."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import is_floating


class TorchAdapter(NamedTuple):
    """`W' = W + scale * up down` in PyTorch's layout, as files hold it."""

    down: np.ndarray  # [R, in], convolution [R, in, kh, kw]
    up: np.ndarray  # [out, R], convolution [out, R, 1, 1]
    scale: float
    magnitude: np.ndarray | None = None  # DoRA: one number an output


def from_torch(adapter: TorchAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    """-> {"down", "up", "scale"[, "magnitude"]} in float32 for a kernel `[in, out]` or `[kh, kw, in, out]`.

    Raises DataError naming `name` for shapes that do not belong to that kernel, integers, NaN and Inf.
    """
    down, up = (_to_float32(array, name) for array in (adapter.down, adapter.up))
    if not math.isfinite(adapter.scale):
        raise DataError(f"{name}: a scale of {adapter.scale}")
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    if down.ndim == 4:
        down = down.transpose(2, 3, 1, 0)  # [R, in, kh, kw] -> [kh, kw, in, R]
    elif down.ndim == 2:
        down = down.T
    # A linear layer and a 1x1 convolution are one thing; files disagree on which to write.
    if down.ndim == 4 and down.shape[:2] == (1, 1) and len(kernel) == 2:
        down = down[0, 0]
    elif down.ndim == 2 and len(kernel) == 4:
        down = down[None, None]
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
        # [out], [out, 1, ..] or [1, out, 1, 1]; LyCORIS's older [1, in] is a norm along the other axis.
        wide = [size for size in adapter.magnitude.shape if size != 1]
        one_an_input = adapter.magnitude.ndim == 2 and adapter.magnitude.shape[0] == 1 and kernel[-1] != 1
        if adapter.magnitude.size != kernel[-1] or len(wide) > 1 or one_an_input:
            shape = list(adapter.magnitude.shape)
            raise DataError(f"{name}: a DoRA magnitude {shape} where each of {kernel[-1]} outputs has one number")
        layer["magnitude"] = _to_float32(adapter.magnitude, name).reshape(-1)
    return layer


def to_torch(layer: Mapping[str, Any], name: str) -> TorchAdapter:
    """The inverse, in float32."""
    down, up, scale = (np.asarray(layer[part], np.float32) for part in ("down", "up", "scale"))
    if scale.ndim:
        raise DataError(f"{name}: holds an adapter for each example of a batch; choose one to save")
    up = up.T
    if down.ndim == 4:
        down, up = down.transpose(3, 2, 0, 1), up[:, :, None, None]
    else:
        down = down.T
    magnitude = np.asarray(layer["magnitude"], np.float32) if "magnitude" in layer else None
    return TorchAdapter(down, up, float(scale), magnitude)


def scalar(tensor: np.ndarray, name: str) -> float:
    """The one number an alpha holds."""
    if tensor.size != 1:
        raise DataError(f"{name}: shape {list(tensor.shape)} where one number is expected")
    return float(tensor.astype(np.float32).reshape(()))


def _to_float32(array: np.ndarray, name: str) -> np.ndarray:
    if not is_floating(array.dtype):
        raise DataError(f"{name}: {array.dtype} where floating-point numbers are expected")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(f"{name}: holds NaN or Inf")
    return array
