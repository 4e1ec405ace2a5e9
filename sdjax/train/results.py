"""The results of stages: what a stage starts from, and what there is when it is done."""

import dataclasses
import hashlib
import itertools
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.outline import Outline
from sdjax.text import textual_inversion
from sdjax.text.encoding import TEXT_ENCODERS
from sdjax.train.config import Stage
from sdjax.train.step import Frozen, Recipe, State, evaluated, init_state, variables
from sdjax.trees import layers

log = logging.getLogger(__name__)

Rows = Mapping[str, Float[np.ndarray, "n D"]]
"""Text model -> vectors of one word."""


class Results(NamedTuple):
    """Everything that some stages have made. Nothing of the base model is in it."""

    adapters: dict[str, PyTree]
    """Part -> complete LoRA tree, the sum of the adapters of all stages."""
    weights: dict[str, PyTree]
    """Part -> its weights, float32, where a stage trained all of them."""
    rows: dict[str, Float[Array, "K D"]]
    """Text model -> vectors of all new words."""

    def digest(self, *parts: str) -> str:
        """Returns a digest that changes with the results for these parts."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves([[record.get(part) for part in parts] for record in self]):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


NOTHING = Results({}, {}, {})


def base_weights(outline: Outline, part: str, earlier: Results, *, dtype: Any = None) -> dict[str, Any]:
    """Returns the weights of a part after some stages: from its file or trained, with the adapter merged in.

    dtype: see `Outline.load_weights`.
    """
    if part in earlier.weights:
        adapter = earlier.adapters.get(part, {})
        weights = lora.merge(earlier.weights[part], adapter)
        return weights if dtype else outline.stored(part, weights)
    if part in earlier.adapters:
        outline = dataclasses.replace(outline, loras=(*outline.loras, (earlier.adapters, 1.0)))
    return outline.load_weights(part, dtype=dtype)


def beneath(stage: Stage, earlier: Results) -> Results:
    """Returns what lies beneath a stage: all earlier results except the adapters that it trains further."""
    continued = stage.lora_parts if "lora" in stage.train and stage.lora_continue else ()
    return earlier._replace(adapters={part: tree for part, tree in earlier.adapters.items() if part not in continued})


def first_rows(
    recipe: Recipe, key: PRNGKeyArray, params: Mapping[str, PyTree], words: Mapping[str, Rows | int]
) -> tuple[dict[str, Float[np.ndarray, "K D"]], dict[str, Float[np.ndarray, ""]]]:
    """Returns, by text model, the first vectors of a stage's new words and the norm that clip_ti_decay draws to.

    params: text model -> weights. words: each new word with its number of vectors, or with the vectors of a file.
    """
    stage, rows, norms = recipe.stage, {}, {}
    inits = dict(zip(stage.placeholder_tokens, stage.init_tokens, strict=False))
    for name, module in recipe.outline.text_models.items():
        table = np.asarray(params[name]["embeddings"]["token_embedding"]["embedding"], np.float32)
        tokenizer = recipe.outline.tokenizers[TEXT_ENCODERS[name]]
        vectors = [np.zeros((0, module.config.hidden_size), np.float32)]
        for i, (word, given) in enumerate(words.items()):
            init, count = (inits.get(word), given) if isinstance(given, int) else (np.asarray(given[name]), None)
            word_key = jax.random.fold_in(jax.random.fold_in(key, len(stage.parts)), i)
            vectors.append(textual_inversion.initial_rows(word_key, table, tokenizer, init, count))
        rows[name] = np.concatenate(vectors)
        norms[name] = np.float32(stage.clip_ti_norm or textual_inversion.typical_norm(table))
        start = np.median(np.linalg.norm(rows[name], axis=-1)) if len(rows[name]) else norms[name]
        if stage.clip_ti_decay and start and not 0.5 <= norms[name] / start <= 2:
            log.warning(
                "stage %s: new words begin with norm %.2g in %s, and clip_ti_decay draws them to %.2g, %s",
                *(stage.name, start, name, norms[name]),
                "clip_ti_norm" if stage.clip_ti_norm else "the table's median: clip_ti_norm sets another",
            )
    return rows, norms


def places(words: Mapping[str, int]) -> dict[str, range]:
    """Returns the places of the rows of each word among the rows of all words. words: word -> number of its vectors."""
    ends = itertools.accumulate(words.values())
    return {word: range(end - count, end) for (word, count), end in zip(words.items(), ends, strict=True)}


def begin(
    recipe: Recipe,
    key: PRNGKeyArray,
    params: Mapping[str, PyTree],
    earlier: Results,
    new_rows: Mapping[str, Float[Array | np.ndarray, "K D"]],
    adapters: Mapping[str, PyTree],
) -> tuple[State, dict[str, PyTree], dict[str, Float[Array, "K D"]]]:
    """Returns the state before the first step of a stage, and the `scales` and `rows` of its `Frozen`.

    With new adapters the model computes exactly what it computed before.
    params: part -> weights. new_rows: see `first_rows`. adapters: those of a file, to be trained further.
    Raises ConfigError where the settings do not fit.
    """
    stage, parts = recipe.stage, recipe.stage.parts
    trainable: dict[str, PyTree] = {part: params[part] for part, kind in parts.items() if kind == "weights"}
    scales = {}
    for i, part in enumerate(part for part, kind in parts.items() if kind == "lora"):
        if part in adapters:
            adapter = adapters[part]
        elif stage.lora_continue and part in earlier.adapters:
            adapter = earlier.adapters[part]
        else:
            adapter = _new_adapter(stage, part, jax.random.fold_in(key, i), params[part])
        if stage.lora_plus_ratio != 1.0 and any(lora.form(each) != "LoRA" for _, each in layers(adapter, "scale")):
            raise ConfigError(f"{part}: lora_plus_ratio is the ratio of LoRA's two rates; LoHa and LoKr have one")
        trainable[part], scales[part] = lora.split(adapter)
    rows = dict(earlier.rows)
    if "textual_inversion" in parts:
        for name, new in new_rows.items():
            rows[name] = jnp.concatenate([rows[name], new]) if name in rows else jnp.asarray(new)
        trainable["textual_inversion"] = {name: vectors[np.array(recipe.rows)] for name, vectors in rows.items()}
    return init_state(recipe, trainable), scales, rows


def after(recipe: Recipe, earlier: Results, state: State, frozen: Frozen) -> Results:
    """Returns the results of all stages so far, of which the one with this state is the last."""
    best, parts = evaluated(recipe, state), recipe.stage.parts
    weights = {part: best[part] for part, kind in parts.items() if kind == "weights"}
    trained = {part: lora.join(best[part], frozen["scales"][part]) for part, kind in parts.items() if kind == "lora"}
    below = {part: tree for part, tree in beneath(recipe.stage, earlier).adapters.items() if part not in weights}
    rows = earlier.rows
    if "textual_inversion" in parts:
        models = variables(recipe, best, frozen)
        rows = {name: models[name]["placeholder"]["embeddings"]["token_embedding"]["rows"] for name in frozen["rows"]}
    try:
        adapters = {
            part: lora.add([(trees[part], 1.0) for trees in (below, trained) if part in trees])
            for part in dict.fromkeys([*below, *trained])
        }
    except ConfigError as e:
        raise ConfigError(
            f"{e}: let lora_continue train that of the earlier stages further, or run this stage on its file in [base]"
        ) from None
    return Results(adapters, earlier.weights | weights, rows)


def _new_adapter(stage: Stage, part: str, key: PRNGKeyArray, params: PyTree) -> PyTree:
    try:
        adapter = lora.init(
            key,
            params,
            kind=stage.lora_kind,
            factor=stage.lora_factor,
            rank=stage.lora_rank,
            alpha=stage.lora_alpha,
            which=stage.lora_targets,
            ranks=stage.lora_ranks,
            rslora=stage.use_rslora,
            dora=stage.use_dora,
        )
    except ConfigError as e:
        raise ConfigError(f"{part}: {e}") from None
    if not adapter:
        raise ConfigError(f"{part}: lora_ranks leaves no layer with an adapter")
    return adapter
