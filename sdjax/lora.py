"""LoRA, DoRA and their relatives: their formulas, and functions that make, merge and add adapter trees.

An adapter changes the kernel W of one layer to `W + scale * down up` (LoRA, Hu et al. 2021, eq. 3). Given a layer's
input x and its output y, `adapted` computes what the changed kernel would give, without forming it. `merge` forms it.

The adapter of one layer is a dict of arrays:

    linear       down [in, R]           up [R, out]   scale []
    convolution  down [kh, kw, in, R]   up [R, out]   scale []

DoRA adds `magnitude` [out]: each output's weight vector is scaled to this norm (Liu et al. 2024, eq. 5). A leading axis
on every array gives each example of a batch its adapter, see `stack`.

LyCORIS (Yeh et al. 2024) has other adapters. Their changes of W [.., in, out] are:

    LoHa     down, up, down_2 [.., in, R], up_2 [R, out]            scale * (down up) * (down_2 up_2), by elements
    LoKr     w1 [c, a]   w2 [.., d, b]; in = c d, out = a b         scale * kron(w1, w2)
    GLoRA    down, up, gate_down [in, R], gate_up [R, in]           scale * (down up + gate_down gate_up W)
    full     diff [.., in, out]                                     scale * diff

Either factor of LoKr may be a product: w1 of `w1_down` [c, R] and `w1_up` [R, a], w2 of `w2_down` [.., d, R] and
`w2_up` [R, b]. LoHa and LoKr can be trained, GLoRA and full differences only merged.

Any of them may have a `magnitude`, which is [in, 1] if it scales the weights of each input (such a layer is only
merged), and `bias` [out], which is added to the layer's bias. A norm is adapted by `diff` and `bias` alone.

An adapter tree has the nesting of the parameters that it adapts, with the adapter of a layer where the parameters have
`kernel` and `bias`. The layers of `sdjax.models` find it in the Flax collection `lora`.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sdjax import quantization
from sdjax.errors import ConfigError
from sdjax.settings import LoraKind, LoraTargets, read_value
from sdjax.trees import Path, Tree, layers, leaves, nest, replaced

# ------------------------------------------------------------------------------------------------ the formula


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


# ------------------------------------------------------------------------------------------------ new adapters

_ATTENTION = r"(to_q|to_k|to_v|to_out_0|q_proj|k_proj|v_proj|out_proj)$"
_FEED_FORWARD = r"(ff/net_0/proj|ff/net_2|mlp/fc1|mlp/fc2)$"
_NOT_TEXT_PROJECTION = r"^(?!text_projection$)"

TARGETS: dict[LoraTargets, tuple[tuple[str, ...], bool]] = {
    "attention": ((_ATTENTION,), False),
    "attention+ff": ((_ATTENTION, _FEED_FORWARD), False),
    "transformer": ((_ATTENTION, _FEED_FORWARD, r"attentions_\d+/proj_(in|out)$"), True),
    "locon": ((r"(attentions|resnets|downsamplers|upsamplers)_\d+/", r"(self_attn|mlp)/"), True),
    "linear": ((_NOT_TEXT_PROJECTION,), False),
    "all": ((_NOT_TEXT_PROJECTION,), True),
}
"""Preset of `lora_targets` -> the layers to adapt, as regular expressions that search the path of a layer, and whether
convolutions are adapted too.

