"""Textual Inversion (Gal et al. 2022): captions for new words, their first rows, and the decay of their norms."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sdjax.errors import ConfigError, DataError
from sdjax.text.tokenizer import Tokenizer

OBJECT = (
    "a photo of a {}",
    "a photo of the {}",
    "a photo of one {}",
    "a picture of a {}",
    "an image of the {}",
    "a good photo of a {}",
    "a nice photo of the {}",
    "a clear photo of a {}",
    "a sharp photo of the {}",
    "a bright photo of a {}",
    "a dark photo of the {}",
    "a close-up photo of a {}",
    "a close-up of the {}",
    "a cropped photo of a {}",
    "a cropped photo of the {}",
    "a photo of a small {}",
    "a photo of the large {}",
    "a photo of a clean {}",
    "a photo of my {}",
    "a photo of a cool {}",
    "a photo of a strange {}",
    "a low-resolution photo of a {}",
    "a compressed photo of the {}",
    "a rendering of a {}",
    "a rendition of the {}",
    "a depiction of a {}",
)
STYLE = (
    "a painting in the style of {}",
    "a picture in the style of {}",
    "a drawing in the style of {}",
    "an image in the style of {}",
    "an illustration in the style of {}",
    "a rendering in the style of {}",
    "a rendition in the style of {}",
    "a depiction in the style of {}",
    "a work of art in the style of {}",
    "the painting, in the style of {}",
    "a small painting in the style of {}",
    "a large painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a clean painting in the style of {}",
    "a rough painting in the style of {}",
    "a nice painting in the style of {}",
    "a cool painting in the style of {}",
    "a strange painting in the style of {}",
    "a cropped painting in the style of {}",
    "a close-up painting in the style of {}",
    "a detail of a painting in the style of {}",
)
_RANDOM = re.compile(r"<rand-([^<>]+)>")


def templates(template: str | Sequence[str]) -> tuple[str, ...]:
    """Returns captions with `{}` in the place of the new words.

    template: "object" or "style", which are like those of the paper's code, or a list of captions. Raises ConfigError
    for another name, an empty list, or a caption without `{}`.
    """
    if isinstance(template, str):
        known = {"object": OBJECT, "style": STYLE}
        if template not in known:
            raise ConfigError(f"template = {template!r}: choices are {', '.join(known)}, or a list of captions")
        return known[template]
    if not template or not all("{}" in text for text in template):
        raise ConfigError(f"template = {list(template)}: each caption must have {{}} where the new words go")
    return tuple(template)


def initial_rows(
    key: PRNGKeyArray,
    table: Float[Array | np.ndarray, "V D"],
    tokenizer: Tokenizer,
    init: str | Float[np.ndarray, "n D"] | None,
    vectors: int | None,
) -> Float[np.ndarray, "n D"]:
    """Returns the rows that a new word starts with, float32.

    init: one of
        a word or phrase of the vocabulary: the rows of its tokens, repeated until there are `vectors` of them,
        "<rand-SIGMA>": normal numbers of this standard deviation,
        "<zero>": zeros,
        an array: the rows of an embedding file,
        None: random directions of the typical norm of the table (for SD1 about as large as with "<rand-0.017>").
    vectors: the number of rows. None: as many as the array has, else 1.
    Raises ConfigError for an unusable init, and for an array of another shape.
    """
    width = table.shape[1]
    if isinstance(init, np.ndarray):
        if init.ndim != 2 or init.shape[1] != width or (vectors or len(init)) != len(init):
            expected = f"{vectors or 'any number of'} vectors of width {width}"
            raise ConfigError(f"an initial embedding of shape {list(init.shape)}: expected {expected}")
        return np.asarray(init, np.float32)
    vectors = vectors or 1
    if init is None:
        rows = np.asarray(jax.random.normal(key, (vectors, width), jnp.float32))
        return rows * np.float32(typical_norm(table)) / np.linalg.norm(rows, axis=-1, keepdims=True)
    if init == "<zero>":
        return np.zeros((vectors, width), np.float32)
    if match := _RANDOM.fullmatch(init):
        return np.asarray(jax.random.normal(key, (vectors, width), jnp.float32)) * np.float32(_sigma(init, match[1]))
    ids = tokenizer.words(init)
    if not ids:
        raise ConfigError(f"init_tokens: {init!r} has no token; give a word, <rand-SIGMA>, <zero>, or a file")
    if max(ids) >= len(table):
        raise ConfigError(f"init_tokens: {init!r} is a new word itself; give one of the vocabulary, or a file")
    return np.asarray(table, np.float32)[np.resize(ids, vectors)]


def vector_counts(words: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns word -> number of its vectors. words: word -> text model -> vectors [n, D]."""
    return {word: len(next(iter(rows.values()))) for word, rows in words.items()}


def with_rows(params: Mapping[str, Any], rows: Float[Array, "K D"], first: int, *, what: str) -> dict[str, Any]:
    """Returns the parameters of a text model with the rows of new words in its table, from row `first` on.

    They replace rows from there on, which no word uses. Raises DataError, which names `what`, if the table has fewer
    than `first` rows.
    """
    table = np.asarray(params["embeddings"]["token_embedding"]["embedding"])
    if first > len(table):
        raise DataError(f"{what}: a tokenizer of {first} words for a table of {len(table)} rows")
    parts = [table[:first], np.asarray(rows, table.dtype), table[first + len(rows) :]]
    table = {"embedding": np.concatenate(parts)}
    return {**params, "embeddings": {**params["embeddings"], "token_embedding": table}}


def decay_norm(
    rows: Float[Array, "*B K D"], learning_rate: Float[Array, ""] | float, target: float
) -> Float[Array, "*B K D"]:
    """Returns the rows with their norms moved towards `target`: `|e| += min(1, 100 lr) (target - |e|)`.

    This is `clip_ti_decay` of cloneofsimo's lora, for use after each optimizer step. Rows of zeros stay as they are.
    """
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    share = jnp.minimum(1.0, 100.0 * jnp.asarray(learning_rate, rows.dtype))
    gain = (norm + share * (target - norm)) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return jnp.where(norm > 0, rows * gain, rows)


def typical_norm(table: Float[Array | np.ndarray, "V D"]) -> float:
    """Returns the median norm of the rows that are not all zeros, 0 if there are none. For SD1 it is 0.4."""
    norms = np.linalg.norm(np.asarray(table, np.float32), axis=-1)
    return float(np.median(norms[norms > 0])) if (norms > 0).any() else 0.0


def _sigma(init: str, text: str) -> float:
    """Returns the number of `<rand-SIGMA>`."""
    try:
        sigma = float(text)
    except ValueError:
        sigma = math.nan
    if not (math.isfinite(sigma) and sigma > 0):
        raise ConfigError(f"init_tokens: {init!r}: SIGMA must be a number above 0, as in <rand-0.017>")
    return sigma
