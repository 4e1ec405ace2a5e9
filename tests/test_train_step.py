"""A step does not depend on the partition over devices or on accumulation, and never learns what is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from sdjax.data.dataset import make_batch
from sdjax.runtime.hlo import Text
from sdjax.train import stages
from sdjax.train.encoding import encode
from sdjax.train.parallel import parallelize
from sdjax.train.results import NOTHING
from sdjax.train.step import Draws, distance, draw, make_train_step, variables

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 4


@pytest.fixture(scope="module")
def prepare(micro_models, micro_images, tmp_path_factory):
    """`prepare(**stage)` -> (run, its stage, (state on the host, frozen), data set) with a batch of 8."""

    def prepare(**stage):
        data = {"path": str(micro_images), "resolution": 16, "batch_size": 8}
        output = tmp_path_factory.mktemp("step") / "run"
        run = stages.plan_run(micro.settings(micro_models(), micro_images, output, data=data, stages=[stage]))
        dataset, _ = encode(run, run.stages[0], NOTHING)
        state, frozen = stages.prepare(run, run.stages[0], NOTHING)
        return run, run.stages[0], (jax.tree.map(np.asarray, state), frozen), dataset

    return prepare


@pytest.fixture(scope="module")
def prepared(prepare):
    return prepare(min_snr_gamma=5.0, lora_dropout=0.1)


def batch_of(prepared, number):
    run, plan, _, dataset = prepared
    return make_batch(dataset, plan.order(dataset.repeats, run.config.seed), number)


def train(prepared, *, accumulation=1, **settings):
    """Returns (compiled step, losses, trainable) after STEPS steps."""
    run, plan, ready, _ = prepared
    recipe = plan.recipe._replace(accumulation=accumulation)
    parallel = parallelize(make_train_step(recipe), batch_size=8 // accumulation, **settings)
    state, frozen = parallel.place_state(ready[0]), parallel.place_frozen(ready[1])
    key = plan.keys(run.config.seed)[1]
    compiled = parallel.step.lower(state, frozen, parallel.place_batch(batch_of(prepared, 0)), key).compile()
    losses = []
    for number in range(STEPS):
        state, metrics = compiled(state, frozen, parallel.place_batch(batch_of(prepared, number)), key)
        assert metrics["finite"]
        losses.append(float(metrics["loss"]))
    return compiled, losses, parallel.fetch(state).trainable


@pytest.fixture(scope="module")
def alone(prepared):
    return train(prepared, data=1)


def largest_difference(ours, theirs):
    """Returns the largest difference of any leaf, relative to the largest value of the leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_eight_devices_give_the_curve_and_adapter_of_one_and_reduce_only_the_adapter(prepared, alone, mode):
    """Losses within 1e-5. Adam turns rounding in a gradient near 0 into a visible step: adapters within 2e-3."""
    compiled, losses, trainable = train(prepared, mode=mode)
    worst = largest_difference(trainable, alone[2])
    print(f"{mode}: losses within {np.max(np.abs(np.divide(losses, alone[1]) - 1)):.1e}, adapters within {worst:.1e}")
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert worst < 2e-3
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(prepared[2][0].trainable))
    reduced = sum(Text(compiled.as_text()).between_devices().values())
    print(f"{mode}: {reduced} bytes reduced a step, the adapter has {size}")
    assert size <= reduced <= size + 16  # and a few scalars


MESHES = {
    "data": {"data": 4},
    "fsdp": {"data": 1, "fsdp": 4},
    "tensor": {"data": 1, "tensor": 2},
    "all axes": {"data": 2, "fsdp": 2, "tensor": 2},
    "pmap": {"mode": "pmap", "data": 4},
}


@pytest.mark.parametrize("mesh", ["fsdp", "tensor"])
def test_split_weights_give_the_curve_of_one_device_for_a_lora(prepared, alone, mesh):
    _, losses, trainable = train(prepared, **MESHES[mesh])
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert largest_difference(trainable, alone[2]) < 2e-3