"transformer" is the default set of kohya's scripts, "locon" their set with `conv_dim`. "linear" and "all" also have the
layers outside the blocks of the U-Net: the time embedding, SDXL's added embedding, and in "all" the first and the last
convolution. kohya's scripts leave these layers out, and drop them from a file without a word.
"""


def targets(params: Mapping[str, Any], which: str | Sequence[str] = "attention") -> dict[Path, Any]:
    """Returns the kernels to adapt, by the path of their layer.

    which: the name of a preset, or regular expressions that search paths written `a/b/c`. Raises ConfigError for a name
    that is no preset, for a wrong regular expression, and if no layer matches.
    """
    if isinstance(which, str):
        preset: LoraTargets = read_value(LoraTargets, which, "lora_targets")
        patterns, convolutions = TARGETS[preset]
    else:
        patterns, convolutions = tuple(which), True
    try:
        matchers = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(f"lora_targets: {error.pattern!r} is no regular expression: {error}") from error
    kernels = {}
    for path, layer in layers(params, "kernel"):
        linear = layer["kernel"].ndim == 2
        if (linear or convolutions) and any(matcher.search("/".join(path)) for matcher in matchers):
            kernels[path] = quantization.weights(layer)
    if not kernels:
        raise ConfigError(f"lora_targets = {which!r} matches no layer")
    return kernels


def init(
    key: PRNGKeyArray,
    params: Mapping[str, Any],
    *,
    rank: int,
    kind: LoraKind = "lora",
    factor: int | None = None,
    alpha: float | None = None,
    which: str | Sequence[str] = "attention",
    ranks: Mapping[str, int] | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> Tree:
    """Returns a new adapter tree for the parameters of one model, which leaves the model's output as it is.

    All arrays are float32, and begin as `NEW` says. which: see `targets`. ranks: regular expression that searches
    `a/b/c` paths -> rank of the layers it matches, 0 to leave them out; the first match counts, and `rank` is for the
    rest. factor: see `factors`. alpha: by default the rank. The scale is alpha / R, or alpha / sqrt(R) with `rslora`
    (Kalajdzievski 2023), and 1 for a LoKr of two whole factors.
    dora: adds magnitudes, which start as the norms of the base (Liu et al. 2024).
    Raises ConfigError for a negative rank, and the errors of `targets`.
    """
    first, draw = NEW[kind]
    chosen = []
    for path, kernel in targets(params, which).items():
        r = next((r for pattern, r in (ranks or {}).items() if re.search(pattern, "/".join(path))), rank)
        if r < 0:
            raise ConfigError(f"rank {r} for {'/'.join(path)}: a rank is 1 or more, or 0 to leave the layer out")
        if r > 0:
            chosen.append((path, kernel, r, first(kernel.shape, r, factor)))
    # One draw for all layers. A draw for each layer would take XLA as long to compile as a training step.
    sizes = [math.prod(leaf.shape) for *_, new in chosen for leaf in new.values() if leaf.divisor]
    numbers = draw(key, (sum(sizes),), jnp.float32)
    pieces = (numbers[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True))
    adapters = {}
    for path, kernel, r, new in chosen:
        begin = lambda leaf: next(pieces).reshape(leaf.shape) / leaf.divisor if leaf.divisor else jnp.zeros(leaf.shape)
        adapters[path] = {name: begin(leaf) for name, leaf in new.items()}
        scale = (r if alpha is None else alpha) / (math.sqrt(r) if rslora else r)
        adapters[path]["scale"] = jnp.float32(1.0 if {"w1", "w2"} <= new.keys() else scale)
        if dora:
            adapters[path]["magnitude"] = dora_norm(kernel, adapters[path])
    return nest(adapters)


class First(NamedTuple):
    """How an array of an adapter begins: as random numbers divided by `divisor`, or as zeros if that is None."""

    shape: tuple[int, ...]
    divisor: float | None


def _first_lora(kernel: tuple[int, ...], r: int, _: int | None) -> dict[str, First]:
    return {"down": First((*kernel[:-1], r), math.sqrt(r)), "up": First((r, kernel[-1]), None)}


def _first_loha(kernel: tuple[int, ...], r: int, _: int | None) -> dict[str, First]:
    down, up = (*kernel[:-1], r), (r, kernel[-1])
    return {"down": First(down, 1.0), "up": First(up, 10.0), "down_2": First(down, 1.0), "up_2": First(up, None)}


def _first_lokr(kernel: tuple[int, ...], r: int, factor: int | None) -> dict[str, First]:
    (c, d), (a, b) = (factors(size, factor) for size in kernel[-2:])
    w1 = {"w1": First((c, a), math.sqrt(c))}
    if 2 * r >= max(d, b):  # a product of this rank would hold hardly less than the whole factor
        return w1 | {"w2": First((*kernel[:-2], d, b), None)}
    return w1 | {"w2_down": First((*kernel[:-2], d, r), None), "w2_up": First((r, b), math.sqrt(r))}


NEW: dict[LoraKind, tuple[Callable[[tuple[int, ...], int, int | None], dict[str, First]], Callable[..., Array]]] = {
    "lora": (_first_lora, jax.random.normal),
    "loha": (_first_loha, jax.random.normal),
    "lokr": (_first_lokr, functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)),
}
"""Kind -> how its arrays begin, from the shape of the kernel, the rank and the factor; and what draws the numbers.

