"""What turns gradients into updates: optimizers with their schedules, clipping, and a rate for each part.

What is trained is a dict part -> tree, e.g. `{"unet": adapter, "textual_inversion": {"text_encoder": rows}}`, without
the constants that `lora.split` takes out. Each part has an optimizer of its own, with its own state; only clipping
looks at all of them. In an adapter the leaves named `up` may have a rate of their own (LoRA+, arXiv:2402.12354). Weight
decay is decoupled and scaled by the learning rate, and leaves out what has one axis: biases, the scales of norms and
DoRA's magnitudes, for which 0 is not where to be drawn to (PyTorch's training scripts decay these too).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from sdjax import trees
from sdjax.errors import ConfigError
from sdjax.train.config import Stage

log = logging.getLogger(__name__)

Schedule = Callable[[Any], Float[Array, ""]]


class Optimizer(NamedTuple):
    """An optax transformation over all parts, with the means to report on it."""

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """`update(gradients, state, trainable) -> (updates, state)`; apply with `optax.apply_updates`."""
    evaluated: Callable[[PyTree, PyTree], PyTree]
    """`evaluated(state, trainable)`: the weights to draw with and to export; `trainable` but for schedule_free."""
    schedules: Mapping[str, Schedule]
    """Part -> optimizer step n (0 is the first) -> learning rate."""

    def learning_rates(self, step: int) -> dict[str, float]:
        """Learning rate of each part in optimizer step n (0 is the first); for prodigy what its estimate is times."""
        return {part: float(schedule(step)) for part, schedule in self.schedules.items()}


def make_optimizer(stage: Stage, parts: Mapping[str, str]) -> Optimizer:
    """The stage's optimizer over the given parts of what is trained, as in `Stage.parts`: part -> kind.

    Raises ConfigError for settings that the optimizer cannot work with.
    """
    peaks = stage.learning_rate if isinstance(stage.learning_rate, dict) else dict.fromkeys(parts, stage.learning_rate)
    if stage.optimizer == "prodigy" and (low := {part: peaks[part] for part in parts if 0 < peaks[part] < 0.1}):
        log.warning("prodigy finds the learning rate itself, times the one given: %s; 1.0 is usual", low)
    schedules = {
        part: make_schedule(
            stage.schedule,
            peaks[part],
            stage.steps,
            stage.warmup_steps,
            cycles=stage.schedule_cycles,
            power=stage.schedule_power,
            hold=stage.schedule_hold,
        )
        for part in parts
    }
    transforms = {
        part: OPTIMIZERS[stage.optimizer](stage, schedules[part], stage.lora_plus_ratio if kind == "lora" else 1.0)
        for part, kind in parts.items()
    }
    clip = optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity()

    def init(trainable: PyTree) -> PyTree:
        return {part: transform.init(trainable[part]) for part, transform in transforms.items()}

    def update(gradients: PyTree, state: PyTree, trainable: PyTree) -> tuple[PyTree, PyTree]:
        # optax raises a Python float to an integer count, which strict promotion refuses; no number changes by it.
        with jax.numpy_dtype_promotion("standard"):
            gradients, _ = clip.update(gradients, clip.init(trainable), trainable)
            moves = {part: t.update(gradients[part], state[part], trainable[part]) for part, t in transforms.items()}
        return {part: move[0] for part, move in moves.items()}, {part: move[1] for part, move in moves.items()}

    def evaluated(state: PyTree, trainable: PyTree) -> PyTree:
        return {part: _averaged(state[part], trainable[part]) for part in transforms}

    return Optimizer(init, update, evaluated, schedules)


def make_schedule(
    kind: str,
    peak: float,
    steps: int,
    warmup_steps: int = 0,
    *,
    cycles: int = 1,
    power: float = 1.0,
    hold: float = 0.0,
) -> Schedule:
    """Optimizer step n (0 is the first, an integer) -> learning rate.

    Rises linearly from 0 over `warmup_steps`, stays at its peak for the share `hold` of the rest, then follows `kind`:
    constant, or down to 0 at `steps` linearly, by half a cosine, by `cycles` of these each from the peak again, or by
    the line to the `power`. Without hold the same numbers as diffusers' `get_scheduler`, but that its polynomial ends
    at 1e-7.
    """
    start = warmup_steps + round(hold * (steps - warmup_steps))
    length = max(1, steps - start)
    shape = SHAPES[kind]

    def schedule(step: Any) -> Float[Array, ""]:
        n = jnp.asarray(step, jnp.int32)
        done = jnp.clip(n - start, 0, length)
        progress = done / length
        if kind == "cosine_with_restarts":  # in whole numbers, lest a restart be rounded to the end before it
            progress = jnp.where(done < length, (done * cycles % length) / length, 1.0)
        return peak * jnp.where(n < warmup_steps, n / max(1, warmup_steps), shape(progress, power))

    return schedule


def _cosine(progress: Float[Array, ""], _: float) -> Float[Array, ""]:
    return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


SHAPES: dict[str, Callable[[Float[Array, ""], float], Float[Array, ""]]] = {
    "constant": lambda progress, _: jnp.ones_like(progress),
    "constant_with_warmup": lambda progress, _: jnp.ones_like(progress),
    "linear": lambda progress, _: 1.0 - progress,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine,
    "polynomial": lambda progress, power: (1.0 - progress) ** power,
}
"""Share of the peak at a given progress (0 to 1) of the fall, or of the cycle, with schedule_power."""


def ema(average: PyTree, new: PyTree, step: int | Int[Array, ""], decay: float) -> PyTree:
    """The moving average after optimizer step n (0 is the first), float32: `d average + (1 - d) new`.

    d = min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten, and 0 in the first step, which makes the
    average `new`: diffusers' `EMAModel` without `use_ema_warmup`.
    """
    n = jnp.asarray(step, jnp.float32)
    d = jnp.where(n > 0, jnp.minimum(decay, (1.0 + n) / (10.0 + n)), 0.0)

    def mix(old: Float[Array, "..."], now: Float[Array, "..."]) -> Float[Array, "..."]:
        return d * old.astype(jnp.float32) + (1.0 - d) * now.astype(jnp.float32)

    return jax.tree.map(mix, average, new)


def _adamw(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """AdamW, arXiv:1711.05101, as in PyTorch."""
    b1, b2 = stage.betas
    return _gathered(optax.chain(optax.scale_by_adam(b1, b2, stage.eps), _descent(stage, schedule, up_ratio)))


def _lion(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Lion, arXiv:2302.06675: steps of one size; wants a rate 3 to 10 times below AdamW's, and betas 0.9, 0.99."""
    b1, b2 = stage.betas
    return _gathered(optax.chain(optax.scale_by_lion(b1, b2), _descent(stage, schedule, up_ratio)))


