"""One training step, a pure function: `train_step(state, frozen, batch, key) -> (state, metrics)`.

The step knows no device and no mesh axis: `train.parallel` runs it under `jit` over a mesh or under `pmap`. Only
`state` is differentiated, reduced over devices and donated. All randomness comes from `key`, the step number and the
`index` of each example, so neither resuming nor the partition over devices changes a number.

    batch    moments [B, h, w, 2C] of the VAE's posterior and index [B], the place of each example in the whole batch.
             The text: context [B, T, D] (and pooled [B, P]) or, if a text model is trained, token ids [B, n, T] by
             text model; empty [B], True where the model takes zeros for an empty caption.
             mask [B, h, w, 1] for a masked loss; weight [B] of each example in the loss.
             For inpainting hole [B, h, w, 1], 1 where to paint, and for a U-Net that sees it kept [B, h, w, C], the
             unscaled latents of the image with the hole in grey.
             A stage that trains the VAE takes pixels [B, H, W, 3] and index [B] instead.
    key      the key of the stage
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from sdjax import diffusion, lora
from sdjax.data.dataset import NEGATIVE
from sdjax.models import layers, vae
from sdjax.outline import Outline
from sdjax.text import textual_inversion
from sdjax.text.encoding import HiddenState, encode_ids, zeroed
from sdjax.train import autoencoder, consistency, loss_scaling
from sdjax.train.config import Stage
from sdjax.train.optimizers import Optimizer, ema, make_optimizer, updates_done
from sdjax.train.parallel import TrainStep

Batch = Mapping[str, Array]


class State(NamedTuple):
    """What a step changes. A checkpoint of a stage holds exactly this."""

    step: Int[Array, ""]
    """Optimizer steps done in this stage, skipped ones included."""
    trainable: dict[str, PyTree]
    """Part -> what the optimizer moves, float32: an adapter without its scales, all weights of a part, or, for
    `textual_inversion`, text model -> the trained rows."""
    optimizer: PyTree
    average: dict[str, PyTree]
    """The moving average of `trainable`; empty if there is none."""
    scaler: loss_scaling.Scaler | None = None
    """The state of loss scaling; None if the loss is not scaled."""


class Frozen(TypedDict):
    """What the steps of a stage leave as it is."""

    params: dict[str, PyTree]
    """Part -> weights, of the parts that are not trained as a whole."""
    scales: dict[str, PyTree]
    """Part -> the scales of its adapter; `lora.join` puts them back."""
    rows: dict[str, Array]
    """Text model -> vectors [K, D] of all new words. The step puts those it trains into their places."""
    norms: Mapping[str, Any]
    """Text model -> the norm that clip_ti_decay draws to."""
    numbers: dict[str, Any]
    """Settings of the stage that take the place of those of the recipe: of copies, those that differ between them."""


class Recipe(NamedTuple):
    """What a step computes; fixed for a stage."""

    outline: Outline
    """The modules and the noise schedule; the weights come as `frozen`."""
    stage: Stage
    optimizer: Optimizer
    hidden: HiddenState
    accumulation: int = 1
    rows: tuple[int, ...] = ()
    """The places of the trained rows among the rows of all new words."""

    @property
    def trains_text(self) -> bool:
        """Whether training changes the context, so that each step must compute it."""
        return any(part in self.outline.text_models or part == "textual_inversion" for part in self.stage.parts)

    @property
    def models(self) -> tuple[str, ...]:
        """The parts that a step computes with."""
        if "vae" in self.stage.parts:
            return ("vae",)
        return ("unet", *(self.outline.text_models if self.trains_text else ()))

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled, see `loss_scaling`."""
        return loss_scaling.is_needed(self.outline.unet.compute.dtype, self.stage)


class Draws(NamedTuple):
    """The random numbers of each example, from the key of that example."""

    latents: Float[Array, "B h w C"]
    noise: Float[Array, "B h w C"]
    timesteps: Int[Array, " B"]
    dropout: Key[Array, " B"]
    perturbation: Float[Array, "B h w C"]
    guidance: Float[Array, " B"]
    """The teacher's guidance scale, in consistency distillation."""