down ~ N(0, 1/R) and up = 0 in LoRA. LoHa and LoKr begin as in LyCORIS: down and down_2 ~ N(0, 1), up ~ N(0, 0.01) and
up_2 = 0; w1 and w2_up uniform within 1 / sqrt(their inputs), the rest of the second factor 0.
"""


def factors(size: int, factor: int | None = None) -> tuple[int, int]:
    """Returns the sizes, the smaller first, of the two factors of LoKr along an axis of this size (LyCORIS' rule).

    factor: the size of one of them if it divides `size`. Otherwise the first is the largest divisor up to `factor` and
    up to the root of `size`; without `factor` the two are as near to each other as can be.
    """
    if factor is None or size % factor:
        most = min(factor or size, math.isqrt(size))
        factor = next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)
    return min(factor, size // factor), max(factor, size // factor)


# ------------------------------------------------------------------------------------------------ several adapters


def add(weighted: Sequence[tuple[Mapping[str, Any], float]]) -> Tree:
    """Returns one adapter tree equal to the sum of several, each times its weight.

    A layer that several trees adapt gets their downs and ups side by side along the rank, with the scales and weights
    in `up`. For A of rank 4, B of rank 8 and C, which are adapters of layers 320 -> 320:

        add([({"to_q": A}, 0.5), ({"to_q": B, "to_k": C}, 1.0)]) == {
            "to_q": {
                "down": concatenate([A["down"], B["down"]], axis=1),  # [320, 12]
                "up": concatenate([0.5 * A["scale"] * A["up"], B["scale"] * B["up"]]),  # [12, 320]
                "scale": 1.0,
            },
            "to_k": {"down": C["down"], "up": C["up"], "scale": 1.0 * C["scale"]},
        }

    Raises ConfigError for a DoRA layer that is in more than one tree, or has a weight other than 1, and for a layer of
    another kind than LoRA that is in more than one tree. The sum would not be a layer of this kind. `merge` such trees
    one after the other.
    """
    gathered: dict[Path, list[Tree]] = {}
    for lora, weight in weighted:
        for path, adapter in layers(lora, "scale"):
            if "magnitude" not in adapter:
                scaled = {name: jnp.asarray(adapter[name]) * jnp.float32(weight) for name in _SCALED & adapter.keys()}
                adapter = {**adapter, **scaled}
            elif weight != 1.0:
                raise ConfigError(f"{'/'.join(path)}: a DoRA layer cannot be weighted without merging it")
            gathered.setdefault(path, []).append(adapter)
    return nest({path: _concatenate(path, adapters) for path, adapters in gathered.items()})


def _concatenate(path: Path, adapters: Sequence[Tree]) -> Tree:
    """Returns the sum of the adapters of one layer."""
    if len(adapters) == 1:
        return adapters[0]
    if kinds := _other_kinds(adapters):
        raise ConfigError(f"{'/'.join(path)}: a {kinds} layer cannot be added to another adapter without merging it")
    ups = [a["up"] * jnp.asarray(a["scale"])[..., None, None] for a in adapters]
    return {
        "down": jnp.concatenate([a["down"] for a in adapters], axis=-1),
        "up": jnp.concatenate(ups, axis=-2),
        "scale": jnp.ones(jnp.shape(adapters[0]["scale"]), jnp.float32),
    }


_SCALED = {"scale", "bias"}  # what a weight multiplies


def _other_kinds(adapters: Sequence[Mapping[str, Any]]) -> str:
    """Returns the kinds of these adapters that are not plain LoRA, in words; empty if there are none."""
    others = [adapter for adapter in adapters if adapter.keys() - {"down", "up", "scale"}]
    return ", ".join(dict.fromkeys(f"{kind(adapter)}" for adapter in others))


def stack(loras: Sequence[Mapping[str, Any]]) -> Tree:
    """Returns one adapter tree for a batch of `len(loras)` examples: example i uses tree i.

    The result has every layer that any of the trees adapts, and a new first axis on every array. Zeros pad each rank
    to the largest, and stand for the layers that a tree leaves out. For adapters A, B and C of ranks 4, 8 and 2, of
    layers 320 -> 320, these are the shapes:

        stack([{"to_q": A}, {"to_q": B, "to_k": C}]) == {
            "to_q": {"down": [2, 320, 8], "up": [2, 8, 320], "scale": [2]},
            "to_k": {"down": [2, 320, 2], "up": [2, 2, 320], "scale": [2]},
        }

    Raises ConfigError for layers of other kinds than LoRA.
    """
    flat = [dict(layers(lora, "scale")) for lora in loras]
    stacked = {}
    for path in dict.fromkeys(path for adapters in flat for path in adapters):
        present = [adapters[path] for adapters in flat if path in adapters]
        if kinds := _other_kinds(present):
            raise ConfigError(f"{'/'.join(path)}: {kinds} layers cannot be stacked")
        rank = max(adapter["down"].shape[-1] for adapter in present)
        like = present[0]
        empty = {
            "down": jnp.zeros((*like["down"].shape[:-1], rank), jnp.float32),
            "up": jnp.zeros((rank, like["up"].shape[-1]), jnp.float32),
            "scale": jnp.float32(0.0),
        }
        padded = [_pad_rank(adapters[path], rank) if path in adapters else empty for adapters in flat]
        stacked[path] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *padded)
    return nest(stacked)


def stacked(lora: Mapping[str, Any]) -> int:
    """Returns for how many examples `stack` made an adapter tree; 0 for one of a single adapter, or an empty one."""
    scales = [jnp.shape(adapter["scale"]) for _, adapter in layers(lora, "scale")]
    return scales[0][0] if scales and scales[0] else 0


def _pad_rank(adapter: Tree, rank: int) -> Tree:
    """Returns the adapter of one layer with zeros up to this rank."""
    extra = rank - adapter["down"].shape[-1]
    down = jnp.pad(adapter["down"], [(0, 0)] * (adapter["down"].ndim - 1) + [(0, extra)])
    return {"down": down, "up": jnp.pad(adapter["up"], ((0, extra), (0, 0))), "scale": jnp.asarray(adapter["scale"])}


# ------------------------------------------------------------------------------------------------ training


def split(lora: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Returns the arrays that an optimizer may change, such as down and up, and those that it may not (scale).

        split({"to_q": {"down": d, "up": u, "scale": s}}) == ({"to_q": {"down": d, "up": u}}, {"to_q": {"scale": s}})

    `join` is the inverse.
    """
    trained = map_layers(lambda a: {name: leaf for name, leaf in a.items() if name != "scale"}, lora)
    return trained, map_layers(lambda a: {"scale": a["scale"]}, lora)


def join(trained: Mapping[str, Any], scales: Mapping[str, Any]) -> Tree:
    """Returns one adapter tree from the two that `split` returns.

    join({"to_q": {"down": d, "up": u}}, {"to_q": {"scale": s}}) == {"to_q": {"down": d, "up": u, "scale": s}}
    """
    return nest({**dict(leaves(trained)), **dict(leaves(scales))})


def with_dropout(lora: Mapping[str, Any], rate: float, keys: Key[Array, " B"]) -> Tree:
    """Returns the adapter tree for one training step with dropout of the input of every adapter.

    rate: in [0, 1). keys: one for each of the B examples. Each layer gets `keep` [] and `dropout_key` [B]:

        {"to_q": {"down": d, "up": u, "scale": s, "keep": 1 - rate, "dropout_key": keys of this layer}}
    """
    return nest(
        {
            path: {
                **adapter,
                "keep": jnp.float32(1.0 - rate),
                "dropout_key": jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys),
            }
            for i, (path, adapter) in enumerate(layers(lora, "scale"))
        }
    )


def map_layers(function: Callable[[Tree], Tree], lora: Mapping[str, Any]) -> Tree:
    """Returns the adapter tree with `function` applied to the adapter of every layer."""
    return nest({path: function(layer) for path, layer in layers(lora, "scale")})
