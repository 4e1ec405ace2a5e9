"""Adapter trees as a whole: sums, batches of several, and what an optimizer sees of one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sdjax.errors import ConfigError
from sdjax.lora.formulas import kind
from sdjax.trees import Path, Tree, layers, leaves, nest


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
