"""Schedules and updates against the formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.config import Stage
from sdjax.train.optimizers import make_optimizer, make_schedule


def stage(**changes):
    return Stage(**{"name": "a", "train": ("lora",), "steps": 20, "learning_rate": 1e-2, "clip_norm": 0.0, **changes})


def adapter(seed, **more):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"block": {"to_q": {"down": draw(4, 2), "up": draw(2, 3), **more}}}


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedules_follow_diffusers(kind):
    peak, steps, warmup = 2e-3, 50, 10
    for n in range(steps):
        if n < warmup:
            share = n / warmup
        elif kind == "linear":
            share = (steps - n) / (steps - warmup)
        else:
            share = 1.0 if kind == "constant" else 0.5 * (1 + np.cos(np.pi * (n - warmup) / (steps - warmup)))
        assert float(make_schedule(kind, peak, steps, warmup)(n)) == pytest.approx(peak * share, rel=1e-5, abs=1e-9)


def test_without_warmup_the_first_step_has_the_peak():
    for kind in ("constant", "linear", "cosine"):
        assert float(make_schedule(kind, 1e-4, 10)(0)) == pytest.approx(1e-4)


def numpy_adamw(value, gradients, rates, *, decay=1e-2, betas=(0.9, 0.999), eps=1e-8):
    value = np.asarray(value, np.float64)
    m = v = np.zeros_like(value)
    for t, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        step = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        value = value - rate * (step + decay * value)
    return value


def train(optimizer, trainable, gradients):
    state = optimizer.init(trainable)
    update = jax.jit(optimizer.update)
    for g in gradients:
        updates, state = update(g, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable


def test_adamw_with_a_rate_for_each_part_and_for_up():
    rates = {"unet": 1e-2, "text_encoder": 3e-3}
    s = stage(learning_rate=rates, lora_plus_ratio=16.0, schedule="linear", warmup_steps=3)
    optimizer = make_optimizer(s, ("unet", "text_encoder"))
    start = {"unet": adapter(0, magnitude=jnp.ones(3, jnp.float32)), "text_encoder": adapter(1)}
    gradients = [
        {"unet": adapter(10 + i, magnitude=jnp.full(3, 0.1 * i, jnp.float32)), "text_encoder": adapter(20 + i)}
        for i in range(6)
    ]
    end = train(optimizer, start, gradients)
    share = [float(make_schedule("linear", 1.0, s.steps, 3)(n)) for n in range(6)]
    for part in rates:
        for leaf in start[part]["block"]["to_q"]:
            get = lambda tree, part=part, leaf=leaf: np.asarray(tree[part]["block"]["to_q"][leaf])
            ratio = 16.0 if leaf == "up" else 1.0
            expected = numpy_adamw(
                get(start),
                [get(g) for g in gradients],
                [rates[part] * ratio * x for x in share],
                decay=0.0 if leaf == "magnitude" else s.weight_decay,
            )
            np.testing.assert_allclose(get(end), expected, rtol=2e-5, atol=1e-6)
            assert get(end).dtype == np.float32
    assert optimizer.learning_rates(2) == pytest.approx({part: rate * share[2] for part, rate in rates.items()})


def test_clipping_looks_at_all_parts_together():
    start = {"unet": adapter(0), "text_encoder": adapter(1)}
    gradient = {"unet": adapter(2), "text_encoder": adapter(3)}
    norm = float(optax.tree.norm(gradient))
    # eps as large as the gradients makes Adam's step depend on their size.
    settings = {"eps": 1.0, "weight_decay": 0.0}
    scaled = jax.tree.map(lambda g: g * (0.5 / norm), gradient)
    parts = ("unet", "text_encoder")
    clipped = train(make_optimizer(stage(clip_norm=0.5, **settings), parts), start, [gradient])
    by_hand = train(make_optimizer(stage(**settings), parts), start, [scaled])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, by_hand)


def test_moments_are_kept_for_what_is_trained_once():
    start = {"unet": adapter(0)}
    state = make_optimizer(stage(lora_plus_ratio=2.0), ("unet",)).init(start)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert numbers == 2 * sum(leaf.size for leaf in jax.tree.leaves(start))
