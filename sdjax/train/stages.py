"""A run as a list of stages, checked before any weight is read.

`plan_runs` needs only the model's configs, tokenizers and weight headers. `prepare` then loads the weights of a stage
and makes its adapters, once `train.encoding` has encoded its data.

A stage stands on the results of the stages before it (`train.results`): their adapters are merged into its frozen
weights, and their words are known. Its export holds all of them, so the last export is the whole result.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, PRNGKeyArray, PyTree

from sdjax import diffusion
from sdjax.data import records
from sdjax.data.buckets import Buckets
from sdjax.data.files import file_digest
from sdjax.data.order import Order, describe
from sdjax.data.records import Record
from sdjax.errors import ConfigError
from sdjax.formats.embedding_file import load_embedding
from sdjax.outline import Outline
from sdjax.runtime.compiler_options import is_large
from sdjax.settings import RematPolicy
from sdjax.text import textual_inversion
from sdjax.train import checks, stage_images
from sdjax.train.config import Data, RunConfig, Stage
from sdjax.train.config_file import flatten
from sdjax.train.optimizers import make_optimizer, peak_rates
from sdjax.train.parallel import Parallel, TrainStep, parallelize
from sdjax.train.results import Results, Rows, after, base_weights, begin, beneath, first_rows, places
from sdjax.train.start import Beneath, digest, first_adapters, read_base
from sdjax.train.step import Frozen, Recipe, State, make_train_step

log = logging.getLogger(__name__)


class StagePlan(NamedTuple):
    """One stage, as far as it is known without weights."""

    number: int
    data: Data
    buckets: Buckets
    held_out: Sequence[Record]
    classes: Sequence[Record]
    """Class images with captions of their own; see `stage_images.Images`."""
    chunks: int
    """Chunks that the longest caption takes in any text model."""
    recipe: Recipe
    parallel: Parallel
    state: State
    """Shapes of the state that a checkpoint of this stage holds."""
    frozen: Frozen
    """Shapes of what the steps leave as it is."""
    words: dict[str, int]
    """Vectors of each new word of this stage and the stages before it, in the order of their rows."""
    new_words: dict[str, Rows | int]
    """The words that this stage adds: the number of vectors, or the vectors of a file."""
    adapters: dict[str, PyTree]
    """The adapters of a file that those of this stage begin as, by part."""
    result: Results
    """Shapes of the results of this stage and the stages before it."""
    numbers: dict[str, Any] = {}  # noqa: RUF012
    """The settings that the step must read from `Frozen.numbers`, because copies differ in them."""
    files_beneath: int = 0
    """Files of [base], each of which counts as a stage before the first."""
    shared: bool = False
    """Whether this stage and those before it are the same in all copies. Then one of them trains for all."""

    @property
    def stage(self) -> Stage:
        """The settings of the stage."""
        return self.recipe.stage

    @property
    def records(self) -> Sequence[Record]:
        """The training images."""
        return records.together([*self.buckets.values()])

    @property
    def holes(self) -> int:
        """Masks of each crop in training for inpainting; 0 in other training."""
        return stage_images.holes(self.data, self.stage)

    @property
    def examples(self) -> int:
        """Images that an optimizer step takes, class images included."""
        return self.data.batch_size * self.data.accumulation * (2 if self.stage.has_prior else 1)

    def order(self, repeats: tuple[Int32[np.ndarray, " N"], ...], seed: int) -> Order:
        """Returns the order of the batches. repeats: see `Dataset.repeats`. Each stage has another order."""
        data = self.data
        return Order(
            repeats,
            data.batch_size * data.accumulation,
            seed + (self._place << 32),
            flip=data.flip,
            caption_dropout=data.caption_dropout,
            crops=max(1, data.random_crops),
            versions=len(next(iter(self.buckets.values()))[0].captions),  # every record has as many
            holes=max(1, self.holes),
        )

    def keys(self, seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        """Returns the key of the first values and the key of the steps."""
        first, steps = jax.random.split(jax.random.fold_in(jax.random.key(seed), self._place))
        return first, steps

    @property
    def _place(self) -> int:
        """The number that sets the randomness: a stage on a file takes the same steps as on the stage that made it."""
        return self.number + self.files_beneath


class Run(NamedTuple):
    """A checked run."""

    config: RunConfig
    outline: Outline
    fingerprint: str
    """Digest of the model: its weights, configs, schedule and tokenizers."""
    beneath: Beneath
    """The files that lie beneath all stages."""
    stages: tuple[StagePlan, ...]
    identity: dict[str, Any]
    """Dotted key -> value of everything that a resumed run is compared by; see `config_file.compare_runs`."""

    def before(self, number: int) -> Results:
        """Returns the shapes of the results of the stages before a stage. number: that of the stage."""
        return self.stages[number - 1].result if number else self.beneath.results


def plan_runs(config: RunConfig, devices: Sequence[Any] | None = None) -> tuple[Run, ...]:
    """Checks everything that can be checked before weights are read. Raises ConfigError and DataError.

    Returns one run, or a run for each copy. Copies step in one program, so their shapes must agree.
    devices: those of another machine, to plan a run for it, which needs no weights; by default JAX's devices.
    """
    scan = functools.cache(stage_images.scan_folder)
    runs = tuple(plan_run(member, scan, devices) for member in config.members())
    plans = []
    shared = len(runs) > 1
    for alike in zip(*(run.stages for run in runs), strict=True):
        first, below_shared = alike[0], shared
        same = runs[0].config.seed, first.stage, first.data
        shared &= all((run.config.seed, plan.stage, plan.data) == same for run, plan in zip(runs, alike, strict=True))
        for copy, plan in zip(config.copies, alike, strict=False):
            where = f"copies, stage {plan.stage.name}"
            if _shapes(plan.state) != _shapes(first.state):
                raise ConfigError(f"{where}: {copy.name} and {config.copies[0].name} train words of other sizes")
            if beneath(plan.stage, runs[0].before(plan.number)).adapters and not below_shared:
                raise ConfigError(f"{where} stands on a LoRA of its own in each copy; they share one base model")
        chunks = max(plan.chunks for plan in alike)
        numbers = _differing([plan.stage for plan in alike])
        plans.append(
            [
                plan._replace(chunks=chunks, shared=shared, numbers=own, frozen=_with_shapes(plan.frozen, own))
                for plan, own in zip(alike, numbers, strict=True)
            ]
        )
    return tuple(run._replace(stages=tuple(stages)) for run, stages in zip(runs, zip(*plans, strict=True), strict=True))


READ_BY_STEP = ("learning_rate", "weight_decay", "huber_c", "min_snr_gamma", "noise_offset", "input_perturbation")
"""Those of `config.NUMBERS` that a step takes from the stage. The others are in its scales, norms and batches."""


def _differing(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Returns for each of several stages the settings that a step reads and that are not the same in all of them."""
    values: list[dict[str, Any]] = [
        {name: getattr(stage, name) for name in READ_BY_STEP} | {"learning_rate": peak_rates(stage, stage.parts)}
        for stage in stages
    ]
    differing = [name for name in READ_BY_STEP if any(each[name] != values[0][name] for each in values)]
    return [jax.tree.map(np.float32, {name: each[name] for name in differing}) for each in values]


