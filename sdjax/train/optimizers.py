"""What turns gradients into updates: AdamW with its schedules, clipping, and a rate for each part.

What is trained is a dict part -> tree, e.g. `{"unet": adapter, "text_encoder": adapter}`, without the constants that
`lora.split` takes out. Two kinds of leaf stand out by the name of their last key: `up` may have a rate of its own
(LoRA+, arXiv:2402.12354); `magnitude` (DoRA) is not decayed, since 0 is not where it should be drawn to.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from sdjax.config import Stage

Schedule = Callable[[Any], Float[Array, ""]]


class Optimizer(NamedTuple):
    """An optax transformation with the means to report on it."""

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    """`update(gradients, state, trainable) -> (updates, state)`; apply with `optax.apply_updates`."""
    learning_rates: Callable[[int], dict[str, float]]
    """Learning rate of each part in optimizer step n (0 is the first)."""


def make_optimizer(stage: Stage, parts: tuple[str, ...]) -> Optimizer:
    """The stage's optimizer over the given parts of what is trained."""
    peaks = stage.learning_rate if isinstance(stage.learning_rate, dict) else dict.fromkeys(parts, stage.learning_rate)
    schedules = {part: make_schedule(stage.schedule, peaks[part], stage.steps, stage.warmup_steps) for part in parts}
    kind = OPTIMIZERS[stage.optimizer]
    transforms = {}
    for part, schedule in schedules.items():
        transforms[part] = kind(stage, schedule)
        transforms[f"{part} up"] = kind(stage, _times(schedule, stage.lora_plus_ratio))
    transform = optax.chain(
        optax.clip_by_global_norm(stage.clip_norm) if stage.clip_norm else optax.identity(),
        optax.partition(transforms, _labels),
    )

    def update(gradients: PyTree, state: PyTree, trainable: PyTree) -> tuple[PyTree, PyTree]:
        # optax raises a Python float to an integer count, which strict promotion refuses; no number changes by it.
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(gradients, state, trainable)

    return Optimizer(
        transform.init,
        update,
        lambda step: {part: float(schedule(step)) for part, schedule in schedules.items()},
    )


def make_schedule(kind: str, peak: float, steps: int, warmup_steps: int = 0) -> Schedule:
    """Optimizer step n (0 is the first) -> learning rate.

    Rises linearly from 0 over `warmup_steps`, then follows `kind`: constant, or linear or half a cosine down to 0 at
    `steps`. The same numbers as diffusers' `get_scheduler`.
    """
    shape = SHAPES[kind]

    def schedule(step: Any) -> Float[Array, ""]:
        n = jnp.asarray(step, jnp.float32)
        after = jnp.clip((n - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
        return peak * jnp.where(n < warmup_steps, n / max(1, warmup_steps), shape(after))

    return schedule


SHAPES: dict[str, Callable[[Float[Array, ""]], Float[Array, ""]]] = {
    "constant": jnp.ones_like,
    "constant_with_warmup": jnp.ones_like,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
}
"""Share of the peak at a given progress (0 to 1) after the warm-up."""


def _adamw(stage: Stage, schedule: Schedule) -> optax.GradientTransformation:
    """AdamW, arXiv:1711.05101, with the decay scaled by the learning rate as PyTorch and optax do."""
    return optax.adamw(
        schedule,
        b1=stage.betas[0],
        b2=stage.betas[1],
        eps=stage.eps,
        weight_decay=stage.weight_decay,
        mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "magnitude", tree),
    )


OPTIMIZERS: dict[str, Callable[[Stage, Schedule], optax.GradientTransformation]] = {"adamw": _adamw}


def _times(schedule: Schedule, ratio: float) -> Schedule:
    return lambda step: ratio * schedule(step)


def _labels(trainable: PyTree) -> PyTree:
    """The transformation each leaf gets: its part's, or that of its part's `up`."""

    def label(path: Any, _: Any) -> str:
        return f"{path[0].key} up" if path[-1].key == "up" else path[0].key

    return jax.tree_util.tree_map_with_path(label, trainable)
