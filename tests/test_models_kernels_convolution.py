"""Each way of convolving on the CPU and the TPU against the definition, summed tap by tap in float64; gradients too."""

import re

import jax
import numpy as np
import pytest

from sdjax.models.kernels import convolution_tpu
from sdjax.models.kernels.convolution import convolution
from sdjax.models.kernels.convolution_cpu import product_pays, winograd_tile
from sdjax.models.kernels.upsampling import upsample_nearest

PADDING = ((1, 1), (1, 1))
WAYS = {  # shape of x, channels of the result, side of Winograd's tiles
    "winograd of 2": ((2, 24, 26, 256), 288, 2),
    "winograd of 4": ((4, 32, 36, 256), 288, 4),
    "winograd of few pixels": ((1, 16, 16, 256), 288, 2),
    "winograd of few channels": ((8, 16, 16, 64), 96, 4),
    "product": ((1, 8, 8, 512), 512, 0),
    "plain": ((2, 7, 6, 5), 4, 0),
}


def by_definition(x, kernel):
    """Returns the convolution in float64, and a function from its gradient to the gradients by x and the kernel."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    height, width = x.shape[1:3]
    taps = [(i, j) for i in range(3) for j in range(3)]

    def shifted(image, i, j):
        return np.pad(image, ((0, 0), *PADDING, (0, 0)))[:, i : i + height, j : j + width]

    result = sum(shifted(x, i, j) @ kernel[i, j] for i, j in taps)

    def pull(gradient):
        by_x = sum(shifted(gradient, 2 - i, 2 - j) @ kernel[i, j].T for i, j in taps)
        by_kernel = np.array([np.einsum("bhwc,bhwd->cd", shifted(x, i, j), gradient) for i, j in taps])
        return by_x, by_kernel.reshape(kernel.shape)

    return result, pull


def error(ours, exact):
    assert ours.dtype == np.float32
    return np.linalg.norm(ours - exact) / np.linalg.norm(exact)


def normal(*shapes):
    random = np.random.default_rng(0)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_the_convolution(way):
    shape, features, tile = WAYS[way]
    x, kernel, gradient = normal(shape, (3, 3, shape[3], features), (*shape[:3], features))
    assert winograd_tile(x, kernel, PADDING) == tile
    assert product_pays(x, kernel) == (way == "product")
    got, pull = jax.vjp(lambda x, k: convolution(x, k, 1, PADDING, "cpu"), x, kernel)
    expected, pull_exactly = by_definition(x, kernel)
    for ours, exact in zip((got, *pull(gradient)), (expected, *pull_exactly(gradient.astype(np.float64))), strict=True):
        assert error(ours, exact) < (5e-6 if tile == 4 else 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("shape", [(2, 7, 18, 5), (1, 1, 16, 5)])
def test_the_way_of_the_tpu_is_the_convolution(shape, dtype, tolerance):
    features = 4
    x, kernel, gradient = (
        jax.numpy.asarray(a, dtype) for a in normal(shape, (3, 3, shape[3], features), (*shape[:3], features))
    )
    assert convolution_tpu.takes(x, kernel, 1, PADDING)
    got, pull = jax.vjp(lambda x, k: convolution(x, k, 1, PADDING, "tpu"), x, kernel)
    expected, pull_exactly = by_definition(np.asarray(x), np.asarray(kernel))
    exact = (expected, *pull_exactly(np.asarray(gradient, np.float64)))
    for ours, theirs in zip((got, *pull(gradient)), exact, strict=True):
        assert ours.dtype == dtype
        assert error(np.asarray(ours, np.float32), theirs) < tolerance


def test_each_example_has_its_kernel_on_the_tpu():
    x, kernels = normal((3, 6, 16, 5), (3, 3, 3, 5, 4))
    got = jax.vmap(lambda x, kernel: convolution(x[None], kernel, 1, PADDING, "tpu")[0])(x, kernels)
    expected = [by_definition(x[i : i + 1], kernels[i])[0] for i in range(3)]
    assert error(np.asarray(got), np.concatenate(expected)) < 2e-6


def test_a_batch_on_several_tpus_stays_where_it_is():
    """The examples are an axis of the map for XLA; it divides them over a mesh all the same."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    x, kernel = normal((4, 4, 16, 3), (3, 3, 3, 3))
    loss = lambda x, kernel: jax.numpy.sum(jax.numpy.square(convolution(x, kernel, 1, PADDING, "tpu")))
    program = (
        jax.jit(jax.grad(loss, (0, 1)), in_shardings=(place("data"), place())).lower(x, kernel).compile().as_text()
    )
    assert "f32[2,4,16,3]" in program and "f32[4,4,16,3]" not in program
    assert "all-reduce" in program  # of the gradient by the kernel
    assert not re.search("all-gather|all-to-all|collective-permute", program)


def test_the_tpu_leaves_other_convolutions_to_xla():
    x, kernel = np.zeros((1, 16, 16, 4), np.float32), np.zeros((3, 3, 4, 4), np.float32)
    assert convolution_tpu.takes(x, kernel, 1, PADDING)
    assert not convolution_tpu.takes(x[:, :, :8], kernel, 1, PADDING)  # narrow
    assert not convolution_tpu.takes(x, kernel, 2, PADDING)
    assert not convolution_tpu.takes(x, kernel, 1, ((0, 1), (0, 1)))
    assert not convolution_tpu.takes(x, kernel[:2, :2], 1, PADDING)


@pytest.mark.parametrize("target", ["cpu", "gpu", "tpu"])
def test_the_convolution_of_a_doubled_map(target):
    half, kernel = normal((2, 5, 4, 6), (3, 3, 6, 7))
    x = upsample_nearest(jax.numpy.asarray(half), 10, 8)
    np.testing.assert_array_equal(x, half.repeat(2, 1).repeat(2, 2))
    got = convolution(x, jax.numpy.asarray(kernel), 1, PADDING, target, jax.numpy.asarray(half))
    assert error(got, by_definition(np.asarray(x), kernel)[0]) < 2e-6


def test_winograds_transform_is_left_to_the_shapes_and_dtypes_it_is_for():
    x, kernel = np.zeros((1, 32, 32, 256), np.float32), np.zeros((3, 3, 256, 256), np.float32)
    assert winograd_tile(x, kernel, PADDING) == 4
    assert not winograd_tile(x[:, 1:], kernel, PADDING)  # odd
    assert not winograd_tile(x[:, :4], kernel, PADDING)  # few tiles
    assert not winograd_tile(x[..., :64], kernel[:, :, :64], PADDING)  # few tiles for so few channels
    assert not winograd_tile(x[..., :4], kernel[:, :, :4], PADDING)
    assert not winograd_tile(x, kernel[:2, :2], PADDING)
    assert not winograd_tile(x, kernel, ((0, 1), (0, 1)))
    assert not winograd_tile(x.astype(np.float16), kernel, PADDING)
    assert not winograd_tile(np.zeros((1, 256, 256, 256), np.float32), kernel, PADDING)  # memory