def _with_shapes(frozen: Frozen, numbers: dict[str, Any]) -> Frozen:
    return {**frozen, "numbers": jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), numbers)}


def _shapes(tree: PyTree) -> Any:
    return jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)]


def plan_run(
    config: RunConfig, scan: stage_images.Scan = stage_images.scan_folder, devices: Sequence[Any] | None = None
) -> Run:
    """Checks one run; see `plan_runs`. scan: what reads the folders of images."""
    weights = devices is None
    data = [config.data_of(stage) for stage in config.stages]
    images = [
        stage_images.find(own, stage, f"stages.{i}", config.seed, scan, _cache(config, own) if weights else None)
        for i, (own, stage) in enumerate(zip(data, config.stages, strict=True))
    ]
    checks.check_output(config, data)
    platform = None if devices is None else devices[0].platform
    outline = Outline.load(
        config.model,
        config.dtype,
        variant=config.variant or None,
        vae=config.vae or None,
        platform=platform,
        base_dtype=config.base_dtype,
        weights=weights,
    )
    schedule = diffusion.altered(
        outline.schedule, prediction_type=config.prediction_type, zero_terminal_snr=config.zero_terminal_snr
    )
    outline = dataclasses.replace(outline, schedule=schedule)
    outline = _with_remat(outline, config.remat_policy) if config.remat else outline
    checks.check_model(config, outline)
    fingerprint = _fingerprint(outline) if weights else ""
    below = read_base(config, outline)
    outline = dataclasses.replace(outline.with_embedding(below.words), loras=below.loras)
    stages: list[StagePlan] = []
    for number, stage in enumerate(config.stages):
        before = stages[-1] if stages else None
        stages.append(_plan_stage(config, number, data[number], images[number], outline, below, before, devices))
        assigned = stages[-1].buckets
        repeats = tuple(map(records.repeats_of, assigned.values()))
        shown = describe(stages[-1].order(repeats, config.seed), stage.steps, tuple(assigned))
        log.info("stage %s: %s", stage.name, shown)
    digests = {
        f"fingerprint.data.{stage.name}": found.fingerprint for stage, found in zip(config.stages, images, strict=True)
    }
    files = {f"fingerprint.files.{key}": name for key, name in below.files.items()} | _first_files(config)
    identity = flatten(config) | {"fingerprint.model": fingerprint} | files | digests
    return Run(config, outline, fingerprint, below, tuple(stages), identity)


