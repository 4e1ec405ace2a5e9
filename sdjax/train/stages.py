"""A run as a list of stages: what each trains on which data, checked before any weight is read, then made ready.

`plan_run` needs the model's configs, tokenizers and weight headers only. `prepare` then loads what is trained or
frozen and makes the adapters, once `sdjax.train.encoding` has encoded the stage's data.

A stage stands on what the earlier ones made: their adapters are merged into its frozen weights, and what it exports is
the exact sum of all of them (ranks laid side by side), so that the last export is the whole result.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PRNGKeyArray, PyTree

from sdjax import lora, sampling
from sdjax.config import Data, RunConfig, Stage
from sdjax.config_file import flatten
from sdjax.data import plan, records
from sdjax.data.records import Record
from sdjax.errors import ConfigError, DataError
from sdjax.pipeline import StableDiffusion, load_weights, outline
from sdjax.train.optimizers import make_optimizer
from sdjax.train.parallel import Parallel, parallelize
from sdjax.train.step import Recipe, State, init_state, join_adapters, make_train_step

log = logging.getLogger(__name__)

Adapters = dict[str, PyTree]
"""Part (`unet`, `text_encoder`, ...) -> complete LoRA tree."""


class StagePlan(NamedTuple):
    """One stage, as far as it is known without weights."""

    number: int
    data: Data
    records: tuple[Record, ...]
    held_out: tuple[Record, ...]
    windows: int
    """Windows of the text models that the longest caption takes."""
    recipe: Recipe
    parallel: Parallel
    state: State
    """Shapes of what a checkpoint holds of this stage."""
    result: Adapters
    """Shapes of the adapters after this stage, those of earlier stages added."""

    @property
    def stage(self) -> Stage:
        return self.recipe.stage

    @property
    def examples(self) -> int:
        """Images an optimizer step takes."""
        return self.data.batch_size * self.data.accumulation

    def batches(self, size: int, seed: int) -> plan.Plan:
        """The order of a data set of `size` images; every stage has its own."""
        seed += self.number << 32
        return plan.Plan(size, self.examples, seed, self.data.flip, self.data.caption_dropout)

    def keys(self, seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        """The key of the adapters' first values and the key of the steps."""
        first, steps = jax.random.split(jax.random.fold_in(jax.random.key(seed), self.number))
        return first, steps


class Run(NamedTuple):
    """A checked run."""

    config: RunConfig
    model: StableDiffusion
    """Without weights: `pipeline.outline`."""
    fingerprint: str
    """Of the model's weights."""
    stages: tuple[StagePlan, ...]
    identity: dict[str, Any]
    """What a checkpoint remembers of its run, for `checkpoint.compare_runs`."""


class Ready(NamedTuple):
    """One stage with everything it needs in memory."""

    frozen: PyTree
    """`params` and `scales` as the step wants them, not yet placed on the devices."""
    state: State


def plan_run(config: RunConfig) -> Run:
    """Check everything that can be checked before weights are read. Raises ConfigError and DataError."""
    if config.dtype == "float16":
        raise ConfigError(
            "dtype = 'float16' underflows in training; use 'bfloat16', or 'float32' where that is missing"
        )
    data = [config.data_of(stage) for stage in config.stages]
    found = [_find_images(d, f"stages.{i}") for i, d in enumerate(data)]
    model = outline(config.model, config.dtype, variant=config.variant or None)
    model = _with_remat(model) if config.remat else model
    _check_model(config, model)
    fingerprint = _fingerprint(model)
    stages: list[StagePlan] = []
    for number, stage in enumerate(config.stages):
        training, held_out, _ = found[number]
        earlier = stages[-1].result if stages else {}
        stages.append(_plan_stage(config, number, data[number], training, held_out, model, earlier))
        log.info("stage %s: %s", stage.name, plan.describe(stages[-1].batches(len(training), config.seed), stage.steps))
    digests = {
        f"fingerprint.data.{stage.name}": images for stage, (_, _, images) in zip(config.stages, found, strict=True)
    }
    identity = flatten(config) | {"fingerprint.model": fingerprint} | digests
    return Run(config, model, fingerprint, tuple(stages), identity)


def prepare(run: Run, stage: StagePlan, earlier: Adapters) -> Ready:
    """Load what the steps of a stage need, and make what it trains."""
    parts = ["unet", *(run.model.text_models if stage.recipe.trains_text else ())]
    params = {part: base_weights(run.model, part, earlier) for part in parts}
    first, _ = stage.keys(run.config.seed)
    adapted = {part: params[part] for part in stage.stage.lora_parts}
    trainable, scales = jax.jit(functools.partial(_init_adapters, stage.stage))(first, adapted)
    state = init_state(stage.recipe.optimizer, trainable)
    return Ready({"params": params, "scales": scales}, state)


def base_weights(model: StableDiffusion, part: str, adapters: Mapping[str, PyTree]) -> dict[str, Any]:
    """The weights of one part, read from its file, with an adapter merged in if there is one for it."""
    weights = load_weights(model, part)
    return lora.merge(weights, adapters[part]) if part in adapters else weights


