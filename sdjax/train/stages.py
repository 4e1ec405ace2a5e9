"""A run as a list of stages: what each trains on which data, checked before any weight is read, then made ready.

`plan_run` needs the model's configs, tokenizers and weight headers only. `prepare` then encodes a stage's data (or
finds it in the cache), frees the models that did so, loads what is trained or frozen, and makes the adapters.

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
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree, UInt8

from sdjax import lora, sampling
from sdjax.config import Data, RunConfig, Stage
from sdjax.config_file import flatten
from sdjax.data import cache, plan, records
from sdjax.data.dataset import Dataset, join
from sdjax.data.images import to_float
from sdjax.data.records import Record
from sdjax.errors import ConfigError, DataError
from sdjax.models.vae import AutoencoderKL
from sdjax.pipeline import StableDiffusion, encode_ids, load_weights, outline
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

    dataset: Dataset
    held_out: Dataset | None
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
    """Encode the stage's images and captions or find them in the cache, then load what the steps need."""
    dataset, held_out = _encode(run, stage, earlier)
    parts = ["unet", *(run.model.text_models if stage.recipe.trains_text else ())]
    params = {part: base_weights(run.model, part, earlier) for part in parts}
    first, _ = stage.keys(run.config.seed)
    adapted = {part: params[part] for part in stage.stage.lora_parts}
    trainable, scales = jax.jit(functools.partial(_init_adapters, stage.stage))(first, adapted)
    state = init_state(stage.recipe.optimizer, trainable)
    return Ready(dataset, held_out, {"params": params, "scales": scales}, state)


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


# ----------------------------------------------------------------------------------------------------------------- data


def _encode(run: Run, stage: StagePlan, earlier: Adapters) -> tuple[Dataset, Dataset | None]:
    """Latents and texts of the training and the held-out images; the models that make them are read only if needed."""
    model, data = run.model, stage.data
    folder = data.cache or Path(run.config.output) / "cache"
    vae_weights = functools.cache(lambda: load_weights(model, "vae"))
    shared = {
        "folder": folder,
        "model": f"{run.fingerprint} {run.config.dtype}",
        "resolution": data.resolution,
        "background": data.background,
        "on_bad_image": data.on_bad_image,
        # Like drawing, which decodes one picture at a time: large ones would fill the memory.
        "batch_size": 8 if data.resolution <= 128 else 1,
    }

    def encode_images(images: UInt8[np.ndarray, "B R R 3"]) -> Array:
        return _moments(model.vae, vae_weights(), to_float(images))

    def latents(kind: str, wanted: tuple[Record, ...], flip: bool) -> cache.Latents:
        with _bar(f"{stage.stage.name}: encoding {kind} images", len(wanted)) as bar:
            return cache.cache_latents(
                wanted, encode_images, flip=flip, progress=lambda done, _: bar.update(done - bar.n), **shared
            )

    training = latents("training", stage.records, data.flip)
    held_out = latents("held-out", stage.held_out, False) if stage.held_out else None
    captions = [record.caption for record in (*stage.records, *stage.held_out)]
    texts = _encode_texts(run, stage, captions, earlier, folder)
    return join(training, texts), None if held_out is None else join(held_out, texts)


def _encode_texts(
    run: Run, stage: StagePlan, captions: list[str], earlier: Adapters, folder: str | Path
) -> cache.Texts:
    """Context (and SDXL's pooled vector) of each caption; only its token ids if the text models are trained."""
    model, recipe = run.model, stage.recipe
    adapters = {part: tree for part, tree in earlier.items() if part in model.text_models}
    weights = functools.cache(lambda: {part: base_weights(model, part, adapters) for part in model.text_models})
    zeroed = model.is_sdxl and bool(model.folder.model_index.get("force_zeros_for_empty_prompt"))

    def encode(captions: list[str]) -> dict[str, Any]:
        arrays: dict[str, Any] = {"empty": np.array([not caption for caption in captions])} if zeroed else {}
        ids = model.tokenize(captions, chunks=stage.windows)
        if recipe.trains_text:
            return arrays | ids
        context, pooled = encode_ids(model.text_models, weights(), ids, recipe.hidden)
        return arrays | {"context": context} | ({"pooled": pooled} if model.is_sdxl else {})

    settings = {
        "ids": recipe.trains_text,
        "windows": stage.windows,
        "hidden": dataclasses.asdict(recipe.hidden),
        "dtype": run.config.dtype,
        "earlier": [hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in jax.tree.leaves(adapters)],
    }
    return cache.cache_texts(captions, encode, folder=folder, model=run.fingerprint, settings=settings)


@functools.partial(jax.jit, static_argnums=0)
def _moments(module: AutoencoderKL, params: PyTree, images: Array) -> Array:
    return jnp.asarray(module.apply({"params": params}, images, method="encode"))


def _bar(title: str, total: int):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="image", leave=False, disable=None)
