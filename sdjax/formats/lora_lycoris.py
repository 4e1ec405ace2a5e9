"""The adapters of LyCORIS beside LoRA: LoHa, LoKr, GLoRA, LoRA in Tucker form, full differences and norms.

Their files have kohya's names of layers. Here their tensors, in PyTorch's layout, become adapters of `sdjax.lora`:

    LoHa    hada_w1_a [out, R]   hada_w1_b [R, in * h * w]         and hada_w2_a, hada_w2_b
    LoKr    lokr_w1 [a, c]       lokr_w2 [b, d, h, w]              each perhaps as a product of lokr_w1_a, lokr_w1_b
    GLoRA   a1 [in, R]           a2 [R, in]   b1 [out, R]   b2 [R, in, h, w]
    Tucker  lora_mid [R, R, h, w] or *_t [R, R, h, w]: a convolution between the two factors, with 1 x 1 around it
    full    diff [out, in, h, w]   diff_b [out];  a norm: w_norm [C]   b_norm [C]
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.lora_layer import TorchAdapter, alpha_of, check_complete, from_torch, magnitude_of, rank_of
from sdjax.formats.parameter_names import from_torch_layout, listing, to_torch_layout
from sdjax.formats.weights_file import to_float32
from sdjax.lora import form, rank
from sdjax.trees import Path

TENSORS = (
    *("lora_mid.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "diff", "diff_b", "w_norm", "b_norm"),
)
"""The names of the tensors, after that of the layer."""


class LycorisAdapter(NamedTuple):
    """The adapter of one layer. tensors: by the names in `TENSORS`, `down`, `up`, `alpha` and `magnitude`."""

    path: Path
    tensors: Mapping[str, np.ndarray]


def from_lycoris(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    """The adapter in sdjax's layout and in float32; see `sdjax.lora`.

    kernel: shape of the layer's kernel, `[in, out]` or `[h, w, in, out]`, or of a norm's scale, `[C]`.
    Raises DataError naming `name` for tensors that are missing or do not fit the kernel, integers, NaN and Inf.
    """
    tensors = adapter.tensors
    _check(all(tensor.ndim for key, tensor in tensors.items() if key != "alpha"), name, tensors, kernel)
    if len(kernel) == 1 and not tensors.keys() <= {"w_norm", "b_norm", "diff", "diff_b"}:
        raise DataError(f"{name}: a norm, which is adapted by w_norm and b_norm alone")
    forms = {form for key in tensors for start, form in _FORMS.items() if key.startswith(start) and key != "diff_b"}
    if len(forms) > 1:
        raise DataError(f"{name}: tensors of several kinds of adapter: {listing(sorted(tensors))}")
    parts = forms.pop()(adapter, kernel, name) if forms else {}
    bias = tensors.get("b_norm", tensors.get("diff_b"))
    if bias is not None:
        _check(bias.shape == kernel[-1:], name, {"diff_b": bias}, kernel)
        parts["bias"] = to_float32(bias, name)
    if "magnitude" in tensors:
        parts["magnitude"] = magnitude_of(tensors["magnitude"], kernel, name)
    return {"scale": np.array(1, np.float32), **parts}


def to_lycoris(layer: Mapping[str, Any], path: Path) -> LycorisAdapter:
    """The inverse of `from_lycoris`, with the names of a file. A LoRA has `mid` and Tucker's factors multiplied out."""
    kernel_axes = np.ndim(next(layer[name] for name in ("down", "w2", "w2_down", "diff", "bias") if name in layer))
    parts = {name: np.asarray(array, np.float32) for name, array in layer.items()}
    scale, tensors = float(parts["scale"]), {}
    flat = lambda factor: factor.reshape(len(factor), -1)
    if form(layer) == "LoKr":
        for i in "12":
            if f"w{i}" in parts:
                tensors[f"lokr_w{i}"] = to_torch_layout(parts[f"w{i}"])
            else:
                down, up = parts[f"w{i}_down"], parts[f"w{i}_up"]
                tensors |= {f"lokr_w{i}_a": up.T, f"lokr_w{i}_b": flat(to_torch_layout(down))}
        if (r := rank(layer)) is None:  # LyCORIS has no scale where both factors are whole
            tensors["lokr_w1"] = scale * tensors["lokr_w1"]
        tensors["alpha"] = np.float32(scale * r if r else 1)
    elif "diff" in parts:
        diff = scale * parts["diff"]
        tensors = {"w_norm": diff} if kernel_axes == 1 else {"diff": to_torch_layout(diff)}
    elif "down" in parts:
        down, up = to_torch_layout(parts["down"]), parts["up"].T
        alpha = np.float32(scale * len(down))
        wide = lambda factor: factor.reshape(*factor.shape, *(1,) * (kernel_axes - 2))  # of a convolution of 1 x 1
        if "down_2" in parts:
            second = to_torch_layout(parts["down_2"])
            tensors = {
                "hada_w1_a": up,
                "hada_w1_b": flat(down),
                "hada_w2_a": parts["up_2"].T,
                "hada_w2_b": flat(second),
            }
        elif "gate_down" in parts:
            a1, a2 = parts["gate_up"].T, parts["gate_down"].T
            tensors = {"a1.weight": wide(a1), "a2.weight": wide(a2), "b1.weight": wide(up), "b2.weight": down}
        else:
            tensors = {"lora_down.weight": down, "lora_up.weight": wide(up)}
        tensors["alpha"] = alpha
    if "bias" in parts:
        tensors["b_norm" if kernel_axes == 1 and "diff" in parts else "diff_b"] = parts["bias"]
    if "magnitude" in parts:
        tensors["dora_scale"] = dora_scale(parts["magnitude"], kernel_axes)
    return LycorisAdapter(path, {key: np.asarray(tensor) for key, tensor in tensors.items()})


