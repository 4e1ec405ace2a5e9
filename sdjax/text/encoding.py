"""Turns token ids into the context that the U-Net is conditioned on, with one text model or several side by side."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdjax.models import clip

TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text model -> its tokenizer, both by the names of diffusers' folders."""


@dataclasses.dataclass(frozen=True)
class HiddenState:
    """The hidden state of the text model that is the context."""

    clip_skip: int
    """Counted from the end: 1 is the last layer's."""
    final_norm: bool
    """Whether the final layer norm is applied."""


def encode_ids(
    text_models: Mapping[str, clip.TextModel],
    variables: Mapping[str, Any],
    ids: Mapping[str, Int[Array | np.ndarray, "B n T"]],
    hidden: HiddenState,
    weights: Mapping[str, Float[Array | np.ndarray, "B n T"]] | None = None,
    *,
    restore_mean: bool = True,
) -> tuple[Float[Array, "B n*T D"], Float[Array, "B P"]]:
    """The context (of all text models, along its last axis) and the last text model's pooled vector.

    Each of the n chunks of a prompt is encoded by itself. Their contexts are joined end to end; the pooled vector is
    that of the first chunk. The function is pure, so that training can differentiate it.

    variables: by text model, see `models.layers.variables`. ids: by text model.
    weights: by text model, the factor for each token's context; None means 1. restore_mean: see `emphasised`.
    """
    used = {name: variables[name] for name in text_models}
    weighting = None if weights is None else (dict(weights), np.bool_(restore_mean))
    return compiled_encode_ids(tuple(text_models.items()), hidden, used, dict(ids), weighting)


def zeroed(values: Float[Array, "B ..."], empty: Bool[Array | np.ndarray, " B"]) -> Float[Array, "B ..."]:
    """Contexts or pooled vectors, with zeros in the rows of empty prompts.

    SDXL was trained with zeros for a dropped prompt, not with the encoding of an empty text.
    """
    mask = jnp.asarray(empty).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(mask, jnp.zeros((), values.dtype), values)


def emphasised(
    context: Float[Array, "N T D"], weights: Float[Array, "N T"], restore_mean: Bool[Array | np.ndarray, ""]
) -> Float[Array, "N T D"]:
    """The contexts of N chunks, multiplied by the weights of their tokens.

    A chunk whose weights are all 1 keeps its context to the bit.
    restore_mean: whether each chunk is then scaled back to its mean before (A1111's emphasis "Original") or not ("No
    norm").
    """
    values = jnp.asarray(context, jnp.float32)
    weighted = values * weights[..., None]
    mean = functools.partial(jnp.mean, axis=(1, 2), keepdims=True)
    restored = restore_mean & jnp.any(weights != 1, axis=1)
    scale = jnp.where(restored[:, None, None], mean(values) / mean(weighted), jnp.float32(1))
    return jnp.asarray(weighted * scale, context.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compiled_encode_ids(models, hidden, variables, ids, weighting=None):
    """`encode_ids` with hashable models. weighting: the weights, and whether the mean is restored."""
    contexts, pooled = [], None
    for name, model in models:
        batch, chunks, length = ids[name].shape
        flat = ids[name].reshape(batch * chunks, length)
        context, pooled = model.apply(variables[name], flat, clip_skip=hidden.clip_skip, final_norm=hidden.final_norm)
        if weighting is not None:
            weights, restore_mean = weighting
            context = emphasised(context, jnp.asarray(weights[name]).reshape(flat.shape), restore_mean)
        contexts.append(context.reshape(batch, chunks * length, -1))
        pooled = pooled.reshape(batch, chunks, -1)[:, 0]
    return jnp.concatenate(contexts, axis=-1), pooled
