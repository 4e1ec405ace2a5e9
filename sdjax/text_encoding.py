"""Token ids to what the U-Net is conditioned on, through one text model or several side by side."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.errors import DataError
from sdjax.models import clip

TEXT_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text model -> its tokenizer, by the names of diffusers' folders."""


@dataclasses.dataclass(frozen=True)
class HiddenState:
    """Which state of the text model is the context: counted from the end, with or without the final norm."""

    clip_skip: int
    final_norm: bool


def collections(params: Any, *, lora: Any = None, rows: Any = None) -> dict[str, Any]:
    """A model's Flax collections: its weights, an adapter, and the vectors of new words, the latter where given."""
    variables = {"params": params}
    if lora is not None:
        variables["lora"] = lora
    if rows is not None:
        variables["placeholder"] = {"embeddings": {"token_embedding": {"rows": rows}}}
    return variables


def with_rows(params: Mapping[str, Any], rows: Float[Array, "K D"], first: int, *, what: str) -> dict[str, Any]:
    """A text model's parameters with new words' rows in its table, from row `first` on (what lay there is unused).

    Raises DataError, which names `what`, for a table of fewer rows.
    """
    table = params["embeddings"]["token_embedding"]["embedding"]
    if first > len(table):
        raise DataError(f"{what}: a tokenizer of {first} words for a table of {len(table)} rows")
    parts = [table[:first], jnp.asarray(rows, table.dtype), table[first + len(rows) :]]
    table = {"embedding": jnp.concatenate(parts)}
    return {**params, "embeddings": {**params["embeddings"], "token_embedding": table}}


def encode_ids(
    text_models: Mapping[str, clip.TextModel],
    variables: Mapping[str, Any],
    ids: Mapping[str, Int[Array | np.ndarray, "B n T"]],
    hidden: HiddenState,
) -> tuple[Float[Array, "B n*T D"], Float[Array, "B P"]]:
    """Token ids by text model -> context (the models' widths side by side) and the last model's pooled vector.

    Pure, so that training differentiates through it. variables: by text model, as of `collections`.
    Windows are encoded one by one and laid end to end; the pooled vector is the first window's.
    """
    own = {name: variables[name] for name in text_models}
    return _encode_ids(tuple(text_models.items()), hidden, own, dict(ids))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_ids(models, hidden, variables, ids):
    contexts, pooled = [], None
    for name, model in models:
        batch, windows, length = ids[name].shape
        flat = ids[name].reshape(batch * windows, length)
        context, pooled = model.apply(variables[name], flat, clip_skip=hidden.clip_skip, final_norm=hidden.final_norm)
        contexts.append(context.reshape(batch, windows * length, -1))
        pooled = pooled.reshape(batch, windows, -1)[:, 0]
    return jnp.concatenate(contexts, axis=-1), pooled
