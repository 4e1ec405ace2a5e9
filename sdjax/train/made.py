"""What the stages of a run make: what a stage starts from, and what there is when it is done."""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from sdjax import lora, textual_inversion
from sdjax.errors import ConfigError
from sdjax.loading import load_weights
from sdjax.model import Outline
from sdjax.text.encoding import TEXT_ENCODERS
from sdjax.train.config import Stage
from sdjax.train.step import Recipe, State, evaluated, variables

log = logging.getLogger(__name__)

Rows = Mapping[str, Float[np.ndarray, "n D"]]
"""Text model -> vectors of one word."""


class Made(NamedTuple):
    """The whole result of some stages, and nothing of the base model's own."""

    adapters: dict[str, PyTree]
    """Model -> complete LoRA tree, the sum of those of all stages."""
    weights: dict[str, PyTree]
    """Model -> its weights, float32, where a stage trained them as a whole."""
    rows: dict[str, Float[Array, "K D"]]
    """Text model -> vectors of all new words."""

    def digest(self, *models: str) -> str:
        """Changes with what was made of these models."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves([[record.get(model) for model in models] for record in self]):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


NOTHING = Made({}, {}, {})


class Start(NamedTuple):
    """What a stage starts from, beside the weights it leaves as they are."""

    trainable: dict[str, PyTree]
    """Part -> what the optimizer moves, float32."""
    scales: dict[str, PyTree]
    """Part -> the scales of its adapter."""
    rows: dict[str, Float[Array, "K D"]]
    """Text model -> vectors of all new words, those of this stage among them."""


def base_weights(outline: Outline, part: str, made: Made, *, dtype: Any = None) -> dict[str, Any]:
    """One model's weights as some stages leave them: its file's, or trained ones, with the adapter merged in."""
    weights = made.weights[part] if part in made.weights else load_weights(outline, part, dtype=dtype)
    return lora.merge(weights, made.adapters[part]) if part in made.adapters else weights


def beneath(stage: Stage, made: Made) -> Made:
    """What lies under the stage: all that was made, but for the adapters it goes on training."""
    going_on = stage.lora_parts if "lora" in stage.train and stage.lora_continue else ()
    return made._replace(adapters={part: tree for part, tree in made.adapters.items() if part not in going_on})


def first_rows(
    recipe: Recipe, key: PRNGKeyArray, params: Mapping[str, PyTree], words: Mapping[str, Rows | int]
) -> tuple[dict[str, Float[np.ndarray, "K D"]], dict[str, Float[np.ndarray, ""]]]:
    """By text model: the first values of all vectors a stage adds, and the norm that clip_ti_decay draws to.

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
            own = jax.random.fold_in(jax.random.fold_in(key, len(stage.parts)), i)
            vectors.append(textual_inversion.initial_rows(own, table, tokenizer, init, count))
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


def start(
    recipe: Recipe,
    key: PRNGKeyArray,
    params: Mapping[str, PyTree],
    made: Made,
    new_rows: Mapping[str, Float[Array | np.ndarray, "K D"]],
) -> Start:
    """The first values of everything a stage trains; with new adapters the model computes exactly what it did.

    params: model -> base weights. new_rows: as of `first_rows`. Raises ConfigError where the settings do not fit.
    """
    stage, parts = recipe.stage, recipe.stage.parts
    trainable: dict[str, PyTree] = {part: params[part] for part, kind in parts.items() if kind == "weights"}
    scales = {}
    for i, part in enumerate(part for part, kind in parts.items() if kind == "lora"):
        going_on = stage.lora_continue and part in made.adapters
        own = made.adapters[part] if going_on else _new_adapter(stage, part, jax.random.fold_in(key, i), params[part])
        trainable[part], scales[part] = lora.split(own)
    rows = dict(made.rows)
    if "textual_inversion" in parts:
        for name, new in new_rows.items():
            rows[name] = jnp.concatenate([rows[name], new]) if name in rows else jnp.asarray(new)
        trainable["textual_inversion"] = {name: vectors[np.array(recipe.rows)] for name, vectors in rows.items()}
    return Start(trainable, scales, rows)


def result(recipe: Recipe, made: Made, state: State, frozen: PyTree) -> Made:
    """What all stages so far have made, the one with this state the last."""
    best, parts = evaluated(recipe, state), recipe.stage.parts
    whole = {part: best[part] for part, kind in parts.items() if kind == "weights"}
    own = {part: lora.join(best[part], frozen["scales"][part]) for part, kind in parts.items() if kind == "lora"}
    below = {part: tree for part, tree in beneath(recipe.stage, made).adapters.items() if part not in whole}
    rows = made.rows
    if "textual_inversion" in parts:
        models = variables(recipe, best, frozen)
        rows = {name: models[name]["placeholder"]["embeddings"]["token_embedding"]["rows"] for name in frozen["rows"]}
    return Made(_added(below, own), made.weights | whole, rows)


def _new_adapter(stage: Stage, part: str, key: PRNGKeyArray, params: PyTree) -> PyTree:
    try:
        adapter = lora.init(
            key,
            params,
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


def _added(first: dict[str, PyTree], second: dict[str, PyTree]) -> dict[str, PyTree]:
    """Both adapters of each model as one, exactly."""
    return {
        part: lora.add([(trees[part], 1.0) for trees in (first, second) if part in trees])
        for part in dict.fromkeys([*first, *second])
    }