def prepare(
    run: Run, plan: StagePlan, earlier: Results, params: dict[str, PyTree] | None = None
) -> tuple[State, Frozen]:
    """Loads the weights of a stage, and returns its first state and what its steps leave as it is.

    params: part -> weights, if they are in memory already.
    """
    recipe, below = plan.recipe, beneath(plan.stage, earlier)
    parts = recipe.stage.parts
    dtypes = {part: jnp.float32 if parts.get(part) == "weights" else None for part in recipe.models}
    params = params or {part: base_weights(recipe.outline, part, below, dtype=dtypes[part]) for part in recipe.models}
    key, _ = plan.keys(run.config.seed)
    new_rows, norms = first_rows(recipe, key, params, plan.new_words) if "textual_inversion" in parts else ({}, {})
    state, scales, rows = jax.jit(functools.partial(begin, recipe))(key, params, earlier, new_rows, plan.adapters)
    left = {part: weights for part, weights in params.items() if parts.get(part) != "weights"}
    return state, {"params": left, "scales": scales, "rows": rows, "norms": norms, "numbers": plan.numbers}


def _cache(config: RunConfig, data: Data) -> Path:
    return Path(data.cache or Path(config.output) / "cache")


def _with_remat(outline: Outline, policy: RematPolicy) -> Outline:
    def remat(module: Any) -> Any:
        return module.clone(compute=dataclasses.replace(module.compute, remat=policy))

    texts = {name: remat(module) for name, module in outline.text_models.items()}
    return dataclasses.replace(outline, unet=remat(outline.unet), vae=remat(outline.vae), text_models=texts)


def _plan_stage(
    config: RunConfig,
    number: int,
    data: Data,
    images: stage_images.Images,
    outline: Outline,
    below: Beneath,
    before: StagePlan | None,
    devices: Sequence[Any] | None,
) -> StagePlan:
    stage = config.stages[number]
    key = f"stages.{number}"
    checks.check_stage(config, stage, key, data, outline)
    earlier_words = before.words if before else textual_inversion.vector_counts(below.words)
    new_words = _new_words(stage, key, earlier_words, outline)
    words = earlier_words | {word: _vectors(given) for word, given in new_words.items()}
    checks.check_file_names(words, key)
    rows = places(words)
    own = {word: count for word, count in words.items() if word not in below.words}  # the outline knows the others
    recipe = Recipe(
        outline=_knowing(outline, own, key),
        stage=stage,
        optimizer=make_optimizer(stage, stage.parts),
        hidden=outline.hidden_state(config.clip_skip),
        accumulation=data.accumulation,
        rows=tuple(row for word in stage.placeholder_tokens for row in rows[word]),
    )
    parallel = parallelize_stage(config, data, make_train_step(recipe), recipe, devices)
    checks.check_tensor(parallel, outline, config.model)
    earlier = before.result if before else below.results
    adapters = first_adapters(stage, key, outline)
    try:
        state, frozen, total = _result_shapes(recipe, earlier, sum(map(_vectors, new_words.values())), adapters)
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from None
    assigned = stage_images.assign(data, images.training, key, outline)
    chunks = checks.count_chunks(images, stage.prior_prompt, recipe.outline, key)
    return StagePlan(
        *(number, data, assigned, images.held_out, images.classes, chunks, recipe),
        *(parallel, state, frozen, words, new_words, adapters, total),
        files_beneath=len(below.files),
    )


def _result_shapes(
    recipe: Recipe, earlier: Results, vectors: int, adapters: Mapping[str, PyTree]
) -> tuple[State, Frozen, Results]:
    """Returns the shapes of what `prepare` returns and of the results after the stage.

    vectors: of the words that the stage adds. adapters: those of a file that its adapters begin as.
    """
    outline, parts = recipe.outline, recipe.stage.parts
    trained_whole = [part for part in recipe.models if parts.get(part) == "weights"]
    params = {
        part: _as_float32(outline.shapes[part]) if part in trained_whole else outline.abstract_params(part)
        for part in recipe.models
    }
    new_rows = {
        name: jax.ShapeDtypeStruct((vectors, width), jnp.float32) for name, width in outline.text_widths.items()
    }

    def run(
        key: PRNGKeyArray, params: dict[str, PyTree], earlier: Results, new_rows: PyTree, adapters: PyTree
    ) -> tuple[State, Frozen, Results]:
        state, scales, rows = begin(recipe, key, params, earlier, new_rows, adapters)
        left = {part: weights for part, weights in params.items() if part not in trained_whole}
        norms = {name: jnp.float32(0) for name in new_rows} if "textual_inversion" in parts else {}
        frozen: Frozen = {"params": left, "scales": scales, "rows": rows, "norms": norms, "numbers": {}}
        return state, frozen, after(recipe, earlier, state, frozen)

    return jax.eval_shape(run, jax.random.key(0), params, earlier, new_rows, adapters)