def _adafactor(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Adafactor, arXiv:1804.04235, with the given rate: no scaling by the weights, no relative step, no momentum.

    The settings that transformers and kohya advise for fine-tuning (`scale_parameter=False, relative_step=False`), but
    as in the authors' code only a leaf with two axes of at least 128 has its second moment factored.
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), _descent(stage, schedule, up_ratio))


def _prodigy(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Prodigy, arXiv:2306.06101, with bias correction and the safeguard for warm-up, as diffusers' scripts have it.

    Each part estimates its own rate. As in the authors' code a step in which there is nothing to estimate from, every
    gradient of the part having been 0 so far, changes nothing; optax would divide 0 by 0.
    """
    b1, b2 = stage.betas
    plain = cast(Any, optax.contrib.prodigy(schedule, stage.betas, eps=stage.eps, safeguard_warmup=True))

    def init(params: PyTree) -> Any:
        # The state holds the first weights: copies, since a training step gives its arguments' memory away.
        return plain.init(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, new = plain.update(updates, state, params)
        rate = state.estim_lr * schedule(state.count) * jnp.sqrt(1 - b2**new.count) / (1 - b1**new.count)
        updates = jax.tree.map(
            lambda u, p, decayed: u - stage.weight_decay * rate * p if decayed else u, updates, params, _decayed(params)
        )
        idle = optax.tree.sum(jax.tree.map(jnp.abs, new.grad_sum)) == 0
        stay = jax.tree.map(jnp.zeros_like, updates)
        return jax.tree.map(lambda old, now: jnp.where(idle, old, now), (stay, state), (updates, new))

    return optax.chain(optax.GradientTransformation(init, update), _scale_up(up_ratio))


def _schedule_free(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Schedule-Free AdamW, arXiv:2405.15682: meant for a constant schedule, with a warm-up.

    What is trained is the paper's y, between the average x, which `Optimizer.evaluated` gives, and the fast z. A part
    whose rate has been 0 so far stays as it is to the last bit.
    """
    b1, b2 = stage.betas
    if b1 == 0:
        raise ConfigError(f"optimizer 'schedule_free' needs the first of betas above 0, got {list(stage.betas)}")
    direction = optax.scale_by_rms(b2, stage.eps, eps_in_sqrt=False, bias_correction=True)
    base = optax.chain(direction, _descent(stage, schedule, up_ratio))
    # optax counts the steps of the average from 1 and those of the base from 0.
    plain = cast(Any, optax.contrib.schedule_free(base, lambda count: schedule(count - 1), b1))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, new = plain.update(updates, state, params)
        return jax.tree.map(lambda u: jnp.where(new.max_lr > 0, u, jnp.zeros_like(u)), updates), new

    return optax.GradientTransformation(plain.init, update)


OPTIMIZERS: dict[str, Callable[[Stage, Schedule, float], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
"""Name -> the optimizer of one part, by its learning rate and how much higher that of `up` is."""


_SMALL = 1 << 16


def _gathered(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transform of single elements, over small leaves of one name laid end to end; the others stay by themselves.

    An adapter has hundreds of leaves, for each of which XLA compiles and starts loops of its own.
    """

    def place(path: Any, leaf: Array) -> tuple[str, str]:
        kind = "matrix" if leaf.ndim > 1 else "vector"  # which is not decayed
        return kind if leaf.size < _SMALL else jax.tree_util.keystr(path), path[-1].key

    def gather(tree: PyTree) -> dict[str, dict[str, Array]]:
        groups: dict[tuple[str, str], list[Array]] = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.size < _SMALL:
                leaf = leaf.reshape(*(1,) * (leaf.ndim > 1), -1)
            groups.setdefault(place(path, leaf), []).append(leaf)
        return trees.nest({at: jnp.concatenate(leaves, axis=-1) for at, leaves in groups.items()})

    def scatter(gathered: Any, like: PyTree) -> PyTree:
        ends: dict[tuple[str, str], int] = {}

        def cut(path: Any, leaf: Array) -> Array:
            where, name = at = place(path, leaf)
            if leaf.size >= _SMALL:
                return gathered[where][name]
            start = ends.get(at, 0)
            ends[at] = start + leaf.size
            return gathered[where][name][..., start : start + leaf.size].reshape(leaf.shape)

        return jax.tree.map_with_path(cut, like)

    def init(params: PyTree) -> Any:
        return transform.init(gather(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        moves, state = transform.update(gather(updates), state, gather(params))
        return scatter(moves, params), state

    return optax.GradientTransformation(init, update)


def _descent(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """From a direction to an update: the weight decay, then both times the learning rate."""
    return optax.chain(
        optax.add_decayed_weights(stage.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
        _scale_up(up_ratio),
    )


def _decayed(params: PyTree) -> PyTree:
    """Whether each leaf is decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _scale_up(ratio: float) -> optax.GradientTransformation:
    """Updates of leaves named `up`, times ratio."""
    if ratio == 1.0:
        return optax.identity()

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, u: u * ratio if path[-1].key == "up" else u, updates)

    return optax.stateless(scale)


def _averaged(state: Any, params: PyTree) -> PyTree:
    """What a part is evaluated with."""
    if not isinstance(state, optax.contrib.ScheduleFreeState):
        return params
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    moved = jnp.asarray(state.max_lr) > 0
    return jax.tree.map(lambda y, x: jnp.where(moved, x, y), params, averaged)
