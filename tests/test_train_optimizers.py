"""Schedules and updates against formulas in NumPy, and against PyTorch, transformers, diffusers and optax."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.errors import ConfigError
from sdjax.train.config import Stage
from sdjax.train.optimizers import OPTIMIZERS, SHAPES, ema, make_optimizer, make_schedule, updates_done

LORA = {"unet": "lora", "text_encoder": "lora"}
BOTH = ("unet", "text_encoder")


def stage(**changes):
    return Stage(**{"name": "a", "train": ("lora",), "steps": 20, "learning_rate": 1e-2, "clip_norm": 0.0, **changes})


def adapter(seed, **more):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    return {"block": {"to_q": {"down": draw(4, 2), "up": draw(2, 3), **more}}}


def leaf_of(tree, name, part="unet"):
    return np.asarray(tree[part]["block"]["to_q"][name], np.float64)


def train(optimizer, trainable, gradients):
    """Returns the weights and the state after a step with each of the gradients."""
    state = optimizer.init(trainable)
    update = jax.jit(optimizer.update)
    for g in gradients:
        updates, state = update(g, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return trainable, state


# Schedules.


@pytest.mark.parity
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_schedules_are_those_of_diffusers(kind, warmup):
    import torch
    from diffusers import optimization

    peak, steps = 2e-3, 50
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    if kind == "polynomial":
        theirs = optimization.get_polynomial_decay_schedule_with_warmup(optimizer, warmup, steps, lr_end=0.0, power=2.5)
        default = optimization.get_scheduler(kind, optimizer, None, warmup, steps, power=2.5)
    else:
        default = theirs = optimization.get_scheduler(kind, optimizer, None, warmup, steps, num_cycles=3)
    ours = make_schedule(kind, peak, steps, warmup if kind != "constant" else 0, cycles=3, power=2.5)
    rates = ours(jnp.arange(steps + 1))
    rates_of = lambda scheduler: [peak * scheduler.lr_lambdas[0](n) for n in range(steps + 1)]
    np.testing.assert_allclose(rates, rates_of(theirs), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(rates, rates_of(default), atol=1.001e-7)
    assert float(ours(7)) == pytest.approx(float(rates[7]), rel=1e-6)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_the_first_step_without_warmup_and_the_held_ones_have_the_peak(kind):
    schedule = make_schedule(kind, 1e-3, 30, 10, cycles=2, power=2.0, hold=0.4)
    plain = make_schedule(kind, 1e-3, 12, cycles=2, power=2.0)
    rates = schedule(jnp.arange(31))
    np.testing.assert_allclose(rates[:10], np.arange(10) * 1e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[10:19], 1e-3, rtol=1e-6)
    np.testing.assert_array_equal(rates[18:], plain(jnp.arange(13)))
    assert float(plain(0)) == pytest.approx(1e-3)
    assert float(make_schedule(kind, 1e-3, 30, hold=1.0)(29)) == pytest.approx(1e-3)


@settings(max_examples=20, deadline=None)
@given(cycles=st.integers(1, 60), length=st.integers(1, 300), warmup=st.integers(0, 5))
def test_every_restart_reaches_the_peak(cycles, length, warmup):
    schedule = make_schedule("cosine_with_restarts", 1.0, warmup + cycles * length, warmup, cycles=cycles)
    rates = np.asarray(schedule(jnp.arange(60 * 300 + 6)))[warmup : warmup + cycles * length + 1]
    np.testing.assert_array_equal(rates[:-1].reshape(cycles, length)[:, 0], 1.0)
    assert rates[-1] < 1e-6
    assert (rates <= 1).all()


# The update of a part. Each reference is a loop over steps, with name -> gradient and name -> rate of each step.


def numpy_adamw(values, gradients, rates, decays, s):
    b1, b2 = s.betas
    m, v = ({name: np.zeros_like(value) for name, value in values.items()} for _ in "mv")
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for name, g in gradient.items():
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2
            step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + s.eps)
            values[name] = values[name] - rate[name] * (step + decays[name] * values[name])
    return values


def numpy_lion(values, gradients, rates, decays, s):
    """Chen et al. 2023, algorithm 2."""
    b1, b2 = s.betas
    m = {name: np.zeros_like(value) for name, value in values.items()}
    for gradient, rate in zip(gradients, rates, strict=True):
        for name, g in gradient.items():
            step = np.sign(b1 * m[name] + (1 - b1) * g)
            values[name] = values[name] - rate[name] * (step + decays[name] * values[name])
            m[name] = b2 * m[name] + (1 - b2) * g
    return values


def numpy_adafactor(values, gradients, rates, decays, s):
    """Shazeer & Stern 2018, algorithms 4 and 5 for a vector, with an absolute rate."""
    v = {name: np.zeros_like(value) for name, value in values.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        keep = 1 - t**-0.8
        for name, g in gradient.items():
            v[name] = keep * v[name] + (1 - keep) * (g**2 + 1e-30)
            step = g / np.sqrt(v[name])
            step = step / max(1.0, np.sqrt(np.mean(step**2)))
            values[name] = values[name] - rate[name] * (step + decays[name] * values[name])
    return values


def numpy_prodigy(values, gradients, rates, decays, s, d=1e-6):
    """Mishchenko & Defazio 2023, algorithm 4, as in the authors' code with bias correction and safeguard_warmup."""
    b1, b2 = s.betas
    b3, d0, numerator = math.sqrt(b2), d, 0.0
    first = dict(values)
    m, v, total = ({name: np.zeros_like(value) for name, value in values.items()} for _ in "mvs")
    k = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        if not any(np.abs(g).sum() for g in gradient.values()) and not k:
            continue
        k += 1
        dlr = d * min(rate.values()) * math.sqrt(1 - b2**k) / (1 - b1**k)
        numerator *= b3
        for name, g in gradient.items():
            numerator += d / d0 * dlr * np.sum(g * (first[name] - values[name]))
            m[name] = b1 * m[name] + (1 - b1) * d * g
            v[name] = b2 * v[name] + (1 - b2) * (d * g) ** 2
            total[name] = b3 * total[name] + d / d0 * d * g
        d = max(d, numerator / sum(np.abs(value).sum() for value in total.values()))
        for name in gradient:
            ratio = rate[name] / max(min(rate.values()), 1e-30)
            step = m[name] / (np.sqrt(v[name]) + d * s.eps)
            values[name] = values[name] - ratio * dlr * (step + decays[name] * values[name])
    return values


