"""The formulas of adapters: what they add to the output of a layer, and to its kernel."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sdjax import quantization
from sdjax.errors import ConfigError
from sdjax.trees import Path, Tree, layers, replaced


def adapted(
    adapter: Mapping[str, Any],
    x: Float[Array, "B ..."],
    y: Float[Array, "B ... D"],
    kernel: Float[Array, "*S D"],
    apply: Callable[[Array, Array], Array] = jnp.matmul,
) -> Float[Array, "B ... D"]:
    """Returns the output of a layer with its adapter: `y + scale * (x down) up`, or y if `adapter` is empty.

    x, y: the input of the layer and its output before the bias. kernel: W. apply(x, kernel): the product or convolution
    that the layer computes. Of LoHa the change of W is formed, and formed again in the backward pass in place of being
    kept. With DoRA the result is `m / |W + change|` times as large, and the norm counts as a constant
    in the gradient (Liu et al. 2024, eq. 11).
    """
    if not adapter:
        return y
    if "dropout_key" in adapter:
        x = _dropout(x, adapter["dropout_key"], adapter["keep"])
    weights = {name: leaf for name, leaf in adapter.items() if name not in _NOT_WEIGHTS}

    def formula(weights, x, y):
        if form(weights) == "LoRA":
            down, up, scale = (weights[name].astype(y.dtype) for name in ("down", "up", "scale"))
            y = y + apply(x, down) @ up * scale
        elif form(weights) == "LoKr":
            w1, w2 = (factor.astype(y.dtype) for factor in _kronecker_factors(weights))
            y = y + _kronecker(w1, w2, x, apply) * weights["scale"].astype(y.dtype)
        else:
            y = y + jax.checkpoint(lambda x, weights: apply(x, delta(weights).astype(y.dtype)))(x, weights)
        if "magnitude" not in weights:
            return y
        norm = jax.lax.stop_gradient(dora_norm(kernel, weights))
        return y * (weights["magnitude"] / norm).astype(y.dtype)

    if jnp.ndim(weights["scale"]) == 0:
        return formula(weights, x, y)
    return jax.vmap(lambda weights, x, y: formula(weights, x[None], y[None])[0])(weights, x, y)


def _dropout(x: Float[Array, "B ..."], keys: Key[Array, " B"], keep: Float[Array, ""]) -> Float[Array, "B ..."]:
    """Returns x with each number kept with probability `keep` and divided by it, else zero. keys: one an example."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def outputs(adapter: Mapping[str, Any], parts: int) -> list[Tree]:
    """Returns the adapters of a layer's outputs, cut into `parts` ranges of one length."""
    if form(adapter) == "LoKr":  # a range may begin within a block
        others = {name: leaf for name, leaf in adapter.items() if not name.startswith(("w1", "w2"))}
        adapter = {**others, "diff": delta(adapter), "scale": jnp.float32(1.0)}
    cut = {name: jnp.split(adapter[name], parts, axis=-1) for name in _OF_OUTPUTS & adapter.keys()}
    return [{**adapter, **{name: pieces[i] for name, pieces in cut.items()}} for i in range(parts)]


_OF_OUTPUTS = {"up", "up_2", "diff", "magnitude"}  # the arrays whose last axis is that of the outputs


def dora_norm(kernel: Float[Array, "*S D"], adapter: Mapping[str, Any]) -> Float[Array, " D"]:
    """Returns the norm of each output's adapted weight vector: `|W + change|` over all axes but the last."""
    changed = kernel.astype(jnp.float32) + delta(adapter)
    return jnp.sqrt(jnp.sum(jnp.square(changed), axis=tuple(range(kernel.ndim - 1))))


def form(adapter: Mapping[str, Any]) -> str:
    """Returns the name of the formula of an adapter, a key of `CHANGES`, whether or not it has magnitudes."""
    return next((name for leaf, name in _FORMS.items() if leaf in adapter), "full difference")


def kind(adapter: Mapping[str, Any]) -> str:
    """Returns the name of an adapter's kind, such as "LoRA" or "LoHa". With magnitudes it is "DoRA" whatever else."""
    return "DoRA" if "magnitude" in adapter else form(adapter)


def rank(adapter: Mapping[str, Any]) -> int | None:
    """Returns the rank R of an adapter; None for one that has none, such as a LoKr of two whole factors."""
    return next((adapter[leaf].shape[-1] for leaf in ("down", "w2_down", "w1_down") if leaf in adapter), None)


def delta(adapter: Mapping[str, Any], kernel: Float[Array, "*S D"] | None = None) -> Float[Array, "*S D"]:
    """Returns the change of the kernel before any magnitude, such as `scale * down up`, in its shape and in float32.

    kernel: W, which GLoRA's change depends on.
    """
    parts = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in adapter.items() if name not in _NOT_WEIGHTS}
    if kernel is not None:
        parts["kernel"] = jnp.asarray(kernel, jnp.float32)
    return CHANGES[form(adapter)](parts) * parts["scale"]


_NOT_WEIGHTS = {"dropout_key", "keep"}
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def _loha(parts: Mapping[str, Array]) -> Array:
    return _product(parts["down"], parts["up"]) * _product(parts["down_2"], parts["up_2"])


