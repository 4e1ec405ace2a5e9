"""LoRA as a function of parameter trees: make, merge, add up and extract adapters; no module is touched.

An adapter tree has the nesting of the parameters it adapts, down to the layer, which then holds
`{"down", "up", "scale"}` (and `magnitude` for DoRA) instead of `kernel`:

    linear       down [in, R]           up [R, out]   scale []
    convolution  down [kh, kw, in, R]   up [R, out]   scale []

and stands for `W' = W + scale * down up` (Hu et al. 2021, eq. 3). A leading axis on every leaf gives each example of
a batch its own adapter. The layers of `sdjax.models` apply it when it is passed as the `lora` collection.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sdjax.errors import ConfigError
from sdjax.settings import LoraTargets
from sdjax.trees import Path, Tree, layers, nest, replaced

_ATTENTION = r"(to_q|to_k|to_v|to_out_0|q_proj|k_proj|v_proj|out_proj)$"
_FEED_FORWARD = r"(ff/net_0/proj|ff/net_2|mlp/fc1|mlp/fc2)$"
_NOT_TEXT_PROJECTION = r"^(?!text_projection$)"

# What each preset of `lora_targets` adapts: regular expressions over a layer's path, and whether convolutions count.
# "transformer" is kohya's default set, "conv" its LoCon set.
TARGETS: dict[LoraTargets, tuple[tuple[str, ...], bool]] = {
    "attention": ((_ATTENTION,), False),
    "attention+ff": ((_ATTENTION, _FEED_FORWARD), False),
    "transformer": ((_ATTENTION, _FEED_FORWARD, r"attentions_\d+/proj_(in|out)$"), True),
    "linear": ((_NOT_TEXT_PROJECTION,), False),
    "conv": ((_NOT_TEXT_PROJECTION,), True),
}


def map_layers(function: Callable[[Tree], Tree], lora: Mapping[str, Any]) -> Tree:
    """The adapter tree with `function` applied to every layer's adapter."""
    return nest({path: function(layer) for path, layer in layers(lora, "down")})


def targets(params: Mapping[str, Any], which: str | Sequence[str] = "attention") -> dict[Path, Any]:
    """The kernels to adapt, by layer path: a preset's name, or regular expressions searched in `a/b/c` paths.

    Raises ConfigError for a name that is no preset, and when nothing matches.
    """
    if isinstance(which, str):
        if which not in TARGETS:
            raise ConfigError(
                f"lora_targets = {which!r}: choices are {', '.join(TARGETS)}, or a list of regular expressions"
            )
        patterns, convolutions = TARGETS[which]
    else:
        patterns, convolutions = tuple(which), True
    try:
        matchers = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ConfigError(f"lora_targets: {error.pattern!r} is no regular expression: {error}") from error
    found = {}
    for path, layer in layers(params, "kernel"):
        linear = layer["kernel"].ndim == 2
        if (linear or convolutions) and any(matcher.search("/".join(path)) for matcher in matchers):
            found[path] = layer["kernel"]
    if not found:
        raise ConfigError(f"lora_targets = {which!r} matches no layer")
    return found


def init(
    key: PRNGKeyArray,
    params: Mapping[str, Any],
    *,
    rank: int,
    alpha: float | None = None,
    which: str | Sequence[str] = "attention",
    ranks: Mapping[str, int] | None = None,
    rslora: bool = False,
    dora: bool = False,
) -> Tree:
    """A new adapter for one model's parameters; with it the model computes exactly what it did.

    down ~ N(0, 1/R), up = 0. alpha: default the rank. ranks: regular expression over `a/b/c` paths -> rank of its own
    (0 leaves the layer out; the first match counts). rslora: scale alpha / sqrt(R) (Kalajdzievski 2023) instead of
    alpha / R. dora: adds the magnitude vector, the norms of the base (Liu et al. 2024). All leaves float32.
    """
    from sdjax.models.layers import dora_norm

    chosen = []
    for path, kernel in targets(params, which).items():
        own = next((r for pattern, r in (ranks or {}).items() if re.search(pattern, "/".join(path))), rank)
        if own < 0:
            raise ConfigError(f"rank {own} for {'/'.join(path)}: a rank is 1 or more, or 0 to leave the layer out")
        if own > 0:
            chosen.append((path, kernel, own))
    # One draw for all layers: with one each, they take XLA as long to compile as a training step.
    sizes = [math.prod(kernel.shape[:-1]) * own for _, kernel, own in chosen]
    normal = jax.random.normal(key, (sum(sizes),), jnp.float32)
    adapters = {}
    for (path, kernel, own), size, end in zip(chosen, sizes, itertools.accumulate(sizes), strict=True):
        down = normal[end - size : end].reshape(*kernel.shape[:-1], own) / math.sqrt(own)
        up = jnp.zeros((own, kernel.shape[-1]), jnp.float32)
        scale = jnp.float32((own if alpha is None else alpha) / (math.sqrt(own) if rslora else own))
        adapters[path] = {"down": down, "up": up, "scale": scale}
        if dora:
            adapters[path]["magnitude"] = dora_norm(kernel, down, up, scale)
    return nest(adapters)


