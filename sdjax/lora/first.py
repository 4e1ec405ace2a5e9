"""New adapters: which layers get one, and how its arrays begin."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from sdjax import quantization
from sdjax.errors import ConfigError
from sdjax.lora.formulas import dora_norm
from sdjax.settings import LoraKind, LoraTargets, read_value
from sdjax.trees import Path, Tree, layers, nest

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