def _kronecker_factors(parts: Mapping[str, Array]) -> tuple[Array, Array]:
    """Returns the factors w1 and w2 of LoKr, each of which may be a product."""
    w1, w2 = (
        parts[name] if name in parts else _product(parts[f"{name}_down"], parts[f"{name}_up"]) for name in ("w1", "w2")
    )
    return w1, w2


def _kronecker(
    w1: Float[Array, "c a"],
    w2: Float[Array, "*S d b"],
    x: Float[Array, "B ... cd"],
    apply: Callable[[Array, Array], Array],
) -> Float[Array, "B ... ab"]:
    """Returns `apply(x, kron(w1, w2))`: w2 is applied to each of the c blocks of x, and w1 combines the results."""
    c, d = w1.shape[0], w2.shape[-2]
    blocks = jnp.moveaxis(x.reshape(*x.shape[:-1], c, d), -2, 1)
    done = apply(blocks.reshape(-1, *blocks.shape[2:]), w2)
    done = done.reshape(x.shape[0], c, *done.shape[1:])
    mixed = jnp.einsum("nc...b,ca->n...ab", done, w1)
    return mixed.reshape(*mixed.shape[:-2], -1)


def _lokr(parts: Mapping[str, Array]) -> Array:
    w1, w2 = _kronecker_factors(parts)
    blocks = w1[:, None, :, None] * w2[..., None, :, None, :]  # [.., c, d, a, b]
    return blocks.reshape(*w2.shape[:-2], w1.shape[0] * w2.shape[-2], w1.shape[1] * w2.shape[-1])


def _glora(parts: Mapping[str, Array]) -> Array:
    gate = _product(parts["gate_down"], _product(parts["gate_up"], parts["kernel"]))
    return _product(parts["down"], parts["up"]) + gate


CHANGES: dict[str, Callable[[Mapping[str, Array]], Array]] = {
    "LoRA": lambda parts: _product(parts["down"], parts["up"]),
    "LoHa": _loha,
    "LoKr": _lokr,
    "GLoRA": _glora,
    "full difference": lambda parts: parts["diff"],
}
"""Name of a formula -> the change of the kernel, before the scale, from the arrays of an adapter."""

# An array that only adapters of this form have -> the form. LoRA has none, and comes last.
_FORMS = {
    **{"diff": "full difference", "w1": "LoKr", "w1_down": "LoKr"},
    **{"down_2": "LoHa", "gate_down": "GLoRA", "down": "LoRA"},
}


def merge(params: Mapping[str, Any], lora: Mapping[str, Any], weight: float = 1.0) -> Tree:
    """Returns the parameters with an adapter tree merged: `W + weight * scale * down up`, computed in float32.

    A DoRA layer becomes `W + weight * (m V / |V| - W)` with `V = W + scale * down up`: weight 0 gives the base model,
    weight 1 the trained one. Raises ConfigError for a layer that the parameters lack, and for a kernel in int8.
    """
    found = adaptable(params)
    merged = {}
    for path, adapter in layers(lora, "scale"):
        if path not in found:
            raise ConfigError(f"the adapter has a layer the model lacks: {'/'.join(path)}")
        if quantization.STEP in found[path]:
            raise ConfigError(f"{'/'.join(path)} is in int8, which would lose the change: keep the adapter beside it")
        for leaf, change in changes(found[path], adapter, "/".join(path)).items():
            merged[*path, leaf] = merge_leaf(found[path][leaf], change, weight)
    return replaced(params, merged)


def adaptable(params: Mapping[str, Any]) -> dict[Path, Tree]:
    """Returns the layers that adapters can change, by their path: those with a kernel, and norms, with a scale."""
    return dict([*layers(params, "kernel"), *layers(params, "scale")])


def changes(layer: Mapping[str, Any], adapter: Mapping[str, Any], name: str) -> dict[str, Tree]:
    """Returns the changes that the adapter of a layer makes, by the leaf that it changes, for `merge_leaf`.

    name: of the layer. Raises ConfigError for the change of a bias that the layer does not have.
    """
    changed = {}
    if adapter.keys() - {"bias", "scale"}:
        leaf = "kernel" if "kernel" in layer else "scale"
        changed[leaf] = {part: value for part, value in adapter.items() if part != "bias"}
    if "bias" in adapter:
        if "bias" not in layer:
            raise ConfigError(f"the adapter changes the bias of {name}, which has none")
        changed["bias"] = {"diff": adapter["bias"], "scale": jnp.float32(1.0)}
    return changed


@jax.jit  # one small program for each shape, where its operations one by one are four
def merge_leaf(kernel: Array, adapter: Tree, weight: float) -> Array:
    """Returns a kernel, or another leaf, with its change merged; see `merge`."""
    wide = kernel.astype(jnp.float32)
    change = delta(adapter, wide)
    if "magnitude" in adapter:
        changed = wide + change
        kept = kernel.ndim - jnp.ndim(adapter["magnitude"])  # the axis of the outputs, or that of the inputs
        others = tuple(axis for axis in range(kernel.ndim) if axis != kept)
        norm = jnp.sqrt(jnp.sum(jnp.square(changed), axis=others, keepdims=True))
        change = changed * (adapter["magnitude"] / norm) - wide
    return (wide + jnp.asarray(weight, jnp.float32) * change).astype(kernel.dtype)