def numpy_schedule_free(values, gradients, rates, decays, s, averages=None):
    """Defazio et al. 2024, algorithm 1, in x, y and z. y is trained, and `averages` collects x."""
    b1, b2 = s.betas
    z, x = dict(values), dict(values)
    v = {name: np.zeros_like(value) for name, value in values.items()}
    highest, weights = 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        highest = max(highest, min(rate.values()))
        weights += highest**2
        share = highest**2 / weights if weights else 0.0
        for name, g in gradient.items():
            v[name] = b2 * v[name] + (1 - b2) * g**2
            step = g / (np.sqrt(v[name] / (1 - b2**t)) + s.eps)
            z[name] = z[name] - rate[name] * (step + decays[name] * values[name])
            x[name] = (1 - share) * x[name] + share * z[name]
            values[name] = b1 * x[name] + (1 - b1) * z[name]
    if averages is not None:
        averages.update(x)
    return values


REFERENCES = {
    "adamw": numpy_adamw,
    "adamw8bit": numpy_adamw,  # arrays as small as these stay float32
    "lion": numpy_lion,
    "adafactor": numpy_adafactor,
    "prodigy": numpy_prodigy,
    "schedule_free": numpy_schedule_free,
}
RATES = {
    "adamw": {"unet": 1e-2, "text_encoder": 3e-3},
    "adamw8bit": {"unet": 1e-2, "text_encoder": 3e-3},
    "lion": {"unet": 1e-3, "text_encoder": 3e-4},
    "adafactor": {"unet": 1e-2, "text_encoder": 3e-3},
    "prodigy": {"unet": 1.0, "text_encoder": 0.5},
    "schedule_free": {"unet": 1e-2, "text_encoder": 3e-3},
}
SETTINGS = {"schedule": "linear", "warmup_steps": 3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def test_every_optimizer_is_tested():
    assert set(REFERENCES) == set(OPTIMIZERS)


@pytest.mark.parametrize("kind", sorted(REFERENCES))
def test_updates_with_a_rate_for_each_part_and_for_up(kind):
    """Warm-up, decay, LoRA+ and a magnitude. The first gradient of `down` is 0, as in training: `up` begins at 0."""
    rates, steps, ratio = RATES[kind], 8, 16.0
    s = stage(optimizer=kind, learning_rate=rates, lora_plus_ratio=ratio, **SETTINGS)
    optimizer = make_optimizer(s, LORA)
    start = {"unet": adapter(0, magnitude=jnp.ones(3, jnp.float32)), "text_encoder": adapter(1)}
    gradients = [
        {"unet": adapter(10 + i, magnitude=jnp.full(3, 0.1 * i, jnp.float32)), "text_encoder": adapter(20 + i)}
        for i in range(steps)
    ]
    first = gradients[0]["unet"]["block"]["to_q"]
    first["down"] = jnp.zeros_like(first["down"])
    end, state = train(optimizer, start, gradients)
    evaluated = optimizer.evaluated(state, end)
    shares = [float(make_schedule("linear", 1.0, s.steps, 3)(n)) for n in range(steps)]
    for part, rate in rates.items():
        names = tuple(start[part]["block"]["to_q"])
        reference, averages = REFERENCES[kind], {}
        if kind == "schedule_free":
            reference = functools.partial(reference, averages=averages)
        expected = reference(
            {name: leaf_of(start, name, part) for name in names},
            [{name: leaf_of(g, name, part) for name in names} for g in gradients],
            [{name: rate * share * (ratio if name == "up" else 1.0) for name in names} for share in shares],
            {name: 0.0 if name == "magnitude" else s.weight_decay for name in names},
            s,
        )
        for name in names:
            tolerance = {"rtol": 5e-5, "atol": 2e-6}
            np.testing.assert_allclose(leaf_of(end, name, part), expected[name], **tolerance)
            np.testing.assert_allclose(leaf_of(evaluated, name, part), (averages or expected)[name], **tolerance)
            assert not np.allclose(expected[name], leaf_of(start, name, part), rtol=1e-6)
            assert end[part]["block"]["to_q"][name].dtype == jnp.float32
    assert optimizer.learning_rates(4) == pytest.approx({part: rate * shares[4] for part, rate in rates.items()})
    assert updates_done(state) == steps


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_updates_are_those_of_torch_and_transformers(kind):
    import torch
    from transformers.optimization import Adafactor

    random = np.random.default_rng(0)
    values = {"kernel": random.normal(size=(130, 140)), "bias": random.normal(size=9)}
    gradients = [{name: random.normal(size=value.shape) for name, value in values.items()} for _ in range(4)]
    tensors = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in values.items()}
    groups = [
        {"params": [tensors["kernel"]], "weight_decay": 0.1},
        {"params": [tensors["bias"]], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        theirs = torch.optim.AdamW(groups, lr=1e-2)
    else:
        theirs = Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    for gradient in gradients:
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[name], dtype=torch.float32)
        theirs.step()
    s = stage(train=("unet",), optimizer=kind, weight_decay=0.1)
    single = lambda tree: {"unet": {name: jnp.asarray(value, jnp.float32) for name, value in tree.items()}}
    end, state = train(make_optimizer(s, s.parts), single(values), [single(g) for g in gradients])
    for name, tensor in tensors.items():
        np.testing.assert_allclose(end["unet"][name], tensor.detach().numpy(), rtol=1e-5, atol=2e-6)
    if kind == "adafactor":  # a row and a column instead of the moment
        assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 300


def test_the_average_of_schedule_free_is_that_of_optax():
    s = stage(optimizer="schedule_free", learning_rate=1e-2)
    optimizer = make_optimizer(s, {"unet": "lora"})
    start, gradients = {"unet": adapter(0)}, [{"unet": adapter(i)} for i in range(1, 4)]
    end, state = train(optimizer, start, gradients)
    expected = optax.contrib.schedule_free_eval_params(state["unet"], end["unet"])
    jax.tree.map(np.testing.assert_array_equal, optimizer.evaluated(state, end)["unet"], expected)
    assert np.abs(leaf_of(end, "up") - np.asarray(expected["block"]["to_q"]["up"])).max() > 1e-4
    untrained = optimizer.evaluated(optimizer.init(start), start)
    jax.tree.map(np.testing.assert_array_equal, untrained, start)


def test_schedule_free_with_a_constant_rate_is_that_of_optax():
    s = stage(optimizer="schedule_free", learning_rate=3e-2, weight_decay=0.0)
    theirs = optax.contrib.schedule_free_adamw(3e-2, b1=0.9, b2=0.999, eps=1e-8)
    start, gradients = {"unet": adapter(0)}, [{"unet": adapter(i)} for i in range(1, 5)]
    end, _ = train(make_optimizer(s, {"unet": "lora"}), start, gradients)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = train(theirs, start, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), end, expected)