def parallelize_stage(
    config: RunConfig, data: Data, train_step: TrainStep, recipe: Recipe, devices: Sequence[Any] | None = None
) -> Parallel:
    """Returns the step of a stage on the devices that the run asks for. devices: by default all of JAX."""
    mesh = config.parallel.mesh
    size = data.batch_size * (2 if recipe.stage.has_prior else 1)
    # The kernels' gradients do not depend on each other. On the CPU, a step that trains whole models takes 0.8 of the
    # time if they are computed side by side.
    save_memory = "weights" not in recipe.stage.parts.values()
    return parallelize(
        train_step,
        batch_size=size,
        mode=config.parallel.mode,
        data=mesh.data,
        fsdp=mesh.fsdp,
        tensor=mesh.tensor,
        devices=devices,
        large=is_large(recipe.outline.shapes),
        save_memory=save_memory,
    )


def _new_words(stage: Stage, key: str, earlier: Mapping[str, int], outline: Outline) -> dict[str, Rows | int]:
    """Returns the words that a stage adds to earlier ones: the number of vectors of each, or the vectors of a file."""
    counts = stage.vectors_per_token * (len(stage.placeholder_tokens) if len(stage.vectors_per_token) == 1 else 1)
    inits = stage.init_tokens or ("",) * len(counts)
    widths = outline.text_widths
    words: dict[str, Rows | int] = {}
    for word, count, init in zip(stage.placeholder_tokens, counts, inits, strict=False):
        if word in earlier:
            continue
        words[word] = count
        if _is_file(init):
            found = load_embedding(init, widths)
            if len(found) != 1:
                raise ConfigError(f"{key}.init_tokens: {init} holds {len(found)} words: give a file of one")
            words[word] = next(iter(found.values()))
    return words


def _is_file(init: str) -> bool:
    return Path(init).suffix in (".safetensors", ".bin", ".pt")


def _first_files(config: RunConfig) -> dict[str, str]:
    """Returns the digests of the files that adapters and words of stages begin as, by the keys of `Run.identity`."""
    digests = {}
    for number, stage in enumerate(config.stages):
        inits = {"lora_init": stage.lora_init} if stage.lora_init else {}
        inits |= {f"init_tokens.{i}": init for i, init in enumerate(stage.init_tokens) if _is_file(init)}
        digests |= {f"fingerprint.files.stages.{number}.{name}": digest(init) for name, init in inits.items()}
    return digests


def _vectors(given: Rows | int) -> int:
    return given if isinstance(given, int) else len(next(iter(given.values())))


def _knowing(outline: Outline, words: Mapping[str, int], key: str) -> Outline:
    """Returns the outline with the words in its tokenizers."""
    try:
        return outline.with_words(words)
    except ConfigError as e:
        raise ConfigError(f"{key}.placeholder_tokens: {e}") from None


def _as_float32(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)


_NOT_COMPUTED = ("_name_or_path", "_diffusers_version", "_guidance_scale", "transformers_version")


def _fingerprint(outline: Outline) -> str:
    """Returns a digest of everything that the computation takes from the model.

    That is the content of all files of weights and tokenizers, the configs, the schedule and the settings of the index.
    """
    folder = outline.folder
    settings = {key: value for key, value in folder.model_index.items() if not isinstance(value, list)}
    plain = {**folder.configs, "scheduler": {**folder.scheduler, **outline.schedule.config}, "settings": settings}
    digest = hashlib.sha256()
    for name, config in sorted(plain.items()):
        known = {key: value for key, value in config.items() if key not in _NOT_COMPUTED}
        digest.update(json.dumps([name, known], sort_keys=True).encode())
    weights = {path for paths in folder.weights.values() for path in paths}
    tokenizers = {path for place in folder.tokenizers.values() for path in place.iterdir() if path.is_file()}
    for path in sorted(weights | tokenizers):
        digest.update(f"{path.parent.name}/{path.name} {file_digest(path)}".encode())
    return digest.hexdigest()
