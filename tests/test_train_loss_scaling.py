"""Loss scaling in float16 goes as PyTorch's GradScaler goes, changes nothing in a skipped step, and resumes exactly."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import optax
import pytest
from flax import linen as nn

from sdjax.data.dataset import make_batch
from sdjax.models.layers import Compute, Dense
from sdjax.train import loss_scaling, stages
from sdjax.train.encoding import encode
from sdjax.train.loop import train
from sdjax.train.parallel import parallelize, stack, stack_frozen, together, unstack
from sdjax.train.results import NOTHING
from sdjax.train.step import make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


# ------------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("start", "steps", "expected"),
    [
        ((8, 0, 0), ["good"], (8, 1, 0)),
        ((8, 0, 0), ["good"] * 3, (16, 0, 0)),
        ((8, 2, 0), ["overflow"], (4, 0, 1)),
        ((8, 0, 0), ["overflow", "good", "overflow"], (2, 0, 2)),
        ((8, 2, 1), ["bad loss", "good"], (16, 0, 2)),
        ((8, 1, 0), ["bad result", "good"], (8, 2, 1)),
        ((1, 1, 0), ["overflow"] * 2, (1, 0, 2)),
        ((2.0**127, 2, 0), ["good"], (2.0**127, 0, 0)),
    ],
)
def test_the_scale_grows_after_good_steps_and_falls_after_an_overflow(monkeypatch, start, steps, expected):
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 3)
    measured = {"good": (1.0, 1.0), "overflow": (1.0, np.inf), "bad loss": (np.nan, np.nan), "bad result": (1.0, 1.0)}
    scale, good, skipped = start
    scaler = loss_scaling.Scaler(jnp.float32(scale), jnp.int32(good), jnp.int32(skipped))
    for step in steps:
        loss, norm = map(jnp.float32, measured[step])
        taken = jnp.isfinite(loss) & jnp.isfinite(norm) & (step != "bad result")
        scaler = loss_scaling.update(scaler, loss, norm, taken)
    assert tuple(map(float, scaler)) == expected
    assert [leaf.dtype for leaf in scaler] == [jnp.float32, jnp.int32, jnp.int32]


@pytest.mark.parametrize(
    ("scale", "loss", "norm", "expected"),
    [(2, 1, np.nan, True), (1, 1, np.inf, False), (2, np.inf, np.inf, False), (2, 1, 1, False)],
)
def test_only_an_overflow_above_the_smallest_scale_is_remedied(scale, loss, norm, expected):
    scaler = loss_scaling.first()._replace(scale=jnp.float32(scale))
    assert loss_scaling.is_remedied(scaler, jnp.float32(loss), jnp.float32(norm)) == expected


class Net(nn.Module):
    """Two linear layers, computed in float16."""

    @nn.compact
    def __call__(self, x):
        compute = Compute(dtype=jnp.dtype("float16"))
        return Dense(4, compute, name="out")(nn.silu(Dense(16, compute, name="hidden")(x)))


@pytest.mark.parity
def test_gradients_weights_and_scales_are_those_of_pytorch(monkeypatch):
    """Against autocast to float16 and GradScaler: 13 steps of SGD with clipping, in two of which gradients overflow.

    Scales and skipped steps must agree exactly, gradients and the weights in the end within 3e-3 of the largest
    (float16 rounds by 5e-4). Outside `jit`, so that XLA rounds after every operation as PyTorch does.
    """
    import torch

    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 3)
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    params = {name: {"kernel": draw(*s) / s[0] ** 0.5} for name, s in (("hidden", (4, 16)), ("out", (16, 4)))}
    params = {name: layer | {"bias": np.zeros_like(layer["kernel"][0])} for name, layer in params.items()}
    theirs = torch.nn.ModuleDict({"hidden": torch.nn.Linear(4, 16), "out": torch.nn.Linear(16, 4)})
    theirs.load_state_dict(
        {
            f"{name}.{kind}": torch.tensor(np.asarray(array.T))
            for name, layer in params.items()
            for kind, array in zip(("weight", "bias"), (layer["kernel"], layer["bias"]), strict=True)
        }
    )

    def as_ours(read):
        layers = {name: (read(layer.weight), read(layer.bias)) for name, layer in theirs.items()}
        return {name: {"kernel": weight.numpy().T, "bias": bias.numpy()} for name, (weight, bias) in layers.items()}

    def loss_of(params, x, y):
        return jnp.mean(jnp.square(jnp.asarray(Net().apply({"params": params}, x), jnp.float32) - y))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    state, scaler = optimizer.init(params), loss_scaling.first()
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    their_scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    scales, worst = [], 0.0
    for step in range(13):
        x, y = draw(8, 4), draw(8, 4) * (100 if step in (5, 6) else 0.5)
        with torch.autocast("cpu", dtype=torch.float16):
            output = theirs["out"](torch.nn.functional.silu(theirs["hidden"](torch.tensor(x))))
        their_optimizer.zero_grad()
        their_scaler.scale(torch.nn.functional.mse_loss(output.float(), torch.tensor(y))).backward()
        their_scaler.unscale_(their_optimizer)
        their_gradients = as_ours(lambda leaf: leaf.grad.clone())
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        their_scaler.step(their_optimizer)
        their_scaler.update()

        loss, gradients = loss_scaling.value_and_grad(loss_of, scaler)(params, x, y)
        norm = optax.tree.norm(gradients)
        scaler = loss_scaling.update(scaler, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm))
        assert bool(jnp.isfinite(norm)) == all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(their_gradients))
        scales.append(float(scaler.scale))
        assert scales[-1] == their_scaler.get_scale()
        if jnp.isfinite(norm):
            worst = max(worst, largest_difference(gradients, their_gradients))
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
    print(f"scales {scales}, gradients within {worst:.1e}")
    assert worst < 3e-3
    assert max(scales) > scales[0] > min(scales) and scaler.skipped == 2
    assert largest_difference(params, as_ours(lambda leaf: leaf.detach().clone())) < 3e-3


def largest_difference(ours, theirs):
    """Returns the largest difference of any leaf, relative to the largest value of the leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------- the step