@pytest.mark.parametrize(
    ("stage", "accumulation", "meshes"),
    [
        ({**micro.WORDS, "learning_rate": 1e-2}, 1, ["data", "fsdp", "tensor", "pmap"]),
        ({"train": ["unet"], "ema_decay": 0.9, "learning_rate": 1e-4}, 2, list(MESHES)),
    ],
    ids=["words", "whole"],
)
def test_every_mesh_gives_the_curve_of_one_device(prepare, stage, accumulation, meshes):
    """Losses within 1e-5."""
    prepared = prepare(**stage)
    _, expected, _ = train(prepared, accumulation=accumulation, data=1)
    for mesh in meshes:
        _, losses, _ = train(prepared, accumulation=accumulation, **MESHES[mesh])
        print(f"{mesh}: losses within {np.max(np.abs(np.divide(losses, expected) - 1)):.1e}")
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=mesh)


def test_accumulation_is_the_exact_mean(prepared, alone):
    """4 x 2 examples against 8 at once; the same tolerance, for the same reason."""
    _, losses, trainable = train(prepared, accumulation=4, data=1)
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    assert largest_difference(trainable, alone[2]) < 2e-3


def test_a_new_adapter_changes_nothing(prepared):
    _, plan, ready, _ = prepared
    random = np.random.default_rng(0)
    draws = Draws(
        latents=jnp.asarray(random.normal(size=(8, 8, 8, 4)), jnp.float32),
        noise=jnp.asarray(random.normal(size=(8, 8, 8, 4)), jnp.float32),
        timesteps=jnp.arange(8) * 120,
        dropout=jax.random.split(jax.random.key(0), 8),
        perturbation=jnp.zeros((8, 8, 8, 4), jnp.float32),
        guidance=jnp.ones(8),
    )
    error = jax.jit(functools.partial(distance, plan.recipe))
    adapted = variables(plan.recipe, ready[0].trainable, ready[1])
    plain = {"unet": {"params": ready[1]["params"]["unet"]}}
    ours, base = (error(models, batch_of(prepared, 0), draws) for models in (adapted, plain))
    np.testing.assert_array_equal(ours, base)


def test_only_what_is_finite_reaches_the_weights_and_only_step_and_place_decide_the_randomness(prepared):
    _, plan, ready, _ = prepared
    step = jax.jit(make_train_step(plan.recipe))
    key = jax.random.key(0)
    batch = batch_of(prepared, 0)
    state, metrics = step(ready[0], ready[1], batch, key)
    assert metrics["finite"]
    _, again = step(ready[0], ready[1], {name: array[::-1] for name, array in batch.items()}, key)
    assert float(again["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-6)
    _, later = step(ready[0]._replace(step=np.int32(1)), ready[1], batch, key)
    assert float(later["loss"]) != pytest.approx(float(metrics["loss"]), rel=1e-3)

    batch["context"][3, 0, 0] = np.nan
    after, metrics = step(state, ready[1], batch, key)
    assert not metrics["finite"] and np.isnan(metrics["loss"])
    assert after.step == 2
    jax.tree.map(np.testing.assert_array_equal, after[1:], state[1:])


def test_time_steps_stay_in_their_range(prepared):
    _, plan, _, _ = prepared
    batch = {"moments": np.zeros((4000, 1, 1, 8), np.float32), "index": np.arange(4000, dtype=np.int32)}
    for bounds, expected in (((0.0, 1.0), (0, 999)), ((0.2, 0.21), (200, 209)), ((0.9999, 1.0), (999, 999))):
        recipe = plan.recipe._replace(stage=dataclasses.replace(plan.stage, timestep_range=bounds))
        timesteps = jax.jit(functools.partial(draw, recipe))(batch, jax.random.key(0)).timesteps
        assert expected[0] <= int(timesteps.min()) <= expected[0] + 2
        assert expected[1] - 2 <= int(timesteps.max()) <= expected[1]