def init_state(recipe: Recipe, trainable: dict[str, PyTree]) -> State:
    """Returns the state before the first step."""
    average = trainable if recipe.stage.ema_decay else {}
    scaler = loss_scaling.first() if recipe.scales_loss else None
    return State(jnp.int32(0), trainable, recipe.optimizer.init(trainable), average, scaler)


def evaluated(recipe: Recipe, state: State) -> dict[str, PyTree]:
    """Returns what to draw with and to export: the moving average, or else the weights that the optimizer evaluates."""
    return state.average or recipe.optimizer.evaluated(state.optimizer, state.trainable)


def variables(recipe: Recipe, trainable: Mapping[str, PyTree], frozen: Frozen) -> dict[str, dict[str, PyTree]]:
    """Returns part -> Flax variable collections, for the parts that a step computes with."""
    parts, models = recipe.stage.parts, {}
    for name in recipe.models:
        kind = parts.get(name)
        rows = frozen["rows"].get(name)
        if "textual_inversion" in trainable and rows is not None:
            rows = rows.at[np.array(recipe.rows)].set(trainable["textual_inversion"][name])
        models[name] = layers.variables(
            trainable[name] if kind == "weights" else frozen["params"][name],
            lora=lora.join(trainable[name], frozen["scales"][name]) if kind == "lora" else None,
            rows=rows,
        )
    return models