def dora_scale(magnitude: np.ndarray, axes: int) -> np.ndarray:
    """A magnitude [out] or [in, 1] in LyCORIS's shape for a kernel of this many axes: [out, 1, ...] or [1, in, ...]."""
    inputs = magnitude.ndim == 2
    return magnitude.reshape((1,) * inputs + (-1,) + (1,) * (axes - 1 - inputs))


def _lora(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    check_complete(adapter.tensors, {"down", "up"}, adapter.path)
    down = adapter.tensors["down"]
    scale = _scale(adapter, rank_of(down))
    if "lora_mid.weight" in adapter.tensors:
        down = _mixed(adapter.tensors["lora_mid.weight"], down, name)
    return from_torch(TorchAdapter(down, adapter.tensors["up"], scale), kernel, name)


def _loha(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    tensors = adapter.tensors
    check_complete(tensors, {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, adapter.path)
    factors = []
    for i in "12":
        up, down = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
        scale = _scale(adapter, len(down))
        if f"hada_t{i}" in tensors:
            up, down = up.T, _mixed(tensors[f"hada_t{i}"], down, name)
        factors.append(from_torch(TorchAdapter(_unflattened(down, kernel), up, scale), kernel, name))
    first, second = factors
    return {**first, "down_2": second["down"], "up_2": second["up"]}


def _lokr(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    tensors = {key: to_float32(tensor, name) for key, tensor in adapter.tensors.items() if key.startswith("lokr_")}
    _check(all(tensor.ndim > 1 for tensor in tensors.values()), name, tensors, kernel)
    parts: dict[str, np.ndarray] = {}
    shapes, r, inputs = [], 0, 1
    for i, axes in (("1", 2), ("2", len(kernel))):
        inner = (*kernel[: axes - 2], kernel[-2] // max(1, inputs), 0)  # the outputs of a factor do not matter here
        layout = lambda tensor, inner=inner: from_torch_layout(_unflattened(tensor, inner), len(inner))
        if f"lokr_w{i}" in tensors:
            parts[f"w{i}"] = layout(tensors[f"lokr_w{i}"])
            shapes.append(parts[f"w{i}"].shape)
        else:
            check_complete(tensors, {f"lokr_w{i}_a", f"lokr_w{i}_b"}, adapter.path)
            up, down = tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"]
            r = len(down)
            if core := f"lokr_t{i}" in tensors:
                up, down = up.T, _mixed(tensors[f"lokr_t{i}"], down, name)
            up, down = up.T, layout(down)
            _check(r > 0 and up.ndim == 2 and len(up) == down.shape[-1], name, tensors, kernel)
            parts |= {f"w{i}": down @ up} if core else {f"w{i}_down": down, f"w{i}_up": up}
            shapes.append((*down.shape[:-1], up.shape[-1]))
        inputs = shapes[-1][-2]
    w1, w2 = shapes
    fits = len(w1) == 2 and len(w2) == len(kernel)
    whole = (*w2[:-2], w1[0] * w2[-2], w1[1] * w2[-1]) if fits else ()
    _check(whole == kernel, name, tensors, kernel)
    scale = np.array(_scale(adapter, r) if r else 1, np.float32)
    return {**{part: np.ascontiguousarray(array) for part, array in parts.items()}, "scale": scale}


def _glora(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    tensors = adapter.tensors
    names = [f"{letter}.weight" for letter in ("a1", "a2", "b1", "b2")]
    check_complete(tensors, set(names), adapter.path)
    a1, a2, b1, b2 = (tensors[name] for name in names)
    if len(a1) != kernel[-2]:  # before version 2 of LyCORIS the names of the two factors were exchanged
        a1, a2, b1, b2 = a2, a1, b2, b1
    parts = from_torch(TorchAdapter(b2, b1, _scale(adapter, len(b2))), kernel, name)
    gate = from_torch(TorchAdapter(a2, a1, 1.0), (kernel[-2], kernel[-2]), name)
    return {**parts, "gate_down": gate["down"], "gate_up": gate["up"]}


def _full(adapter: LycorisAdapter, kernel: tuple[int, ...], name: str) -> dict[str, np.ndarray]:
    diff = adapter.tensors.get("w_norm", adapter.tensors.get("diff"))
    assert diff is not None
    diff = from_torch_layout(diff, len(kernel))
    _check(diff.shape == kernel, name, adapter.tensors, kernel)
    return {"diff": np.ascontiguousarray(to_float32(diff, name))}


_FORMS = {
    **dict.fromkeys(("down", "up", "lora_mid"), _lora),
    "hada_": _loha,
    "lokr_": _lokr,
    **dict.fromkeys(("a1.", "a2.", "b1.", "b2."), _glora),
    **dict.fromkeys(("diff", "w_norm"), _full),
}
"""The start of a tensor's name -> what makes the adapter of a layer that has such a tensor."""
FORM_NAMES = {
    "down": "LoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    **dict.fromkeys(("a1.", "b1."), "GLoRA"),
    **dict.fromkeys(("diff", "w_norm"), "full difference"),
}
"""The start of a tensor's name -> the kind of adapter."""


def _mixed(core: np.ndarray, inputs: np.ndarray, name: str) -> np.ndarray:
    """The convolution [R, in, h, w] that a Tucker core [R, R, h, w] and a factor of the inputs [R, in] make."""
    core, inputs = to_float32(core, name), to_float32(inputs, name)
    inputs = inputs.reshape(len(inputs), -1)
    if core.ndim != 4 or core.shape[1] != len(inputs):
        raise DataError(f"{name}: a Tucker core {list(core.shape)} for a factor {list(inputs.shape)}")
    return np.einsum("mnhw,ni->mihw", core, inputs)


def _unflattened(down: np.ndarray, kernel: tuple[int, ...]) -> np.ndarray:
    """A factor [R, in * h * w] in the shape [R, in, h, w] if the kernel is a convolution of this size."""
    if len(kernel) == 4 and down.ndim == 2 and down.shape[1] == kernel[2] * kernel[0] * kernel[1]:
        return down.reshape(len(down), kernel[2], *kernel[:2])
    return down


def _scale(adapter: LycorisAdapter, rank: int) -> float:
    alpha = alpha_of(adapter.tensors, adapter.path)
    return alpha / rank if alpha and rank else 1.0


def _check(fits: bool, name: str, tensors: Mapping[str, np.ndarray], kernel: tuple[int, ...]) -> None:
    if not fits:
        shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(tensors.items()))
        raise DataError(f"{name}: {shapes} for a kernel {list(kernel)}")
