"""Adam with moments of eight bits: the codes against NumPy, the steps, and where they lead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.runtime.devices import mesh_of
from sdjax.train import eight_bit
from sdjax.train.config import Stage
from sdjax.train.optimizers import make_optimizer
from sdjax.train.partition import spec, written

B1, B2, EPS = 0.9, 0.99, 1e-8


def moments(seed, *shape):
    """Numbers over nine orders of magnitude, with an outlier and a row of zeros."""
    random = np.random.default_rng(seed)
    x = (random.normal(size=shape) * 10.0 ** random.uniform(-9, 0, shape)).astype(np.float32)
    x[0, 3], x[1] = 1e4, 0.0
    return x


def decoded(codes, scales, block=128):
    """The formulas of the module's docstring, in float64."""
    k, scales = np.asarray(codes, np.float64), np.repeat(np.asarray(scales, np.float64), block, axis=-1)
    return scales * (np.sign(k) * (k / 127) ** 2 if codes.dtype == np.int8 else (k / 255) ** 4)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 320), 160), ((3, 3, 64, 256), 256), ((128, 1280), 256), ((64, 96), 96), ((8, 77), None), ((4096, 8), None)],
)
def test_a_block_is_the_largest_that_divides_the_last_axis(shape, block):
    assert eight_bit.block_of(shape) == block


