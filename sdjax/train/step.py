"""One training step, a pure function: `train_step(state, frozen, batch, key) -> (state, metrics)`.

What is trained is a dict part -> tree (`unet`, `text_encoder`, ...), for LoRA the adapters without their scales. The
base weights are an argument that is neither differentiated nor reduced nor donated. The step holds no device and no
axis: `sdjax.train.parallel` runs it under `jit` over a mesh or under `pmap`.

    batch    moments [B, h, w, 2C], index [B], and for the text either context [B, T, D] (and pooled [B, P]), or, when a
             text model is trained, the token ids by text model [B, n, T]; `empty` [B] where the model wants zeros in
             place of an empty caption
    frozen   params: part -> weights; scales: part -> the adapters' scales
    key      the stage's; the step number and `index` are folded in here, so that neither resuming nor the partition
             over devices changes a number
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from sdjax import diffusion, lora
from sdjax.config import Stage
from sdjax.models import vae
from sdjax.pipeline import HiddenState, StableDiffusion, encode_ids
from sdjax.train.optimizers import Optimizer
from sdjax.train.parallel import TrainStep

Batch = Mapping[str, Array]


class State(NamedTuple):
    """What a step changes, and all that a checkpoint of a stage must hold."""

    step: Int[Array, ""]
    """Optimizer steps done in this stage."""
    trainable: dict[str, PyTree]
    """Part -> what the optimizer moves, float32."""
    optimizer: PyTree


class Recipe(NamedTuple):
    """What a step computes, fixed for a stage."""

    model: StableDiffusion
    """The outline: modules, schedule and settings; its weights come as `frozen`."""
    stage: Stage
    optimizer: Optimizer
    hidden: HiddenState
    resolution: int
    """Side of the pictures in pixels, which SDXL is told."""
    accumulation: int = 1

    @property
    def trains_text(self) -> bool:
        """Whether the context changes during training and must be computed in each step."""
        return any(part in self.model.text_models for part in self.stage.lora_parts)


class Draws(NamedTuple):
    """The random numbers of each example, from its own key."""

    latents: Float[Array, "B h w C"]
    noise: Float[Array, "B h w C"]
    timesteps: Int[Array, " B"]
    dropout: Key[Array, " B"]


def init_state(optimizer: Optimizer, trainable: dict[str, PyTree]) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), trainable, optimizer.init(trainable))


def make_train_step(recipe: Recipe) -> TrainStep:
    """The pure step of a recipe. Metrics: `loss`, `grad_norm` (before clipping) and whether both are `finite`.

    The loss is the weighted squared error to `diffusion.target`, averaged over the whole batch. With accumulation A the
    batch holds A times as many examples, which are taken in A parts; the gradient is their exact mean, in float32. A
    step whose loss or gradient is not finite leaves the weights and the optimizer as they were and only counts.
    """

    def train_step(
        state: State,
        frozen: PyTree,
        batch: Batch,
        key: PRNGKeyArray,
        *,
        reduce: Callable[[PyTree], PyTree] = lambda tree: tree,
    ) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        gradient_of = jax.value_and_grad(functools.partial(_loss, recipe))
        if recipe.accumulation == 1:
            loss, gradients = gradient_of(state.trainable, frozen, batch, key)
        else:
            loss, gradients = _accumulated(
                lambda part: gradient_of(state.trainable, frozen, part, key), batch, recipe.accumulation
            )
        loss, gradients = reduce((loss, gradients))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer = recipe.optimizer.update(gradients, state.optimizer, state.trainable)
        moved = optax.apply_updates(state.trainable, updates)
        trainable, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (moved, optimizer), (state.trainable, state.optimizer)
        )
        return State(state.step + 1, trainable, optimizer), {"loss": loss, "grad_norm": norm, "finite": finite}

    return train_step


def squared_error(
    recipe: Recipe, adapters: Mapping[str, Any], frozen: PyTree, batch: Batch, draws: Draws
) -> Float[Array, " B"]:
    """Each example's mean squared error to what the model should answer, unweighted, float32."""
    schedule = recipe.model.schedule
    context, added = _conditions(recipe, adapters, frozen, batch)
    noisy = diffusion.add_noise(schedule, draws.latents, draws.noise, draws.timesteps)
    variables = {"params": frozen["params"]["unet"]}
    if "unet" in adapters:
        variables["lora"] = adapters["unet"]
    output = recipe.model.unet.apply(variables, noisy, draws.timesteps.astype(jnp.float32), context, added)
    target = diffusion.target(schedule, draws.latents, draws.noise, draws.timesteps)
    return jnp.mean(jnp.square(jnp.asarray(output, jnp.float32) - target), axis=(1, 2, 3))


