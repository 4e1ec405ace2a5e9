"""Group and layer normalisation and their gradients against their definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models.kernels.norms import group_norm, layer_norm

GROUPS, EPSILON = 4, 1e-5
TOLERANCES = {"float32": 3e-6, "bfloat16": 4e-3, "float16": 5e-4}


def definition(x, scale, bias, gradient, norm):
    """Returns the result in float64, and the gradients by x, scale and bias."""
    x, scale, bias, gradient = (np.asarray(a, np.float64) for a in (x, scale, bias, gradient))
    grouped = (*x.shape[:-1], GROUPS, -1) if norm == "group" else x.shape
    axes = (1, 2, 4) if norm == "group" else (3,)
    mean = lambda a: np.broadcast_to(a.reshape(grouped).mean(axes, keepdims=True), a.reshape(grouped).shape).reshape(
        a.shape
    )
    rstd = 1 / np.sqrt(mean(np.square(x - mean(x))) + EPSILON)
    normed = (x - mean(x)) * rstd
    y = normed * scale + bias
    if norm == "group":
        gate = 1 / (1 + np.exp(-y))
        y, gradient = y * gate, gradient * gate * (1 + y * (1 - gate))
    by_normed = gradient * scale
    by_x = rstd * (by_normed - mean(by_normed) - normed * mean(by_normed * normed))
    return y, by_x, (gradient * normed).sum((0, 1, 2)), gradient.sum((0, 1, 2))


@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("target", ["cpu", "tpu"])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_norms_and_their_gradients(norm, target, dtype, mean):
    """mean: of x, in standard deviations."""
    random = np.random.default_rng(0)
    shape = (2, 12, 24, 32)
    x, scale, bias = (jnp.asarray(random.normal(size=size), dtype) for size in (shape, shape[-1:], shape[-1:]))
    x = x + jnp.asarray(mean, dtype)
    gradient = jnp.asarray(random.normal(size=shape), jnp.float32)
    if norm == "group":
        ours = lambda *arrays: group_norm(*arrays, GROUPS, EPSILON, True, target)
    else:
        ours = lambda *arrays: layer_norm(*arrays, EPSILON, target)
    got, pull = jax.vjp(ours, x, scale, bias)
    assert got.dtype == jnp.float32
    for result, exact in zip((got, *pull(gradient)), definition(x, scale, bias, gradient, norm), strict=True):
        tolerance = TOLERANCES["float32"] * (1 + mean**2 / 3) + TOLERANCES[str(result.dtype)]
        assert np.linalg.norm(np.asarray(result, np.float64) - exact) / np.linalg.norm(exact) < tolerance
