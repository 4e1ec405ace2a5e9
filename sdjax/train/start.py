"""What a run starts from besides its model: LoRAs and words of files, which lie beneath it or are trained further."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from sdjax import lora
from sdjax.data.records import file_digest
from sdjax.errors import ConfigError
from sdjax.formats.lora_file import load_lora
from sdjax.outline import Outline
from sdjax.text.textual_inversion import vector_counts
from sdjax.train.config import RunConfig, Stage
from sdjax.train.results import NOTHING, Results, Rows
from sdjax.trees import Tree, layers


class Beneath(NamedTuple):
    """The files of [base], read."""

    loras: tuple[tuple[dict[str, PyTree], float], ...]
    """Adapter trees by part, each with its weight."""
    words: Mapping[str, Rows]
    """Word -> its vectors."""
    files: Mapping[str, str]
    """Dotted key of the setting -> digest of its file and the names of its words."""

    @property
    def results(self) -> Results:
        """What the first stage finds: the words. The LoRAs are in the model, see `Outline.loras`."""
        names = dict.fromkeys(name for rows in self.words.values() for name in rows)
        vectors = {name: np.concatenate([rows[name] for rows in self.words.values()]) for name in names}
        return NOTHING._replace(rows=vectors)

    @property
    def digest(self) -> str:
        """A text that changes with the LoRAs and their weights. Empty if there are none."""
        weighted = zip((self.files[key] for key in self.files if ".loras." in key), self.loras, strict=True)
        return " ".join(f"{digest}:{weight!r}" for digest, (_, weight) in weighted)


def read_base(config: RunConfig, outline: Outline) -> Beneath:
    """Reads the files of [base].

    Raises DataError for a file that does not fit the model, and ConfigError for a word that several files hold, that
    the model knows, or that a stage names: a stage trains its own words.
    """
    loras = tuple((load_lora(item.path, outline.shapes), item.weight) for item in config.base.loras)
    files = {f"base.loras.{i}": digest(item.path) for i, item in enumerate(config.base.loras)}
    words: dict[str, Rows] = {}
    for i, path in enumerate(config.base.embeddings):
        found = outline.load_words(path)
        files[f"base.embeddings.{i}"] = " ".join([digest(path), *found])
        for word, rows in found.items():
            if word in words:
                raise ConfigError(f"base.embeddings: {path} and an earlier file hold the word {word}")
            words[word] = rows
    try:
        outline.with_words(vector_counts(words))
    except ConfigError as e:
        raise ConfigError(f"base.embeddings: {e}") from None
    for number, stage in enumerate(config.stages):
        if known := words.keys() & set(stage.placeholder_tokens):
            raise ConfigError(
                f"stages.{number}.placeholder_tokens: {known.pop()} is a word of base.embeddings, which is left as it "
                "is: to train it further, give its file in init_tokens instead"
            )
    return Beneath(loras, words, files)


def first_adapters(stage: Stage, key: str, outline: Outline) -> dict[str, PyTree]:
    """Returns the adapters in the file of `lora_init` by part, or an empty dict if the stage has none.

    key: the dotted key of the stage. Raises DataError for a file that does not fit the model, and ConfigError where
    settings of the stage differ both from their defaults and from the file.
    """
    if not stage.lora_init:
        return {}
    adapters = load_lora(stage.lora_init, outline.shapes)
    where = f"{key}.lora_init = {stage.lora_init!r}"
    if set(adapters) != set(stage.lora_parts):
        raise ConfigError(f"{where} adapts {', '.join(adapters)}: give lora_parts = {list(adapters)}")
    if not all(_is_trainable(layer) for tree in adapters.values() for _, layer in layers(tree, "scale")):
        raise ConfigError(
            f"{where}: only LoRA, LoHa, LoKr and DoRA by outputs can be trained further; [base] takes adapters of any "
            "kind"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(Stage)}
    given = {name for name in _SET_BY_FILE if getattr(stage, name) not in (defaults[name], {})}
    for part, tree in adapters.items():
        if difference := next(_differences(stage, given, outline.shapes[part], tree), None):
            name, has = difference
            raise ConfigError(
                f"{where} has {part}/{has}, but {name} = {getattr(stage, name)!r}: leave {name} out, the file sets it"
            )
    return adapters


def _is_trainable(adapter: Tree) -> bool:
    magnitudes_of_outputs = np.ndim(adapter.get("magnitude", 0)) < 2
    return lora.form(adapter).lower() in lora.NEW and "bias" not in adapter and magnitudes_of_outputs


_SET_BY_FILE = (
    *("lora_kind", "lora_factor", "lora_rank", "lora_ranks"),
    *("lora_alpha", "use_rslora", "use_dora", "lora_targets"),
)
"""The settings of a stage whose values the file of `lora_init` sets."""


def _differences(stage: Stage, given: set[str], shapes: PyTree, adapters: PyTree) -> Iterator[tuple[str, str]]:
    """Yields the name of each given setting that does not describe the adapters of a part, and what these have."""

    def rank_of(name: str) -> int:
        return next((rank for pattern, rank in stage.lora_ranks.items() if re.search(pattern, name)), stage.lora_rank)

    found = {"/".join(path): layer for path, layer in layers(adapters, "scale")}
    kernels = {"/".join(path): layer["kernel"].shape for path, layer in layers(shapes, "kernel")}
    if "lora_targets" in given:
        names = map("/".join, lora.targets(shapes, stage.lora_targets))
        wanted = {name for name in names if rank_of(name) > 0}
        yield from (("lora_targets", f"{name} without an adapter") for name in wanted - found.keys())
        yield from (("lora_targets", f"{name} with an adapter") for name in found.keys() - wanted)
    for name, layer in found.items():
        if "lora_kind" in given and lora.form(layer).lower() != stage.lora_kind:
            yield "lora_kind", f"{name} of kind {lora.form(layer)}"
        if "lora_factor" in given:
            expected = tuple(lora.factors(size, stage.lora_factor)[0] for size in kernels[name][-2:])
            if (factor := np.shape(layer.get("w1", ()))) != expected:
                yield "lora_factor", f"{name} with a first factor {list(factor)} in place of {list(expected)}"
        rank, scale = lora.rank(layer), float(layer["scale"])
        if "use_dora" in given and "magnitude" not in layer:
            yield "use_dora", f"{name} without a DoRA magnitude"
        if rank is None:  # a LoKr of two whole factors, which has neither rank nor alpha
            continue
        if given & {"lora_rank", "lora_ranks"} and rank != rank_of(name):
            yield max(given & {"lora_rank", "lora_ranks"}), f"{name} of rank {rank}"  # lora_ranks, if it is given
        alpha = scale * (math.sqrt(rank) if stage.use_rslora else rank)
        if given & {"lora_alpha", "use_rslora"} and not math.isclose(alpha, stage.lora_alpha or rank, rel_tol=1e-3):
            yield min(given & {"lora_alpha", "use_rslora"}), f"{name} of rank {rank} and alpha {alpha:g}"


def digest(path: str) -> str:
    """Returns the sha256 of a LoRA or embedding file. Of a folder it is that of the LoRA in it."""
    file = Path(path)
    return file_digest(max(file.glob("pytorch_lora_weights.*")) if file.is_dir() else file)
