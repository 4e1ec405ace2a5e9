"""The programs that a training run compiles, from shapes alone."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from sdjax.data.cache import TEXTS_AT_ONCE, storable
from sdjax.data.dataset import NEGATIVE
from sdjax.data.images import Size
from sdjax.data.records import captions_of
from sdjax.draw.programs import drawing
from sdjax.errors import ConfigError
from sdjax.models.layers import variables
from sdjax.runtime.chips import Target
from sdjax.runtime.compiled import Program, compile_for, fits, on_mesh
from sdjax.settings import RematPolicy
from sdjax.text.encoding import compiled_encode_ids
from sdjax.train.config import RunConfig, check
from sdjax.train.encoding import compiled_moments, images_at_once
from sdjax.train.parallel import stack, together
from sdjax.train.partition import mesh_sizes
from sdjax.train.stages import Run, StagePlan, parallelize_stage, plan_runs
from sdjax.train.step import make_train_step
from sdjax.train.validation import make_held_out_errors


def training(config: RunConfig, devices: Sequence[Any]) -> Iterator[Program]:
    """Yields the programs of all stages. Of a run in buckets, the step is that of the largest bucket.

    devices: those that the run is planned for. Raises ConfigError and DataError as `plan_runs` does.
    """
    runs = plan_runs(config, devices)
    for plans in zip(*(run.stages for run in runs), strict=True):
        yield from _stage(config, runs[0], plans, devices)


def _stage(config: RunConfig, run: Run, plans: Sequence[StagePlan], devices: Sequence[Any]) -> list[Program]:
    plan = plans[0]
    outline, size = plan.recipe.outline, largest(plan)
    latents = "vae" not in plan.stage.parts
    programs = list(_encoding(plan, size)) if latents else []
    programs.append(step(config, plans, devices))
    beside: list[Program] = []  # those of the validation
    validations = len(config.validation_steps(plan.number))
    resident = plan.parallel.place_state(plan.state), plan.parallel.place_frozen(plan.frozen)
    if plan.held_out and latents:
        square = Size(plan.data.resolution, plan.data.resolution)
        errors = make_held_out_errors(plan.recipe, config.validation)
        images = min(config.validation.held_out_images or len(plan.held_out), len(plan.held_out))
        count = min(plan.data.batch_size, images)
        batch = {
            name: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in batch_shapes(plan, square).items()
            if name not in ("mask", "weight")
        }
        weights = plan.state.trainable, plan.frozen

        def held_out_loss(place: Any) -> Any:
            (trainable, frozen), *others = place(weights, batch, jax.ShapeDtypeStruct((), jnp.int32))
            return errors.lower(trainable, frozen, *others)

        runs = validations * config.validation.held_out_timesteps * -(-images // count)
        beside.append(Program("held-out loss", held_out_loss, runs, resident))
    if config.validation.prompts and latents:
        how = config.validation
        drawn = drawing(
            outline,
            Size(plan.data.resolution, plan.data.resolution),
            count=1,
            steps=how.steps,
            sampler=how.sampler,
            guided=(outline.guidance if how.guidance is None else how.guidance) != 1,
            clip_skip=config.clip_skip,
        )
        pictures = validations * len(how.prompts)
        beside += [program._replace(runs=program.runs * pictures, resident=resident) for program in drawn]
    if (mesh := plan.parallel.mesh) is not None:
        beside = [on_mesh(mesh, plan.parallel.place_model, program) for program in beside]
    programs += beside
    return [program._replace(name=f"{plan.stage.name}: {program.name}") for program in programs]


def largest(plan: StagePlan) -> Size:
    """Returns the size of the largest bucket, in pixels."""
    return max(plan.buckets, key=lambda size: size.height * size.width)


def step(config: RunConfig, plans: Sequence[StagePlan], devices: Sequence[Any]) -> Program:
    """Returns the training step on images of the largest size. plans: the same stage of all copies, or of the run."""
    plan, parallel = plans[0], plans[0].parallel
    arguments: Any = (plan.state, plan.frozen, batch_shapes(plan, largest(plan)), jax.eval_shape(jax.random.key, 0))
    if len(plans) > 1 and not plan.shared:
        train_step = together(make_train_step(plan.recipe))
        parallel = parallelize_stage(config, plan.data, train_step, plan.recipe, devices)
        axes = (0, 0, 1, 0)
        state, frozen, batch, key = (
            jax.eval_shape(lambda *trees, axis=axis: stack(trees, axis), *[tree] * len(plans))
            for tree, axis in zip(arguments, axes, strict=True)
        )
        arguments = (state, {**frozen, "params": plan.frozen["params"]}, batch, key)

    def lower(place: Any) -> Any:
        state, frozen, batch, key = arguments
        placed = parallel.place_state(state), parallel.place_frozen(frozen), parallel.place_batch(batch)
        return parallel.step.lower(*placed, key)

    return Program("step", lower, plan.stage.steps, devices=parallel.devices)


def batch_shapes(plan: StagePlan, size: Size) -> dict[str, PyTree]:
    """Returns the shapes of the batch of an optimizer step; see `train.step`. size: of the images in pixels."""
    outline, stage, count = plan.recipe.outline, plan.stage, plan.examples
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((count, *shape), dtype)
    batch = {"index": array(jnp.int32)} | ({"weight": array(jnp.float32)} if stage.has_prior else {})
    if "vae" in stage.parts:
        return batch | {"pixels": array(jnp.uint8, *size, 3)}
    encoded, channels = storable(outline.dtype("vae")), outline.vae.config.latent_channels
    cells = tuple(side // outline.vae.config.factor for side in size)
    batch["moments"] = array(encoded, *cells, 2 * channels)
    if outline.is_sdxl:
        batch["sizes"] = array(jnp.float32, 6)
    batch |= {"mask": array(jnp.float32, *cells, 1)} if stage.masked_loss else {}
    batch |= {"hole": array(jnp.float32, *cells, 1)} if plan.holes else {}
    batch |= {"kept": array(encoded, *cells, channels)} if plan.holes and outline.is_inpainting else {}
    batch |= {"empty": array(jnp.bool_)} if outline.is_sdxl and outline.zeros_empty_prompts else {}
    if plan.recipe.trains_text:
        return batch | outline.abstract_ids(count, plan.chunks)
    context, pooled = outline.abstract_context(count, plan.chunks, plan.recipe.hidden.clip_skip)
    texts = {"context": context} | ({"pooled": pooled} if outline.is_sdxl else {})
    batch |= {name: array(storable(text.dtype), *text.shape[1:]) for name, text in texts.items()}
    if stage.consistency_steps:
        batch |= {NEGATIVE + name: batch[name] for name in ("context", "pooled", "empty") if name in batch}
    return batch


def advice(config: RunConfig, target: Target) -> list[str]:
    """Returns a line for each change of the settings that makes the training steps fit, or for all changes together.

    Of several values of one setting, the one that costs least speed. Each change is compiled, which can take minutes.
    An empty list: nothing makes the steps fit.
    """
    advised = lambda changes: (
        line for name, changed in changes.items() if (line := _advised(name, changed, config, target))
    )
    changes = _changes(config, len(target.devices))
    lines = [line for values in changes if (line := next(advised(values), None))]
    if not lines and len(changes) > 1:
        strongest = [list(values.items())[-1] for values in changes]
        together = {key: value for _, changed in strongest for key, value in changed.items()}
        lines = list(advised({", ".join(name for name, _ in strongest): together}))
    return lines


def _advised(name: str, changed: dict[str, Any], config: RunConfig, target: Target) -> str:
    """Returns a line if the training steps fit with changed settings, else an empty text."""
    config = dataclasses.replace(config, **changed)
    try:
        check(config)
        runs = plan_runs(config, target.devices)
    except ConfigError:  # such a run is not possible
        return ""
    programs = [
        step(config, plans, target.devices)._replace(name=f"{plans[0].stage.name}: step with {name}")
        for plans in zip(*(run.stages for run in runs), strict=True)
    ]
    planned = compile_for(target, programs)
    most = max(each.memory for each in planned)
    return f"{name}: {most / 1e9:.1f} GB" if all(fits(each, target) for each in planned) else ""


def _changes(config: RunConfig, devices: int) -> list[dict[str, dict[str, Any]]]:
    """Returns changes that save memory: for each setting its values by name, as the settings to replace.

    The settings and values that cost least speed come first.
    """
    replace = dataclasses.replace
    mesh = config.parallel.mesh
    data, fsdp, _ = mesh_sizes(devices, *mesh.sizes)
    smallest = data * fsdp
    size, times = config.data.batch_size, 1
    while size % 2 == 0 and size // 2 >= smallest:
        size, times = size // 2, times * 2
    data = replace(config.data, batch_size=size, accumulation=config.data.accumulation * times)
    stages = tuple(
        replace(stage, optimizer="adafactor") if "weights" in stage.parts.values() else stage for stage in config.stages
    )
    axis = "fsdp" if config.data.batch_size % devices == 0 else "tensor"  # which computes each example on all devices
    parallel = replace(config.parallel, mesh=replace(mesh, **{"data": 1, "fsdp": 1, "tensor": 1, axis: devices}))
    policies = get_args(RematPolicy)
    stronger = policies[policies.index(config.remat_policy) + 1 if config.remat else 0 :]
    changes: list[dict[str, dict[str, Any]]] = [
        {"dtype = 'bfloat16'": {"dtype": "bfloat16"}},
        {"base_dtype = 'int8'": {"base_dtype": "int8"}},
        {"optimizer = 'adafactor'": {"stages": stages}},
        {f"data.batch_size = {size}, data.accumulation = {data.accumulation}": {"data": data}},
        {f"remat = true, remat_policy = '{policy}'": {"remat": True, "remat_policy": policy} for policy in stronger},
        {f"parallel.mesh = {{ data = 1, {axis} = {devices} }}": {"parallel": parallel}},
    ]
    return [values for values in changes if any(replace(config, **changed) != config for changed in values.values())]


def _encoding(plan: StagePlan, size: Size) -> Iterator[Program]:
    """Yields the programs that encode the images and captions of a stage."""
    recipe, outline = plan.recipe, plan.recipe.outline
    count = images_at_once(plan.data.resolution)
    pixels = jax.ShapeDtypeStruct((count, *size, 3), jnp.float32)
    images = len(plan.records) * max(1, plan.data.random_crops) * (2 if plan.data.flip else 1) + len(plan.held_out)
    weights = outline.abstract_params("vae")
    encode = lambda place: compiled_moments.lower(outline.vae, *place(weights, pixels))
    yield Program("encode images", encode, -(-images // count))
    if not recipe.trains_text:
        texts = {name: variables(outline.abstract_params(name)) for name in outline.text_models}
        ids = outline.abstract_ids(TEXTS_AT_ONCE, plan.chunks)
        models = tuple(outline.text_models.items())
        shown = itertools.chain(captions_of(plan.records), captions_of(plan.held_out))
        captions = set(itertools.chain.from_iterable(shown))
        encode = lambda place: compiled_encode_ids.lower(models, recipe.hidden, *place(texts, ids))
        yield Program("encode captions", encode, -(-len(captions) // TEXTS_AT_ONCE))
