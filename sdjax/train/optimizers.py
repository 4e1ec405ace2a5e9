"""Turns gradients into updates: optimizers, schedules of the learning rate, clipping, and the moving average.

An optimizer works on a dict part -> tree, such as `{"unet": adapter, "textual_inversion": {"text_encoder": rows}}`,
without the constants that `lora.split` takes out. Each part has a separate optimizer with its own learning rate and
state. Only clipping combines the parts. In an adapter, the leaves named `up` can have another rate than the others
(LoRA+, arXiv:2402.12354). Weight decay is decoupled and scaled by the learning rate. It leaves out arrays with one
axis, which are biases, the scales of norms and the magnitudes of DoRA: 0 is no natural value for them. (PyTorch's
training scripts decay these too.)
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float, Int, PyTree

from sdjax import trees
from sdjax.errors import ConfigError
from sdjax.train import eight_bit
from sdjax.train.config import Stage

log = logging.getLogger(__name__)

Schedule = Callable[[Any], Float[Array, ""]]


class Optimizer(NamedTuple):
    """The optimizer of all parts of a stage."""

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """`update(gradients, state, trainable) -> (updates, state)`, for `optax.apply_updates`."""
    evaluated: Callable[[PyTree, PyTree], PyTree]
    """`evaluated(state, trainable)` gives the weights to draw with and to export. Except for schedule_free they are
    `trainable`."""
    schedules: Mapping[str, Schedule]
    """Part -> its learning rate, a function of the optimizer step n (0 is the first)."""

    def learning_rates(self, step: int) -> dict[str, float]:
        """Returns the learning rate of each part in optimizer step n (0 is the first).

        For prodigy it is the factor by which the estimated rate is multiplied.
        """
        return {part: float(schedule(step)) for part, schedule in self.schedules.items()}


def make_optimizer(stage: Stage, parts: Mapping[str, str]) -> Optimizer:
    """Returns the optimizer of a stage. parts: see `Stage.parts`.

    The learning rates and the weight decay of the stage may be arrays, as they are in the step of copies.
    Raises ConfigError for settings that the optimizer cannot work with.
    """
    peaks = peak_rates(stage, parts)
    if stage.optimizer == "prodigy" and not any(isinstance(peak, jax.Array) for peak in peaks.values()):
        low = {part: peaks[part] for part in parts if 0 < peaks[part] < 0.1}
        if low:
            log.warning("prodigy multiplies the rate it estimates by learning_rate = %s: 1.0 is usual", low)
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
        # optax raises a Python float to an integer power, which strict promotion refuses. The numbers are the same.
        with jax.numpy_dtype_promotion("standard"):
            gradients, _ = clip.update(gradients, clip.init(trainable), trainable)
            moves = {part: t.update(gradients[part], state[part], trainable[part]) for part, t in transforms.items()}
        return {part: move[0] for part, move in moves.items()}, {part: move[1] for part, move in moves.items()}

    def evaluated(state: PyTree, trainable: PyTree) -> PyTree:
        return {part: _averaged(state[part], trainable[part]) for part in transforms}

    return Optimizer(init, update, evaluated, schedules)


def updates_done(state: PyTree) -> Int[Array, ""]:
    """Returns how often an optimizer has moved what it trains: the n of its schedules. Skipped steps do not count."""
    (_, count), *_ = optax.tree.get_all_with_path(state, "count")
    return count


def peak_rates(stage: Stage, parts: Iterable[str]) -> dict[str, float]:
    """Returns the peak learning rate of each part."""
    return stage.learning_rate if isinstance(stage.learning_rate, dict) else dict.fromkeys(parts, stage.learning_rate)


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
    """Returns the learning rate as a function of the optimizer step n (an integer, 0 is the first).

    The rate rises linearly from 0 to `peak` over `warmup_steps`. It stays there for the share `hold` of the other
    steps. Then it follows `kind` down to 0 at `steps`: linearly, along half a cosine, along `cycles` half cosines that
    each begin at the peak, or along the line to the power of `power`. The constant kinds stay at the peak. Without
    hold the rates are those of diffusers' `get_scheduler`, except that its polynomial ends at 1e-7.
    """
    start = warmup_steps + round(hold * (steps - warmup_steps))
    length = max(1, steps - start)
    shape = SHAPES[kind]

    def schedule(step: Any) -> Float[Array, ""]:
        n = jnp.asarray(step, jnp.int32)
        done = jnp.clip(n - start, 0, length)
        progress = done / length
        if kind == "cosine_with_restarts":  # in integers, since rounding could turn a restart into the end of a cycle
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
"""Kind -> the rate as a share of its peak, a function of the progress (0 to 1) of the fall or cycle, and the power."""


def ema(average: PyTree, new: PyTree, step: int | Int[Array, ""], decay: float) -> PyTree:
    """Returns the moving average after optimizer step n (0 is the first), float32: `d average + (1 - d) new`.

    d = min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten. In the first step d = 0, which
    makes the average `new`. This is diffusers' `EMAModel` without `use_ema_warmup`.
    """
    n = jnp.asarray(step, jnp.float32)
    d = jnp.where(n > 0, jnp.minimum(decay, (1.0 + n) / (10.0 + n)), 0.0)

    def mix(old: Float[Array, "..."], now: Float[Array, "..."]) -> Float[Array, "..."]:
        return d * old.astype(jnp.float32) + (1.0 - d) * now.astype(jnp.float32)

    return jax.tree.map(mix, average, new)


def _adamw(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101), as in PyTorch."""
    b1, b2 = stage.betas
    return _gathered(optax.chain(optax.scale_by_adam(b1, b2, stage.eps), _descent(stage, schedule, up_ratio)))