@pytest.fixture(scope="module")
def prepared(micro_models, micro_images, tmp_path_factory):
    """(its stage, state on the host, frozen, batch of 8) of a float16 run with a moving average."""
    data = {"path": str(micro_images), "resolution": 16, "batch_size": 8}
    stage = {"ema_decay": 0.9, "lora_dropout": 0.1}
    output = tmp_path_factory.mktemp("scaling") / "run"
    config = micro.settings(micro_models(), micro_images, output, data=data, stages=[stage], dtype="float16")
    run = stages.plan_run(config)
    (plan,) = run.stages
    dataset, _ = encode(run, plan, NOTHING)
    state, frozen = stages.prepare(run, plan, NOTHING)
    batch = make_batch(dataset, plan.order(dataset.repeats, config.seed), 0)
    return plan, jax.tree.map(np.asarray, state), frozen, batch


@pytest.fixture(scope="module")
def take(prepared):
    """`take(batches, scale=..., **settings)` -> the state after a step for each batch, and the metrics of each."""
    plan, state, frozen, _ = prepared

    @functools.cache
    def compiled(accumulation, **settings):
        step = make_train_step(plan.recipe._replace(accumulation=accumulation))
        return parallelize(step, batch_size=8 // accumulation, **settings)

    def take(batches, *, scale=2.0**16, accumulation=1, **settings):
        parallel, metrics = compiled(accumulation, **settings), []
        start = state._replace(scaler=state.scaler._replace(scale=np.float32(scale)))
        now, placed = parallel.place_state(start), parallel.place_frozen(frozen)
        for batch in batches:
            now, measured = parallel.step(now, placed, parallel.place_batch(batch), jax.random.key(3))
            metrics.append(jax.tree.map(np.asarray, measured))
        return parallel.fetch(now), metrics

    return take


@pytest.fixture(scope="module")
def batches(prepared):
    """(a batch that overflows, one that does not): the first example of one has a huge weight in the loss."""
    batch = prepared[3]
    weighted = lambda weight: batch | {"weight": np.float32([weight, *[1] * (len(batch["index"]) - 1)])}
    return weighted(1e9), weighted(1)


@pytest.fixture(scope="module")
def alone(take, batches):
    bad, good = batches
    return take([bad, good, good], data=1)


def test_frozen_weights_are_float16_and_what_is_trained_is_float32(prepared):
    _, state, frozen, _ = prepared
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["params"])} == {jnp.dtype("float16")}
    floats = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floats) == {np.dtype("float32")}