def with_numbers(recipe: Recipe, numbers: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with some settings of its stage replaced, which may be arrays."""
    if not numbers:
        return recipe
    stage = dataclasses.replace(recipe.stage, **numbers)
    return recipe._replace(stage=stage, optimizer=make_optimizer(stage, stage.parts))


def make_train_step(planned: Recipe) -> TrainStep:
    """Returns the pure step of a recipe.

    The loss is the weighted distance to `diffusion.target`, averaged over the whole batch. With accumulation A the
    batch holds A times as many examples; the step takes them in A parts and averages the gradients exactly, in
    float32. A step whose loss, gradient or result is not finite is skipped: it leaves weights, average and optimizer,
    and so the learning rate, unchanged. But it counts: the next step has the next number, batch and noise.
    The metrics are `loss`, `grad_norm` (before clipping), `finite` (whether loss, gradient and result are), `updates`,
    the number of steps before this one that were not skipped, and, for new words, `row_norm`, the mean norm of their
    vectors.
    In float16 the loss is scaled, see `loss_scaling`. Then an overflow of the gradients that lowers the scale leaves
    `finite` true, and two more metrics are `loss_scale`, the scale of this step, and `skipped_steps`, the number of
    steps skipped so far, this one included.
    """
    loss_of = _autoencoder_loss if "vae" in planned.stage.parts else diffusion_loss

    def train_step(
        state: State,
        frozen: Frozen,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        reduce: Callable[[PyTree], PyTree] = lambda tree: tree,
    ) -> tuple[State, dict[str, Array]]:
        recipe = with_numbers(planned, frozen["numbers"])
        key = jax.random.fold_in(key, state.step)
        gradient_of = loss_scaling.value_and_grad(functools.partial(loss_of, recipe), state.scaler)
        if recipe.accumulation == 1:
            loss, gradients = gradient_of(state.trainable, frozen, batch, key)
        else:
            loss, gradients = _accumulated(
                lambda part: gradient_of(state.trainable, frozen, part, key), batch, recipe.accumulation
            )
        loss, gradients = reduce((loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        done = updates_done(state.optimizer)
        updates, optimizer = recipe.optimizer.update(gradients, state.optimizer, state.trainable)
        moved: Any = optax.apply_updates(state.trainable, updates)
        if recipe.stage.clip_ti_decay:
            rate = recipe.optimizer.schedules["textual_inversion"](done)
            words: dict[str, Array] = moved["textual_inversion"]
            drawn = {
                name: textual_inversion.decay_norm(rows, rate, frozen["norms"][name]) for name, rows in words.items()
            }
            moved = {**moved, "textual_inversion": drawn}
        finite &= jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(moved)]).all()
        average = ema(state.average, moved, done, recipe.stage.ema_decay) if state.average else {}
        new = State(state.step + 1, moved, optimizer, average, state.scaler)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
        kept = kept._replace(step=new.step)
        metrics = {"loss": loss, "grad_norm": norm, "finite": finite, "updates": done}
        if state.scaler is not None:
            kept = kept._replace(scaler=loss_scaling.update(state.scaler, loss, norm, finite))
            metrics["finite"] = finite | loss_scaling.is_remedied(state.scaler, loss, norm)
            metrics |= {"loss_scale": state.scaler.scale, "skipped_steps": kept.scaler.skipped}
        if "textual_inversion" in kept.trainable:
            norms = [jnp.linalg.norm(rows, axis=-1) for rows in kept.trainable["textual_inversion"].values()]
            metrics["row_norm"] = jnp.mean(jnp.concatenate(norms))
        return kept, metrics

    return train_step


def distance(
    recipe: Recipe, models: Mapping[str, Any], batch: Batch, draws: Draws, *, plain: bool = False
) -> Float[Array, " B"]:
    """Returns each example's mean distance between the output of the U-Net and its target, float32.

    In consistency distillation both are those of `consistency.pair`. The weight of the example is not in it.
    models: see `variables`. plain: squared distance, no mask and no input perturbation, whatever the stage says.
    A U-Net made for inpainting sees the hole and the kept image, and learns the whole picture. A standard U-Net does
    not see them, and drawing overwrites all but the hole after each step, so it learns the hole alone; elsewhere its
    error counts `unmasked_weight` times.
    """
    stage, schedule = recipe.stage, recipe.outline.schedule
    noise = draws.noise
    if stage.consistency_steps:
        output, target = _consistency_pair(recipe, models, batch, draws)
    else:
        if diffusion.is_used(stage.input_perturbation) and not plain:
            noise = noise + stage.input_perturbation * draws.perturbation
        noisy = diffusion.add_noise(schedule, draws.latents, noise, draws.timesteps)
        output = _predict(recipe, models, batch, noisy, draws.timesteps)
        target = diffusion.target(schedule, draws.latents, draws.noise, draws.timesteps)
    kind = "l2" if plain else stage.loss
    threshold = diffusion.huber_threshold(schedule, draws.timesteps, stage.huber_c, stage.huber_schedule)
    error = diffusion.distance(output, target, kind, threshold)
    regions = [batch["mask"]] if "mask" in batch and not plain else []
    regions += [batch["hole"]] if "hole" in batch and "kept" not in batch else []
    for region in regions:
        error = error * (region + (1 - region) * stage.unmasked_weight)
    return jnp.mean(error, axis=(1, 2, 3))


def _predict(
    recipe: Recipe, models: Mapping[str, Any], batch: Batch, noisy: Float[Array, "B h w C"], timesteps: Int[Array, " B"]
) -> Float[Array, "B h w C"]:
    """Returns the output of the U-Net for the texts of the batch, float32."""
    if "kept" in batch:
        kept = vae.scale_latents(recipe.outline.vae.config, batch["kept"])
        noisy = jnp.concatenate([noisy, batch["hole"], kept], axis=-1)
    context, added = _conditions(recipe, models, batch)
    output = recipe.outline.unet.apply(models["unet"], noisy, timesteps.astype(jnp.float32), context, added)
    return jnp.asarray(output, jnp.float32)


def _consistency_pair(
    recipe: Recipe, models: Mapping[str, Any], batch: Batch, draws: Draws
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Returns the result of the student and its target, see `consistency.pair`. The adapter makes the student."""
    teacher = {"unet": {name: leaves for name, leaves in models["unet"].items() if name != "lora"}}
    unguided = {**batch} | {name.removeprefix(NEGATIVE): batch[name] for name in batch if name.startswith(NEGATIVE)}
    return consistency.pair(
        recipe.outline.schedule,
        lambda x, t: _predict(recipe, models, batch, x, t),
        lambda x, t: (_predict(recipe, teacher, batch, x, t), _predict(recipe, teacher, unguided, x, t)),
        draws.latents,
        draws.noise,
        draws.timesteps,
        draws.guidance,
        recipe.stage.consistency_steps,
    )


def diffusion_loss(
    recipe: Recipe, trainable: dict[str, PyTree], frozen: Frozen, batch: Batch, key: PRNGKeyArray
) -> Array:
    """Returns the weighted loss of a batch."""
    draws, stage = draw(recipe, batch, key), recipe.stage
    models = variables(recipe, trainable, frozen)
    if stage.lora_dropout:
        for i, part in enumerate(stage.lora_parts):
            keys = _dropout_keys(draws.dropout, i, batch.get(part))
            models[part] |= {"lora": lora.with_dropout(models[part]["lora"], stage.lora_dropout, keys)}
    gamma = stage.min_snr_gamma if diffusion.is_used(stage.min_snr_gamma) else None
    schedule = recipe.outline.schedule
    weight = diffusion.loss_weight(schedule, draws.timesteps, min_snr_gamma=gamma, debiased=stage.debiased)
    if "weight" in batch:
        weight = weight * batch["weight"]
    return jnp.mean(weight * distance(recipe, models, batch, draws))


def _autoencoder_loss(
    recipe: Recipe, trainable: dict[str, PyTree], frozen: Frozen, batch: Batch, key: PRNGKeyArray
) -> Array:
    return autoencoder.loss(recipe.stage, recipe.outline.vae, trainable["vae"], batch, key)


def draw(recipe: Recipe, batch: Batch, key: PRNGKeyArray) -> Draws:
    """Returns the random numbers of a step for a batch. key: that of the stage and the step."""
    low, high = timestep_bounds(recipe)
    stage = recipe.stage
    weakest, strongest = stage.consistency_guidance

    def draw_example(moments: Float[Array, "h w C2"], index: Int[Array, ""]) -> Draws:
        keys = jax.random.split(jax.random.fold_in(key, index), 6)
        height, width, channels = moments.shape
        shape = (height, width, channels // 2)
        latents = vae.posterior_sample(moments, jax.random.normal(keys[0], shape, jnp.float32))
        return Draws(
            vae.scale_latents(recipe.outline.vae.config, latents),
            diffusion.noise(
                keys[1],
                shape,
                offset=stage.noise_offset,
                multires_iterations=stage.multires_noise_iterations,
                multires_discount=stage.multires_noise_discount,
            ),
            diffusion.draw_timestep(
                keys[2],
                low,
                high,
                bias=stage.timestep_bias,
                multiplier=stage.timestep_bias_multiplier,
                portion=stage.timestep_bias_portion,
            ),
            keys[3],
            jax.random.normal(keys[4], shape, jnp.float32),
            jax.random.uniform(keys[5], minval=weakest, maxval=strongest),
        )

    return jax.vmap(draw_example)(batch["moments"], batch["index"])


def timestep_bounds(recipe: Recipe) -> tuple[int, int]:
    """Returns the first time step trained and the one after the last; the range is never empty."""
    count = len(recipe.outline.schedule.alphas_cumprod)
    low, high = (round(share * count) for share in recipe.stage.timestep_range)
    low = min(low, count - 1)
    return low, max(high, low + 1)


def _conditions(
    recipe: Recipe, models: Mapping[str, Any], batch: Batch
) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
    """Returns the context and SDXL's added conditions: cached, or from the text models if these are trained."""
    outline = recipe.outline
    if recipe.trains_text:
        ids = {name: batch[name] for name in outline.text_models}
        context, pooled = encode_ids(outline.text_models, models, ids, recipe.hidden)
    else:
        context, pooled = batch["context"], batch.get("pooled")
    if "empty" in batch:
        context = zeroed(context, batch["empty"])
        pooled = None if pooled is None else zeroed(pooled, batch["empty"])
    added = outline.added_conditions(pooled, batch["sizes"]) if outline.is_sdxl and pooled is not None else None
    return context, added


def _dropout_keys(keys: Key[Array, " B"], part: int, ids: Int[Array, "B n T"] | None) -> Key[Array, " N"]:
    """Returns one key for each row that the model of the part sees: an example, or a chunk of its caption."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, part))(keys)
    if ids is None:
        return keys
    return jax.vmap(lambda key: jax.random.split(key, ids.shape[1]))(keys).reshape(-1)


def _accumulated(
    gradient_of: Callable[[Batch], tuple[Array, PyTree]], batch: Batch, parts: int
) -> tuple[Array, PyTree]:
    """Returns the mean loss and gradient over equal parts of the batch, with one part in memory at a time."""
    # Part a takes examples a, a + parts, ..., so that the leading axis is still the one that is split over devices.
    split = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1), dict(batch))
    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda leaf: leaf[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient_of(part)), None), zeros, split)
    return jax.tree.map(lambda leaf: leaf / np.float32(parts), total)