def test_schedule_free_needs_a_first_beta():
    with pytest.raises(ConfigError, match=r"schedule_free.*above 0.*0\.0, 0\.9"):
        make_optimizer(stage(optimizer="schedule_free", betas=(0.0, 0.9)), LORA)


def test_prodigy_waits_for_a_gradient_and_then_finds_a_rate():
    optimizer = make_optimizer(stage(optimizer="prodigy", learning_rate=1.0, weight_decay=0.0), {"unet": "lora"})
    start = {"unet": adapter(0)}
    nothing = jax.tree.map(jnp.zeros_like, start)
    idle, state = train(optimizer, start, [nothing, nothing])
    jax.tree.map(np.testing.assert_array_equal, idle, start)
    jax.tree.map(np.testing.assert_array_equal, state, optimizer.init(start))
    # |x| has gradients of one size everywhere, and starts at a distance of about 1 from its minimum.
    update, trainable = jax.jit(optimizer.update), start
    for _ in range(120):
        updates, state = update(jax.tree.map(jnp.sign, trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    before, after = (sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree)) for tree in (start, trainable))
    assert after < 0.3 * before


def test_prodigy_with_another_optimizers_rate_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, "sdjax"):
        make_optimizer(stage(optimizer="prodigy", learning_rate={"unet": 1e-4, "text_encoder": 1.0}), LORA)
        make_optimizer(stage(optimizer="adamw", learning_rate=1e-4), LORA)
    assert [record.getMessage() for record in caplog.records] == [
        "prodigy multiplies the rate it estimates by learning_rate = {'unet': 0.0001}: 1.0 is usual"
    ]