def test_a_step_that_overflows_changes_only_the_scale_and_the_counters(prepared, take, batches):
    state = prepared[1]
    after, (metrics,) = take([batches[0]], data=1)
    jax.tree.map(np.testing.assert_array_equal, after[1:4], state[1:4])
    assert after.step == 1 and tuple(after.scaler) == (2.0**15, 0, 1)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["grad_norm"]) and metrics["finite"]
    assert metrics["loss_scale"] == 2.0**16 and metrics["skipped_steps"] == 1


def test_after_a_skipped_step_training_goes_on(prepared, take, batches, alone):
    state, metrics = alone
    assert [bool(np.isfinite(m["grad_norm"])) for m in metrics] == [False, True, True]
    assert [float(m["loss_scale"]) for m in metrics] == [2.0**16, 2.0**15, 2.0**15]
    assert state.step == 3 and tuple(state.scaler) == (2.0**15, 2, 1)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(state[1]), jax.tree.leaves(prepared[1][1]), strict=True))
    # The first step that counts makes the average what is trained, as if the skipped step had not been.
    after, _ = take(batches, data=1)
    jax.tree.map(np.testing.assert_array_equal, after.average, after.trainable)


def test_a_loss_that_is_not_finite_is_no_overflow(prepared, take, batches):
    state = prepared[1]
    batch = batches[0] | {"weight": np.full(8, np.inf, np.float32)}
    after, (metrics,) = take([batch], data=1)
    jax.tree.map(np.testing.assert_array_equal, after[1:4], state[1:4])
    assert not metrics["finite"]
    assert tuple(after.scaler) == (2.0**16, 0, 1)


def test_gradients_that_overflow_even_unscaled_are_reported_as_not_finite(take, batches):
    after, metrics = take([batches[0]] * 2, scale=2, data=1)
    assert tuple(after.scaler) == (1, 0, 2)
    assert [bool(m["finite"]) for m in metrics] == [True, False]
    assert np.isfinite(metrics[1]["loss"]) and not np.isfinite(metrics[1]["grad_norm"])


