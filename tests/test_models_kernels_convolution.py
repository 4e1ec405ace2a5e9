"""Every way of convolving on the CPU against the definition, summed tap by tap in float64; gradients too."""

import jax
import numpy as np
import pytest

from sdjax.models.kernels import convolution_cpu as convolution

PADDING = ((1, 1), (1, 1))
WAYS = {
    "winograd of 2": ((2, 24, 26, 256), 288),
    "winograd of 4": ((4, 32, 36, 256), 288),
    "winograd of few pixels": ((1, 16, 16, 256), 288),
    "winograd of few channels": ((8, 16, 16, 64), 96),
    "product": ((1, 8, 8, 512), 512),
    "plain": ((2, 7, 6, 5), 4),
}


def by_definition(x, kernel):
    """(result, gradient by x, gradient by the kernel) as functions of the result's gradient, in float64."""
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


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_the_convolution(way):
    shape, features = WAYS[way]
    random = np.random.default_rng(0)
    x, kernel, gradient = (
        random.normal(size=size).astype(np.float32)
        for size in (shape, (3, 3, shape[3], features), (*shape[:3], features))
    )
    assert convolution._winograd_pays(x, kernel, PADDING) == way.startswith("winograd")
    larger = way in ("winograd of 4", "winograd of few channels")
    assert convolution._tile(x) == (4 if larger else 2)
    assert convolution._weights_dominate(x, kernel) == (way == "product")
    got, pull = jax.vjp(lambda x, k: convolution.convolution(x, k, 1, PADDING, "cpu"), x, kernel)
    want, pull_exactly = by_definition(x.astype(np.float64), kernel.astype(np.float64))
    for ours, exact in zip((got, *pull(gradient)), (want, *pull_exactly(gradient.astype(np.float64))), strict=True):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - exact) / np.linalg.norm(exact) < (5e-6 if larger else 2e-6)


def test_the_transform_is_left_to_the_shapes_and_types_it_is_for():
    x, kernel = np.zeros((1, 32, 32, 256), np.float32), np.zeros((3, 3, 256, 256), np.float32)
    assert convolution._winograd_pays(x, kernel, PADDING)
    assert not convolution._winograd_pays(x[:, 1:], kernel, PADDING)  # odd
    assert not convolution._winograd_pays(x[:, :4], kernel, PADDING)  # few tiles
    assert not convolution._winograd_pays(x[..., :64], kernel[:, :, :64], PADDING)  # few tiles for its channels
    assert not convolution._winograd_pays(x[..., :4], kernel[:, :, :4], PADDING)
    assert not convolution._winograd_pays(x, kernel[:2, :2], PADDING)
    assert not convolution._winograd_pays(x, kernel, ((0, 1), (0, 1)))
    assert not convolution._winograd_pays(x.astype(np.float16), kernel, PADDING)
    assert not convolution._winograd_pays(np.zeros((1, 256, 256, 256), np.float32), kernel, PADDING)  # memory