def delta(adapter: Mapping[str, Array]) -> Float[Array, "*S D"]:
    """`scale * down up`, in the kernel's shape, float32."""
    product = jnp.matmul(
        adapter["down"].astype(jnp.float32), adapter["up"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return product * jnp.asarray(adapter["scale"], jnp.float32)


def merge(params: Mapping[str, Any], lora: Mapping[str, Any], weight: float = 1.0) -> Tree:
    """The parameters with the adapter folded in: `W + weight * scale * down up`, computed in float32.

    A DoRA layer becomes `W + weight * (m V / |V| - W)` with `V = W + scale * down up`, so that weight 0 is the base
    model and weight 1 the trained one.
    """
    flat = dict(layers(params, "kernel"))
    for path, adapter in layers(lora, "down"):
        if path not in flat:
            raise ConfigError(f"the adapter has a layer the model lacks: {'/'.join(path)}")
        flat[path] = {**flat[path], "kernel": _merge_layer(flat[path]["kernel"], adapter, weight)}
    return replaced(params, {(*path, "kernel"): layer["kernel"] for path, layer in flat.items()})


@jax.jit  # one small program for each shape, where its operations one by one are four
def _merge_layer(kernel: Array, adapter: Tree, weight: float) -> Array:
    from sdjax.models.layers import dora_norm

    change = delta(adapter)
    if "magnitude" in adapter:
        adapted = kernel.astype(jnp.float32) + change
        gain = adapter["magnitude"] / dora_norm(kernel, adapter["down"], adapter["up"], adapter["scale"])
        change = adapted * gain - kernel.astype(jnp.float32)
    merged = kernel.astype(jnp.float32) + jnp.asarray(weight, jnp.float32) * change
    return merged.astype(kernel.dtype)


def add(weighted: Sequence[tuple[Mapping[str, Any], float]]) -> Tree:
    """One adapter equal to the sum of several, each times its weight: concatenation along the rank axis.

    Exact for LoRA. Raises ConfigError for DoRA layers present in more than one, or weighted other than 1: their sum
    is no DoRA layer; `merge` those one after the other.
    """
    gathered: dict[Path, list[Tree]] = {}
    for lora, weight in weighted:
        for path, adapter in layers(lora, "down"):
            if "magnitude" not in adapter:
                adapter = {**adapter, "scale": jnp.asarray(adapter["scale"]) * jnp.float32(weight)}
            elif weight != 1.0:
                raise ConfigError(f"{'/'.join(path)}: a DoRA layer cannot be weighted without merging it")
            gathered.setdefault(path, []).append(adapter)
    return nest({path: _concatenate(path, adapters) for path, adapters in gathered.items()})


def _concatenate(path: Path, adapters: Sequence[Tree]) -> Tree:
    if len(adapters) == 1:
        return adapters[0]
    if any("magnitude" in adapter for adapter in adapters):
        raise ConfigError(f"{'/'.join(path)}: a DoRA layer cannot be added to another adapter without merging it")
    ups = [a["up"] * jnp.asarray(a["scale"])[..., None, None] for a in adapters]
    return {
        "down": jnp.concatenate([a["down"] for a in adapters], axis=-1),
        "up": jnp.concatenate(ups, axis=-2),
        "scale": jnp.ones(jnp.shape(adapters[0]["scale"]), jnp.float32),
    }


def stack(loras: Sequence[Mapping[str, Any]]) -> Tree:
    """One adapter a picture: a tree with a leading batch axis, for a batch of `len(loras)` examples.

    Every layer adapted by any of them is in the result; ranks are padded with zeros to the largest.
    """
    flat = [dict(layers(lora, "down")) for lora in loras]
    stacked = {}
    for path in dict.fromkeys(path for adapters in flat for path in adapters):
        present = [adapters[path] for adapters in flat if path in adapters]
        if any("magnitude" in adapter for adapter in present):
            raise ConfigError(f"{'/'.join(path)}: DoRA layers cannot be stacked")
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


def _pad_rank(adapter: Tree, rank: int) -> Tree:
    extra = rank - adapter["down"].shape[-1]
    down = jnp.pad(adapter["down"], [(0, 0)] * (adapter["down"].ndim - 1) + [(0, extra)])
    return {"down": down, "up": jnp.pad(adapter["up"], ((0, extra), (0, 0))), "scale": jnp.asarray(adapter["scale"])}


def extract(
    tuned: Mapping[str, Any], base: Mapping[str, Any], *, rank: int, which: str | Sequence[str] = "attention"
) -> Tree:
    """The best adapter of the given rank for `tuned - base`, layer by layer: truncated SVD (Eckart and Young 1936)."""
    kernels = targets(base, which)
    adapters = {}
    for path, layer in layers(tuned, "kernel"):
        if path in kernels:
            kernel = kernels[path]
            change = layer["kernel"].astype(jnp.float32) - kernel.astype(jnp.float32)
            u, s, v = jnp.linalg.svd(change.reshape(-1, kernel.shape[-1]), full_matrices=False)
            root = jnp.sqrt(s[:rank])
            down = (u[:, :rank] * root).reshape(*kernel.shape[:-1], -1)
            adapters[path] = {"down": down, "up": root[:, None] * v[:rank], "scale": jnp.float32(1.0)}
    return nest(adapters)


def split(lora: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """What an optimizer may move (down, up, magnitude) and what it may not (scale); `join` puts them together again."""
    trained = map_layers(lambda a: {name: leaf for name, leaf in a.items() if name != "scale"}, lora)
    return trained, map_layers(lambda a: {"scale": a["scale"]}, lora)


def join(trained: Mapping[str, Any], scales: Mapping[str, Any]) -> Tree:
    """The inverse of `split`."""
    flat = dict(layers(scales, "scale"))
    return nest({path: {**layer, **flat[path]} for path, layer in layers(trained, "down")})


def with_dropout(lora: Mapping[str, Any], rate: float, keys: Key[Array, " B"]) -> Tree:
    """The adapter with dropout of its input (rate in [0, 1)), one key an example, for one training step."""
    return nest(
        {
            path: {
                **adapter,
                "keep": jnp.float32(1.0 - rate),
                "dropout_key": jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys),
            }
            for i, (path, adapter) in enumerate(layers(lora, "down"))
        }
    )