def assert_near(taken, alone):
    """Asserts that three steps gave the same scales, and nearly the same numbers. Halves of a batch round otherwise."""
    assert taken[0].step == alone[0].step and tuple(taken[0].scaler) == tuple(alone[0].scaler)
    for ours, theirs in zip(taken[1], alone[1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert np.isfinite(ours["grad_norm"]) == np.isfinite(theirs["grad_norm"])
        assert not np.isfinite(ours["grad_norm"]) or ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("settings", [{"data": 1, "fsdp": 2}, {"mode": "pmap", "data": 2}], ids=str)
def test_all_devices_skip_a_step_if_the_gradients_of_one_overflow(take, batches, alone, settings):
    bad, good = batches
    assert_near(take([bad, good, good], **settings), alone)


def test_accumulated_gradients_are_the_mean_and_one_overflow_skips_them_all(take, batches, alone):
    bad, good = batches
    assert_near(take([bad, good, good], data=1, accumulation=4), alone)


def test_each_copy_has_its_own_scale(prepared, batches, alone):
    plan, state, frozen, _ = prepared
    bad, good = batches
    parallel = parallelize(together(make_train_step(plan.recipe)), batch_size=8, data=1)
    keys = stack([jax.random.key(3)] * 2)
    placed, frozen = parallel.place_state(stack([state] * 2)), parallel.place_frozen(stack_frozen([frozen] * 2))
    for pair in ([bad, good], [good, good]):
        placed, metrics = parallel.step(placed, frozen, parallel.place_batch(stack(pair, axis=1)), keys)
    skipped, other = unstack(parallel.fetch(placed), 2)
    assert tuple(skipped.scaler) == (2.0**15, 1, 1) and tuple(other.scaler) == (2.0**16, 2, 0)
    assert metrics["finite"].all() and metrics["loss_scale"].tolist() == [2.0**15, 2.0**16]
    assert metrics["loss"][0] == pytest.approx(alone[1][1]["loss"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_only_the_state_of_float16_has_a_scale(settings, dtype):
    words = {"name": "words", **micro.WORDS}
    run = stages.plan_run(settings(dtype=dtype, stages=[words, {"name": "vae", "train": ["vae"]}]))
    for plan in run.stages:
        scaled = dtype == "float16" and plan.stage.name == "words"
        paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(plan.state)]
        found = [path for path in paths if path.startswith(".scaler")]
        assert found == ([".scaler.scale", ".scaler.good", ".scaler.skipped"] if scaled else [])
        assert plan.recipe.scales_loss == scaled


# -------------------------------------------------------------------------------------------------------------- the run


def losses(config):
    assert train(config) == 0
    return [line["loss"] for line in micro.metric_lines(Path(config.output))]


def test_the_losses_of_a_lora_are_those_of_float32(settings, finished):
    found = losses(settings(dtype="float16", validation={}, checkpoint={"every": 0}))
    np.testing.assert_allclose(found, [line["loss"] for line in micro.metric_lines(finished[0])], rtol=3e-3)


@pytest.mark.parametrize(
    "stage",
    [
        {**micro.WORDS, "init_tokens": ["red circle", "<rand-0.1>"], "clip_ti_decay": True},
        {"train": ["unet"], "optimizer": "adafactor"},
    ],
    ids=["words", "whole"],
)
def test_the_losses_are_those_of_float32(settings, stage, tmp_path):
    config = settings(stages=[{"steps": 3, **stage}], validation={}, checkpoint={"every": 0})
    expected = losses(dataclasses.replace(config, output=str(tmp_path / "float32")))
    found = losses(dataclasses.replace(config, dtype="float16"))
    print(f"losses within {np.max(np.abs(np.divide(found, expected) - 1)):.1e}")
    np.testing.assert_allclose(found, expected, rtol=3e-3)


def scaled_run(settings, monkeypatch, **changes):
    """Returns a run of 8 steps, in which the scale first falls and then rises and falls."""
    monkeypatch.setattr(loss_scaling, "FIRST", 2.0**20)
    monkeypatch.setattr(loss_scaling, "GROWTH_INTERVAL", 2)
    stage = {"steps": 8, "schedule": "linear", "ema_decay": 0.9, "lora_dropout": 0.1}
    return settings(dtype="float16", stages=[stage], validation={}, checkpoint={"every": 1, "keep": 100}, **changes)


def test_a_resumed_run_ends_with_the_same_bits_and_scales(settings, monkeypatch, tmp_path):
    config = scaled_run(settings, monkeypatch)
    assert train(config) == 0
    lines = micro.metric_lines(Path(config.output))
    scales = [line["loss_scale"] for line in lines]
    changes = set(np.sign(np.diff(scales)))
    print(scales)
    assert changes == {-1, 0, 1} and scales[0] == 2.0**20
    # The learning rate falls by an eighth of its peak in each step that is not skipped, and in no other.
    skipped_before = [0, *(line["skipped_steps"] for line in lines[:-1])]
    rates = [5e-3 * (1 - (i - skipped) / 8) for i, skipped in enumerate(skipped_before)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert [line["grad_norm"] is None for line in lines] == [
        line["skipped_steps"] > before for line, before in zip(lines, skipped_before, strict=True)
    ]
    output = tmp_path / "resumed"
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "export")
    micro.remove_checkpoints_after(output, 3)  # after two skipped steps and a good one
    assert train(dataclasses.replace(config, output=str(output)), resume=True) == 0
    assert micro.exported(output) == micro.exported(Path(config.output))
    for line, expected in zip(micro.metric_lines(output), lines, strict=True):
        assert line | {"examples_per_second": 0} == expected | {"examples_per_second": 0}


def test_a_run_can_go_on_in_float16_and_back(finished, settings):
    config = settings(data={"cache": ""}, validation={})
    output = Path(config.output)
    shutil.copytree(finished[0], output)
    expected = [line["loss"] for line in micro.metric_lines(output)]
    exports = []
    for dtype, step in (("float16", 4), ("float32", 6)):
        shutil.rmtree(output / "export")
        micro.remove_checkpoints_after(output, step)
        assert train(dataclasses.replace(config, dtype=dtype), resume=True) == 0
        exports.append(micro.exported(output))
    assert exports[0] == exports[1]
    lines = micro.metric_lines(output)
    assert [line.get("loss_scale") for line in lines] == [*[None] * 4, 2.0**16, 2.0**16]
    np.testing.assert_allclose([line["loss"] for line in lines], expected, rtol=3e-3)


def test_the_autoencoder_trains_without_a_scale(settings):
    config = settings(dtype="float16", stages=[{"train": ["vae"]}], validation={}, checkpoint={"every": 0})
    found = losses(config)
    assert found[-1] < found[0]
    assert "loss_scale" not in Path(config.output, "metrics.jsonl").read_text()