def _adamw8bit(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """AdamW whose moments take a byte each (arXiv:2110.02861)."""
    b1, b2 = stage.betas
    return _gathered(optax.chain(eight_bit.scale_by_adam(b1, b2, stage.eps), _descent(stage, schedule, up_ratio)))


def _lion(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Lion (arXiv:2302.06675): steps of one size. It needs a rate 3 to 10 times below AdamW's, and betas 0.9, 0.99."""
    b1, b2 = stage.betas
    return _gathered(optax.chain(optax.scale_by_lion(b1, b2), _descent(stage, schedule, up_ratio)))


def _adafactor(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) with the given rate: no scaling by the weights, no relative step, no momentum.

    These are the settings that transformers and kohya advise for fine-tuning (`scale_parameter=False,
    relative_step=False`). As in the authors' code, the second moment is factored only for an array with two axes of at
    least 128.
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), _descent(stage, schedule, up_ratio))


def _prodigy(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Prodigy (arXiv:2306.06101), with bias correction and the safeguard for warm-up, as in diffusers' scripts.

    Each part estimates its own rate. As in the authors' code, a step changes nothing as long as all gradients of the
    part have been 0, because there is nothing to estimate from. optax would divide 0 by 0.
    """
    b1, b2 = stage.betas
    plain = cast(Any, optax.contrib.prodigy(schedule, stage.betas, eps=stage.eps, safeguard_warmup=True))

    def init(params: PyTree) -> Any:
        # The state keeps the first weights. They are copied, because a training step donates its arguments.
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
    """Schedule-Free AdamW (arXiv:2405.15682), meant for a constant schedule with a warm-up.

    The trained weights are y of the paper, between the average x, which `Optimizer.evaluated` returns, and the fast z.
    A part whose rate has been 0 so far keeps its weights exactly.
    """
    b1, b2 = stage.betas
    if b1 == 0:
        raise ConfigError(f"optimizer 'schedule_free' needs the first of betas above 0, got {list(stage.betas)}")
    direction = optax.scale_by_rms(b2, stage.eps, eps_in_sqrt=False, bias_correction=True)
    base = optax.chain(direction, _descent(stage, schedule, up_ratio))
    # optax counts steps from 1 for the average, and from 0 for the base.
    plain = cast(Any, optax.contrib.schedule_free(base, lambda count: schedule(count - 1), b1))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, new = plain.update(updates, state, params)
        return jax.tree.map(lambda u: jnp.where(new.max_lr > 0, u, jnp.zeros_like(u)), updates), new

    return optax.GradientTransformation(plain.init, update)


OPTIMIZERS: dict[str, Callable[[Stage, Schedule, float], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
    "lion": _lion,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
"""Name -> the optimizer of one part, a function of the learning rate and of the factor for the rate of `up`."""


_SMALL = 1 << 16
"""Elements below which a leaf is joined with others; see `_gathered`."""


def _gathered(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an elementwise transform that works on small leaves of one name as one array, laid end to end.

    An adapter has hundreds of leaves, and XLA would compile and start separate loops for each.
    """

    def place(path: Any, leaf: Array) -> tuple[str, str]:
        kind = "matrix" if leaf.ndim > 1 else "vector"  # vectors are not decayed
        return kind if leaf.size < _SMALL else jax.tree_util.keystr(path), path[-1].key

    def gather(tree: PyTree) -> dict[str, dict[str, Array]]:
        groups: dict[tuple[str, str], list[Array]] = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            if leaf.size < _SMALL:
                leaf = leaf.reshape(*(1,) * (leaf.ndim > 1), -1)
            groups.setdefault(place(path, leaf), []).append(leaf)
        return trees.nest({key: jnp.concatenate(leaves, axis=-1) for key, leaves in groups.items()})

    def scatter(gathered: Any, like: PyTree) -> PyTree:
        ends: dict[tuple[str, str], int] = {}

        def cut(path: Any, leaf: Array) -> Array:
            group, name = key = place(path, leaf)
            if leaf.size >= _SMALL:
                return gathered[group][name]
            start = ends.get(key, 0)
            ends[key] = start + leaf.size
            return gathered[group][name][..., start : start + leaf.size].reshape(leaf.shape)

        return jax.tree.map_with_path(cut, like)

    def init(params: PyTree) -> Any:
        return transform.init(gather(params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        moves, state = transform.update(gather(updates), state, gather(params))
        return scatter(moves, params), state

    return optax.GradientTransformation(init, update)


def _descent(stage: Stage, schedule: Schedule, up_ratio: float) -> optax.GradientTransformation:
    """Returns a transform that adds the weight decay to a direction, and multiplies by the learning rate."""
    return optax.chain(
        optax.add_decayed_weights(stage.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
        _scale_up(up_ratio),
    )


def _decayed(params: PyTree) -> PyTree:
    """Returns, for each leaf, whether it is decayed."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _scale_up(ratio: float) -> optax.GradientTransformation:
    """Returns a transform that multiplies the updates of leaves named `up` by `ratio`."""
    if ratio == 1.0:
        return optax.identity()

    def scale(updates: PyTree, _: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, u: u * ratio if path[-1].key == "up" else u, updates)

    return optax.stateless(scale)


def _averaged(state: Any, params: PyTree) -> PyTree:
    """Returns the weights that a part is evaluated with."""
    if not isinstance(state, optax.contrib.ScheduleFreeState):
        return params
    averaged = optax.contrib.schedule_free_eval_params(state, params)
    moved = jnp.asarray(state.max_lr) > 0
    return jax.tree.map(lambda y, x: jnp.where(moved, x, y), params, averaged)