def result(earlier: Adapters, state: State, scales: PyTree) -> Adapters:
    """What all stages so far have made: the sum of the earlier adapters and the stage's own."""
    own = join_adapters(state.trainable, scales)
    return _sum(earlier, own)


# ---------------------------------------------------------------------------------------------- checks, without weights


def _find_images(data: Data, key: str) -> tuple[tuple[Record, ...], tuple[Record, ...], str]:
    """Training images, held-out images, and a fingerprint of everything under data.path."""
    scan = functools.partial(records.scan, caption=data.caption, missing_caption=data.missing_caption)
    everything = scan(data.path)
    training, held_out = everything, ()
    if data.validation_path:
        if not Path(data.validation_path).is_dir():
            raise DataError(f"{key}: data.validation_path = {data.validation_path!r} is not a folder")
        held_out = scan(data.validation_path)
    elif data.validation_count or data.validation_fraction:
        training, held_out = records.split(everything, count=data.validation_count, fraction=data.validation_fraction)
    return training, held_out, records.fingerprint(everything)


def _check_model(config: RunConfig, model: StableDiffusion) -> None:
    if model.unet.config.in_channels != model.vae.config.latent_channels:
        raise ConfigError(
            f"{config.model} is an inpainting model, which cannot be trained yet; use its standard sister"
        )
    model.hidden_state(config.clip_skip)
    if config.validation.prompts:
        sampling.plan(model.schedule, config.validation.sampler, config.validation.steps)
    for part in model.params:
        model.folder.tensors(part)  # a truncated or foreign file is refused by its header


def _with_remat(model: StableDiffusion) -> StableDiffusion:
    def remat(module: Any) -> Any:
        return module.clone(compute=dataclasses.replace(module.compute, remat=True))

    texts = {name: remat(module) for name, module in model.text_models.items()}
    return dataclasses.replace(model, unet=remat(model.unet), text_models=texts)


def _plan_stage(
    config: RunConfig,
    number: int,
    data: Data,
    training: tuple[Record, ...],
    held_out: tuple[Record, ...],
    model: StableDiffusion,
    earlier: Adapters,
) -> StagePlan:
    stage = config.stages[number]
    key = f"stages.{number}"
    for part in stage.lora_parts:
        if part not in model.params:
            choices = ", ".join(name for name in model.params if name != "vae")
            raise ConfigError(f"{key}.lora_parts: {config.model} has no {part}; it has {choices}")
    factor, native = model.vae.config.factor, model.unet.config.sample_size * model.vae.config.factor
    if data.resolution % factor:
        raise ConfigError(
            f"{key}: data.resolution = {data.resolution} must be a multiple of {factor} for {config.model}"
        )
    if not native / 4 <= data.resolution <= native * 4:
        raise ConfigError(
            f"{key}: data.resolution = {data.resolution} is far from the {native} pixels of {config.model}"
        )
    if data.resolution != native:
        log.warning("%s: resolution %d, but the model was trained at %d", key, data.resolution, native)
    recipe = Recipe(
        model=model,
        stage=stage,
        optimizer=make_optimizer(stage, stage.lora_parts),
        hidden=model.hidden_state(config.clip_skip),
        resolution=data.resolution,
        accumulation=data.accumulation,
    )
    mesh = config.parallel.mesh
    parallel = parallelize(
        make_train_step(recipe), batch_size=data.batch_size, mode=config.parallel.mode, data=mesh.data, fsdp=mesh.fsdp
    )
    adapted = {part: model.params[part] for part in stage.lora_parts}
    try:
        trainable, scales = jax.eval_shape(functools.partial(_init_adapters, stage), jax.random.key(0), adapted)
        state = jax.eval_shape(functools.partial(init_state, recipe.optimizer), trainable)
        total = jax.eval_shape(_sum, earlier, join_adapters(trainable, scales))
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from None
    captions = [record.caption for record in (*training, *held_out)]
    windows = max(t.chunks(caption) for t in model.tokenizers.values() for caption in captions)
    return StagePlan(number, data, training, held_out, windows, recipe, parallel, state, total)


def _fingerprint(model: StableDiffusion) -> str:
    """Digest of the weight files' sizes and of 256 KiB at 16 even places: a training changes every one of them."""
    digest = hashlib.sha256()
    for part, files in sorted(model.folder.weights.items()):
        for path in files:
            size = path.stat().st_size
            digest.update(f"{part} {size}".encode())
            with path.open("rb") as file:
                for i in range(16):
                    file.seek(max(0, size - (256 << 10)) * i // 15)
                    digest.update(file.read(256 << 10))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- adapters


def _init_adapters(
    stage: Stage, key: PRNGKeyArray, params: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """(what is trained, scales) by part; with them the model computes exactly what it did."""
    trainable, scales = {}, {}
    for i, part in enumerate(stage.lora_parts):
        try:
            adapter = lora.init(
                jax.random.fold_in(key, i),
                params[part],
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
        trainable[part], scales[part] = lora.split(adapter)
    return trainable, scales


def _sum(earlier: Adapters, own: Adapters) -> Adapters:
    """Both adapters as one, exactly."""
    return {
        part: lora.add([(trees[part], 1.0) for trees in (earlier, own) if part in trees])
        for part in dict.fromkeys([*earlier, *own])
    }
