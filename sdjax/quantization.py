"""Frozen weights in eight bits: a kernel as whole numbers, with one step for each output of its layer.

A layer in this form has an int8 `kernel` [.., in, out] and a `kernel_step` [out], float32, and stands for the weights
`W = kernel * kernel_step`. The step is the largest absolute weight of the output divided by 127, so each weight is at
most half a step from its own value. This is the absmax quantization, one scale a channel, of Dettmers et al. 2022
("LLM.int8()", section 2.1) and Jacob et al. 2018. The weights are one byte each in memory, and are turned to the number
type of the computation where a product needs them.

A change smaller than half a step would be lost in such a kernel. So nothing is merged into one: LoRAs that belong to
the base are merged before, all others stay beside it (`Model.with_lora`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from sdjax.trees import Tree, layers, leaves, nest

STEP = "kernel_step"
"""Name of the leaf that holds the steps of a kernel in int8."""

_WHOLE = re.compile(r"^conv_(in|out)$")
"""Layers of the U-Net that keep their weights: the first and the last convolution are small, and their rounding errors
would reach every picture as they are."""


def quantized(params: Mapping[str, Any]) -> Tree:
    """Returns the parameters of a U-Net with the kernels of all layers but the first and the last in int8."""
    flat = dict(leaves(params))
    for path, layer in layers(params, "kernel"):
        if not _WHOLE.search(path[0]):
            flat[*path, "kernel"], flat[*path, STEP] = rounded(layer["kernel"])
    return nest(flat)


def is_quantized(params: Mapping[str, Any]) -> bool:
    """Whether any kernel among the parameters is in int8."""
    return next(layers(params, STEP), None) is not None


@jax.jit
def rounded(kernel: Float[Array, "*S D"]) -> tuple[Int8[Array, "*S D"], Float[Array, " D"]]:
    """Returns a kernel in int8 and its steps. An output whose weights are all 0 has step 1."""
    wide = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=tuple(range(kernel.ndim - 1)))
    step = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.rint(wide / step).astype(jnp.int8), step


def weights(layer: Mapping[str, Any]) -> Float[Array, "*S D"]:
    """Returns the kernel of a layer: as it is, or from int8 in float32."""
    return layer["kernel"].astype(jnp.float32) * layer[STEP] if STEP in layer else layer["kernel"]


def applied(
    apply: Callable[[Array, Array], Array], x: Float[Array, "B ..."], layer: Mapping[str, Any], dtype: Any
) -> Float[Array, "B ... D"]:
    """Returns `apply(x, W)` with the weights W of a layer in this number type.

    layer: `kernel` and, if that is in int8, `kernel_step`. Then the backward pass makes W again. Kept from the forward
    pass, the weights of all layers would take the memory that int8 saves.
    """
    if STEP not in layer:
        return apply(x, layer["kernel"].astype(dtype))
    return jax.checkpoint(lambda x, layer: apply(x, weights(layer).astype(dtype)))(x, dict(layer))