# Several parts.


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_parts_do_not_touch_each_other(kind):
    """The weights of a part do not depend on the other parts, and stay the same to the last bit at a rate of 0.

    Rows of new words and whole weights are parts too. A state shares no memory with the weights.
    """
    rate = 1.0 if kind == "prodigy" else 1e-2
    rates = {"unet": rate, "textual_inversion": 0.0, "text_encoder": rate}
    parts = {"unet": "lora", "textual_inversion": "rows", "text_encoder": "weights"}

    def tree(seed):
        random = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
        weights = {"mlp": {"kernel": draw(3, 4), "bias": draw(4)}, "up": {"scale": draw(4)}}
        return {"unet": adapter(seed), "textual_inversion": {"text_encoder": draw(2, 5)}, "text_encoder": weights}

    make = lambda parts, rates: make_optimizer(stage(optimizer=kind, learning_rate=rates, lora_plus_ratio=4.0), parts)
    optimizer, start, gradients = make(parts, rates), tree(0), [tree(i) for i in range(1, 4)]
    addresses = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((start, optimizer.init(start)))]
    assert len(set(addresses)) == len(addresses)  # a training step donates both
    end, state = train(optimizer, start, gradients)
    assert jax.tree.structure(end) == jax.tree.structure(start)
    alone = {"unet": parts["unet"]}
    single, _ = train(make(alone, rate), {"unet": start["unet"]}, [{"unet": g["unet"]} for g in gradients])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), end["unet"], single["unet"])
    for weights in (end, optimizer.evaluated(state, end)):
        np.testing.assert_array_equal(
            weights["textual_inversion"]["text_encoder"], start["textual_inversion"]["text_encoder"]
        )
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), end["text_encoder"], start["text_encoder"])
    assert all(jax.tree.leaves(moved))