def join_adapters(trainable: Mapping[str, PyTree], scales: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Part -> complete adapter tree."""
    return {part: lora.join(tree, scales[part]) for part, tree in trainable.items()}


def _loss(recipe: Recipe, trainable: dict[str, PyTree], frozen: PyTree, batch: Batch, key: PRNGKeyArray) -> Array:
    draws = _draw(recipe, batch, key)
    adapters = join_adapters(trainable, frozen["scales"])
    if rate := recipe.stage.lora_dropout:
        adapters = {
            part: lora.with_dropout(tree, rate, _dropout_keys(draws.dropout, i, batch.get(part)))
            for i, (part, tree) in enumerate(adapters.items())
        }
    weight = diffusion.loss_weight(
        recipe.model.schedule,
        draws.timesteps,
        min_snr_gamma=recipe.stage.min_snr_gamma or None,
        debiased=recipe.stage.debiased,
    )
    return jnp.mean(weight * squared_error(recipe, adapters, frozen, batch, draws))


def _draw(recipe: Recipe, batch: Batch, key: PRNGKeyArray) -> Draws:
    low, high = timestep_bounds(recipe)

    def draw(moments: Float[Array, "h w C2"], index: Int[Array, ""]) -> Draws:
        keys = jax.random.split(jax.random.fold_in(key, index), 4)
        shape = (*moments.shape[:-1], moments.shape[-1] // 2)
        latents = vae.posterior_sample(moments, jax.random.normal(keys[0], shape, jnp.float32))
        return Draws(
            vae.scale_latents(recipe.model.vae.config, latents),
            jax.random.normal(keys[1], shape, jnp.float32),
            jax.random.randint(keys[2], (), low, high),
            keys[3],
        )

    return jax.vmap(draw)(batch["moments"], batch["index"])


def timestep_bounds(recipe: Recipe) -> tuple[int, int]:
    """First time step trained and the one after the last; at least one lies between."""
    count = len(recipe.model.schedule.alphas_cumprod)
    low, high = (round(share * count) for share in recipe.stage.timestep_range)
    low = min(low, count - 1)
    return low, max(high, low + 1)


def _conditions(
    recipe: Recipe, adapters: Mapping[str, Any], frozen: PyTree, batch: Batch
) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
    """Context and SDXL's added conditions: from the cache, or through the text models when they are trained."""
    model = recipe.model
    if recipe.trains_text:
        trained = {part: tree for part, tree in adapters.items() if part in model.text_models}
        ids = {name: batch[name] for name in model.text_models}
        context, pooled = encode_ids(model.text_models, frozen["params"], ids, recipe.hidden, trained)
    else:
        context, pooled = batch["context"], batch.get("pooled")
    if "empty" in batch:
        context = jnp.where(batch["empty"][:, None, None], jnp.zeros((), context.dtype), context)
        if pooled is not None:
            pooled = jnp.where(batch["empty"][:, None], jnp.zeros((), pooled.dtype), pooled)
    return context, None if pooled is None else model.added_conditions(pooled, recipe.resolution, recipe.resolution)


def _dropout_keys(keys: Key[Array, " B"], part: int, ids: Int[Array, "B n T"] | None) -> Key[Array, " N"]:
    """One key a row the part's model sees: an example, or a window of its caption."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, part))(keys)
    if ids is None:
        return keys
    return jax.vmap(lambda key: jax.random.split(key, ids.shape[1]))(keys).reshape(-1)


def _accumulated(
    gradient_of: Callable[[Batch], tuple[Array, PyTree]], batch: Batch, parts: int
) -> tuple[Array, PyTree]:
    """Mean loss and gradient over equal parts of the batch, one part in memory at a time."""
    # Part a takes examples a, a + parts, ...: the leading axis stays the one that is split over devices.
    split = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1), dict(batch))
    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda leaf: leaf[0], split))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, gradient_of(part)), None), zeros, split)
    return jax.tree.map(lambda leaf: leaf / np.float32(parts), total)