def chances(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_one_of_the_two_around_a_number(signed):
    x = moments(0, 32, 256)
    x = x if signed else np.square(x)
    codes, scales = eight_bit.encode(jnp.asarray(x), chances(1, *x.shape), 128, signed=signed)
    assert codes.dtype == (jnp.int8 if signed else jnp.uint8)
    np.testing.assert_allclose(scales, np.abs(x).reshape(32, 2, 128).max(-1))
    got = np.asarray(eight_bit.decode(codes, scales))
    np.testing.assert_allclose(got, decoded(codes, scales), rtol=1e-5)
    power, most = (2, 127) if signed else (4, 255)
    place = most * (np.abs(x) / np.maximum(np.repeat(scales, 128, -1), 1e-30)) ** (1 / power)
    k = np.abs(np.asarray(codes, np.float64))
    between = np.abs(k - place) < 1 + 1e-3
    assert np.all(between | ((k == 1) & (place < 1)))
    assert np.all(np.sign(got)[got != 0] == np.sign(x)[got != 0]) and np.all(got[1] == 0)
    assert got[0, 3] == x[0, 3]  # the largest of a block is exact
    if not signed:
        assert np.all((got > 0) == (x > 0))
    other = place[0, 128:] > 40  # the block beside the outlier keeps its numbers
    assert other.sum() > 10
    np.testing.assert_allclose(got[0, 128:][other], x[0, 128:][other], rtol=0.12)


@pytest.mark.parametrize("signed", [True, False])
def test_rounding_is_right_on_average(signed):
    x = np.linspace(0.01, 1, 128, dtype=np.float32)[None]
    encode = jax.jit(lambda chance: eight_bit.decode(*eight_bit.encode(jnp.asarray(x), chance, 128, signed=signed)))
    mean = np.mean([encode(chances(i, *x.shape)) for i in range(1000)], axis=0)
    np.testing.assert_allclose(mean, x, rtol=0.01)


def test_chances_are_even_and_differ_between_steps_and_places():
    still = jnp.zeros((64, 256), jnp.float32)  # where no gradient comes, step and place decide
    drawn = np.stack([eight_bit.chance(jnp.int32(n), still) for n in range(20)])
    assert drawn.min() >= 0 and drawn.max() < 1
    histogram, _ = np.histogram(drawn, bins=20, range=(0, 1))
    np.testing.assert_allclose(histogram, drawn.size / 20, rtol=0.03)
    flat = drawn.reshape(20, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(20)).max() < 0.04  # between steps
    assert abs(np.corrcoef(drawn[:, :, 1:].ravel(), drawn[:, :, :-1].ravel())[0, 1]) < 0.01  # between neighbours
    assert abs(np.corrcoef(drawn[:, 1:].ravel(), drawn[:, :-1].ravel())[0, 1]) < 0.01


def test_a_second_moment_that_changes_little_in_a_step_follows():
    """It falls by a thousandth in a step, far less than the distance of two codes, and is not held where it is."""
    optimizer = eight_bit.scale_by_adam(B1, 0.999, EPS)
    state, update = optimizer.init({"w": jnp.zeros((64, 128))}), jax.jit(optimizer.update)
    large, small = jnp.full((64, 128), 1.0), jnp.full((64, 128), 0.1).at[:, 0].set(1.0)
    for n in range(400):
        _, state = update({"w": large if n < 1 else small}, state)
    v = decoded(state.second.codes["w"], state.second.scales["w"])[:, 1:]
    expected = 1e-3 * 0.999**399 + 0.01 * (1 - 0.999**399)
    np.testing.assert_allclose(v.mean(), expected, rtol=0.02)


def test_a_step_is_adams_from_the_decoded_moments():
    optimizer = eight_bit.scale_by_adam(B1, B2, EPS)
    random = np.random.default_rng(1)
    params = {"large": jnp.zeros((48, 128)), "small": jnp.zeros((5, 3))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    plain = optax.scale_by_adam(B1, B2, EPS)
    plain_state = plain.init(params)
    for n in range(1, 5):
        g = {name: jnp.asarray(random.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()}
        m = decoded(state.first.codes["large"], state.first.scales["large"])
        v = decoded(state.second.codes["large"], state.second.scales["large"])
        direction, state = update(g, state)
        m, v = B1 * m + (1 - B1) * np.asarray(g["large"]), B2 * v + (1 - B2) * np.asarray(g["large"]) ** 2
        expected = m / (1 - B1**n) / (np.sqrt(v / (1 - B2**n)) + EPS)
        np.testing.assert_allclose(direction["large"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(decoded(state.first.codes["large"], state.first.scales["large"]), m, atol=0.03)
        with jax.numpy_dtype_promotion("standard"):
            wanted, plain_state = plain.update(g, plain_state)
        np.testing.assert_allclose(direction["small"], wanted["small"], rtol=1e-5)


def test_the_state_takes_a_quarter_of_the_memory_and_is_split_as_the_weights():
    stage = Stage(name="a", train=("unet",), steps=4, learning_rate=1e-3, optimizer="adamw8bit")
    params = {"unet": {"attn1": {"to_q": {"kernel": jax.ShapeDtypeStruct((320, 512), jnp.float32)}}}}
    optimizer = make_optimizer(stage, {"unet": "weights"})
    state = jax.eval_shape(optimizer.init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held < 2.05 * 320 * 512
    mesh = mesh_of(jax.devices()[:4], fsdp=2, tensor=2)
    split = {leaf.shape: spec(written(path), leaf.shape, mesh) for path, leaf in jax.tree.leaves_with_path(state)}
    weights = spec("unet/attn1/to_q/kernel", (320, 512), mesh)
    assert split[320, 512] == split[320, 2] == weights and len(weights) == 2


def test_a_regression_ends_where_adamw_ends():
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=(256, 128)), jnp.float32) for _ in "xy")
    loss = lambda w: jnp.mean(jnp.square(x @ w["unet"]["kernel"] - y))

    def reached(optimizer):
        stage = Stage(name="a", train=("unet",), steps=300, learning_rate=1e-2, optimizer=optimizer, schedule="linear")
        optimizer = make_optimizer(stage, {"unet": "weights"})
        w = {"unet": {"kernel": jnp.zeros((128, 128))}}
        state = optimizer.init(w)

        @jax.jit
        def step(w, state):
            updates, state = optimizer.update(jax.grad(loss)(w), state, w)
            return optax.apply_updates(w, updates), state

        for _ in range(stage.steps):
            w, state = step(w, state)
        return float(loss(w))

    plain, small = reached("adamw"), reached("adamw8bit")
    assert plain < 0.6 * float(loss({"unet": {"kernel": jnp.zeros((128, 128))}}))
    assert small == pytest.approx(plain, rel=2e-3)