def test_only_adapters_have_another_rate_for_up():
    weights = {"up": {"up": jnp.ones((2, 2), jnp.float32)}}
    gradient = {"text_encoder": jax.tree.map(lambda leaf: 0.5 * leaf, weights)}
    ends = [
        train(
            make_optimizer(stage(lora_plus_ratio=r), {"text_encoder": "weights"}), {"text_encoder": weights}, [gradient]
        )
        for r in (1.0, 16.0)
    ]
    jax.tree.map(np.testing.assert_array_equal, ends[0][0], ends[1][0])


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_what_has_one_axis_is_not_decayed(kind):
    rate = 1.0 if kind == "prodigy" else 1e-2
    s = stage(train=("unet",), optimizer=kind, learning_rate=rate, weight_decay=0.5)
    start = {"unet": {"kernel": jnp.ones((2, 2), jnp.float32), "bias": jnp.ones(3, jnp.float32)}}
    # One gradient that is not 0, because Prodigy needs one to estimate from.
    start["unet"]["other"] = jnp.ones((1, 1), jnp.float32)
    gradient = jax.tree.map(jnp.zeros_like, start)
    gradient["unet"]["other"] += 1.0
    end, _ = train(make_optimizer(s, s.parts), start, [gradient])
    np.testing.assert_array_equal(end["unet"]["bias"], 1)
    assert kind == "prodigy" or (end["unet"]["kernel"] < 1).all()  # Prodigy's first rate is too small to be seen


@pytest.mark.parametrize(("kind", "theirs"), [("adamw", optax.adamw), ("lion", optax.lion)])
def test_leaves_updated_together_are_updated_as_each_alone(kind, theirs):
    random = np.random.default_rng(0)
    shapes = {
        "a": {"down": (3, 3, 4, 8), "up": (8, 5)},
        "b": {"down": (400, 200), "up": (200, 6), "magnitude": (6,)},  # the first leaf is not a small one
        "c": {"down": (7, 8), "up": (8, 5), "magnitude": (5,)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)
    draw = lambda: jax.tree.map(lambda n: jnp.asarray(random.normal(size=n), jnp.float32), shapes, is_leaf=is_shape)
    start, gradients = draw(), [draw() for _ in range(3)]
    s = stage(optimizer=kind, weight_decay=0.1)
    ours, state = train(make_optimizer(s, {"unet": "lora"}), {"unet": start}, [{"unet": g} for g in gradients])
    alone = theirs(1e-2, *s.betas, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree))
    with jax.numpy_dtype_promotion("standard"):
        reference, _ = train(alone, start, gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours["unet"], reference)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert set(moments) == {(400, 200), (1, 3 * 3 * 4 * 8 + 7 * 8), (1, 8 * 5 + 200 * 6 + 8 * 5), (6 + 5,)}


def test_clipping_looks_at_all_parts_together():
    start = {"unet": adapter(0), "text_encoder": adapter(1)}
    gradient = {"unet": adapter(2), "text_encoder": adapter(3)}
    norm = float(optax.tree.norm(gradient))
    # eps as large as the gradients makes Adam's step depend on their size.
    settings = {"eps": 1.0, "weight_decay": 0.0}
    scaled = jax.tree.map(lambda g: g * (0.5 / norm), gradient)
    clipped, _ = train(make_optimizer(stage(clip_norm=0.5, **settings), LORA), start, [gradient])
    by_hand, _ = train(make_optimizer(stage(**settings), LORA), start, [scaled])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, by_hand)


def test_moments_are_kept_once_for_each_trained_value():
    start = {"unet": adapter(0)}
    counts = {}
    for kind in OPTIMIZERS:
        state = make_optimizer(stage(optimizer=kind, lora_plus_ratio=2.0), {"unet": "lora"}).init(start)
        counts[kind] = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.size > 1)
    trained = sum(leaf.size for leaf in jax.tree.leaves(start))
    assert {kind: count / trained for kind, count in counts.items()} == {
        "adamw": 2, "adamw8bit": 2, "adafactor": 1, "lion": 1, "prodigy": 4, "schedule_free": 2
    }  # fmt: skip


# The moving average.


@pytest.mark.parity
def test_the_moving_average_is_that_of_diffusers():
    import torch
    from diffusers.training_utils import EMAModel

    random = np.random.default_rng(0)
    parameter = torch.nn.Parameter(torch.tensor(random.normal(size=5), dtype=torch.float32))
    theirs = EMAModel([parameter], decay=0.4)
    average = {"unet": jnp.asarray(parameter.detach().numpy())}
    for n in range(9):
        value = random.normal(size=5).astype(np.float32)
        parameter.data = torch.tensor(value)
        theirs.step([parameter])
        average = ema(average, {"unet": jnp.asarray(value)}, jnp.int32(n), 0.4)
        np.testing.assert_allclose(average["unet"], theirs.shadow_params[0].numpy(), rtol=1e-5, atol=1e-6)
    half = ema(average, {"unet": jnp.ones(5, jnp.bfloat16)}, 3, 0.4)
    assert half["unet"].dtype == jnp.float32
