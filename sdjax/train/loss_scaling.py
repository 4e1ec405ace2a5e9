"""Dynamic loss scaling, for training in float16 (Micikevicius et al. 2018, section 3.2).

float16 has no numbers between 0 and 6e-8 and none above 65504. Most gradients of a diffusion model are so small that
they would become 0 in the backward pass. So the loss is multiplied by a scale before it is differentiated, and the
gradients are divided by it in float32. A scale that is too large makes gradients overflow: such a step is skipped and
halves the scale. After many good steps in a row the scale is doubled. The numbers are those of PyTorch's
`torch.amp.GradScaler`, and so is the course of the scale, except that it does not fall below 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sdjax.train.config import Stage

FIRST = 2.0**16
"""The scale of the first step."""
GROWTH, GROWTH_INTERVAL = 2.0, 2000
"""The scale is multiplied by GROWTH after GROWTH_INTERVAL good steps in a row."""
BACKOFF = 0.5
"""The scale is multiplied by this after an overflow."""
SMALLEST = 1.0
"""The scale does not fall below this. Gradients that overflow with it are too large, and no scale is to blame."""


class Scaler(NamedTuple):
    """The state of loss scaling, a part of the training state."""

    scale: Float[Array, ""]
    """What the loss of the next step is multiplied by: a power of two, so that scaling does not round."""
    good: Int[Array, ""]
    """Good steps since the scale last changed or a gradient last overflowed."""
    skipped: Int[Array, ""]
    """Steps of the stage so far that were skipped, for whatever reason."""


def is_needed(dtype: str | jnp.dtype, stage: Stage) -> bool:
    """Returns whether a stage scales its loss. dtype: that of the run, in which all models but the VAE compute.

    A stage that trains the VAE does not: with float16 the VAE computes in float32.
    """
    return jnp.dtype(dtype) == jnp.float16 and "vae" not in stage.parts


def first() -> Scaler:
    """Returns the state before the first step of a stage."""
    return Scaler(jnp.float32(FIRST), jnp.int32(0), jnp.int32(0))


def value_and_grad(
    loss_of: Callable[..., Float[Array, ""]], scaler: Scaler | None
) -> Callable[..., tuple[Float[Array, ""], PyTree]]:
    """Returns `jax.value_and_grad(loss_of)`, computed with the loss scaled. Loss and gradients come unscaled, float32.

    The gradients are by the first argument. Without a scaler this is `jax.value_and_grad` itself.
    """
    if scaler is None:
        return jax.value_and_grad(loss_of)

    def scaled(trainable: PyTree, *others: PyTree) -> tuple[Float[Array, ""], Float[Array, ""]]:
        loss = loss_of(trainable, *others)
        return loss * scaler.scale, loss

    def unscaled(trainable: PyTree, *others: PyTree) -> tuple[Float[Array, ""], PyTree]:
        gradients, loss = jax.grad(scaled, has_aux=True)(trainable, *others)
        return loss, jax.tree.map(lambda leaf: leaf / scaler.scale, gradients)

    return unscaled


def overflowed(loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Returns whether the gradients overflowed: their norm is not finite, but the loss is.

    A loss that is not finite is none of the scale's doing, since the forward pass computes it without the scale.
    """
    return jnp.isfinite(loss) & ~jnp.isfinite(norm)


def is_remedied(scaler: Scaler, loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
    """Returns whether the gradients of a step overflowed and the scale, which was this, can still be lowered."""
    return overflowed(loss, norm) & (scaler.scale > SMALLEST)


def update(scaler: Scaler, loss: Float[Array, ""], norm: Float[Array, ""], taken: Bool[Array, ""]) -> Scaler:
    """Returns the state after a step, as `GradScaler.update` does.

    loss, norm: the loss and the norm of the gradients, over all devices. taken: whether the step was taken: loss, norm
    and what came out of it are finite. A step that was not taken for another reason than an overflow leaves the scale
    as it is.
    """
    overflow = overflowed(loss, norm)
    good = scaler.good + taken.astype(jnp.int32)
    grows, grown = good >= GROWTH_INTERVAL, scaler.scale * GROWTH
    lower = jnp.maximum(scaler.scale * BACKOFF, SMALLEST)
    higher = jnp.where(grows & jnp.isfinite(grown), grown, scaler.scale)
    return Scaler(
        scale=jnp.where(overflow, lower, higher),
        good=jnp.where(overflow | grows, 0, good),
        skipped=scaler.skipped + (~taken).astype(jnp.int32),
    )


def resumed(saved: Scaler | None, *, used: bool) -> Scaler | None:
    """Returns what a resumed stage goes on with. used: whether it scales its loss now.

    A checkpoint of a run in another number type has no scaler, so the scale begins anew.
    """
    return (saved or first()) if used else None
