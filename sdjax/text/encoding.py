"""Token ids to what the U-Net is conditioned on, through one text model or several side by side."""

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
"""Text model -> its tokenizer, by the names of diffusers' folders."""


@dataclasses.dataclass(frozen=True)
class HiddenState:
    """Which state of the text model is the context: counted from the end, with or without the final norm."""

    clip_skip: int
    final_norm: bool


def encode_ids(
    text_models: Mapping[str, clip.TextModel],
    variables: Mapping[str, Any],
    ids: Mapping[str, Int[Array | np.ndarray, "B n T"]],
    hidden: HiddenState,
    weights: Mapping[str, Float[Array | np.ndarray, "B n T"]] | None = None,
    *,
    restore_mean: bool = True,
) -> tuple[Float[Array, "B n*T D"], Float[Array, "B P"]]:
    """Token ids by text model -> context (the models' widths side by side) and the last model's pooled vector.

    Pure, so that training differentiates through it. variables: by text model, see `models.layers.variables`.
    Windows are encoded one by one and laid end to end; the pooled vector is the first window's.
    weights: of each token's part of the context, by text model; None: all 1. restore_mean: as of `emphasised`.
    """
    own = {name: variables[name] for name in text_models}
    weighting = None if weights is None else (dict(weights), np.bool_(restore_mean))
    return _encode_ids(tuple(text_models.items()), hidden, own, dict(ids), weighting)


def zeroed(values: Float[Array, "B ..."], empty: Bool[Array | np.ndarray, " B"]) -> Float[Array, "B ..."]:
    """A context or pooled vectors, with zeros for the prompts that are empty.

    SDXL was trained with zeros where the prompt was dropped, not with an encoded empty text.
    """
    mask = jnp.asarray(empty).reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(mask, jnp.zeros((), values.dtype), values)


def emphasised(
    context: Float[Array, "N T D"], weights: Float[Array, "N T"], restore_mean: Bool[Array | np.ndarray, ""]
) -> Float[Array, "N T D"]:
    """Windows' contexts times their tokens' weights; a window whose weights are all 1 stays the same to the bit.

    restore_mean: whether each window then gets back its mean, as with A1111's emphasis "Original"; else "No norm".
    """
    values = jnp.asarray(context, jnp.float32)
    weighted = values * weights[..., None]
    mean = functools.partial(jnp.mean, axis=(1, 2), keepdims=True)
    restored = restore_mean & jnp.any(weights != 1, axis=1)
    scale = jnp.where(restored[:, None, None], mean(values) / mean(weighted), jnp.float32(1))
    return jnp.asarray(weighted * scale, context.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_ids(models, hidden, variables, ids, weighting=None):
    contexts, pooled = [], None
    for name, model in models:
        batch, windows, length = ids[name].shape
        flat = ids[name].reshape(batch * windows, length)
        context, pooled = model.apply(variables[name], flat, clip_skip=hidden.clip_skip, final_norm=hidden.final_norm)
        if weighting is not None:
            weights, restore_mean = weighting
            context = emphasised(context, jnp.asarray(weights[name]).reshape(flat.shape), restore_mean)
        contexts.append(context.reshape(batch, windows * length, -1))
        pooled = pooled.reshape(batch, windows, -1)[:, 0]
    return jnp.concatenate(contexts, axis=-1), pooled
