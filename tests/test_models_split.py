"""Layers whose weights lie in parts on the devices: what they exchange, and that nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.models.layers import Compute, Conv, Dense, GroupNorm
from sdjax.runtime.devices import BATCH, mesh_of, within
from sdjax.runtime.hlo import Text


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        compute = Compute()
        x = Conv(16, compute)(x)
        x = GroupNorm(4, 1e-5, compute)(x)
        return Dense(16, compute)(Conv(16, compute)(nn.silu(x)))


@pytest.fixture(scope="module")
def layers():
    """The gradients of a loss of some layers, by all weights, with their arguments on the host."""
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 16))
    params = Layers().init(jax.random.key(1), x)["params"]
    gradients = lambda params, x: jax.grad(lambda params: jnp.mean(Layers().apply({"params": params}, x) ** 2))(params)
    return gradients, params, x


def compiled_over(mesh, layers):
    gradients, params, x = layers
    split = lambda leaf: NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "fsdp"))
    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, split(leaf)), params)
    batch = jax.device_put(x, NamedSharding(mesh, P(BATCH)))

    def over_the_mesh(params, x):
        with within(mesh):
            return jax.lax.with_sharding_constraint(gradients(params, x), jax.tree.map(split, params))

    return jax.jit(over_the_mesh).lower(placed, batch).compile(), (placed, batch)


def test_weights_are_put_together_for_both_passes_and_activations_stay(layers):
    """Twice the kernels, in the forward and in the backward pass, but the first has no use for them in the second."""
    compiled, arguments = compiled_over(mesh_of(jax.devices()[:4], fsdp=4), layers)
    sent = Text(compiled.as_text()).between_devices()
    assert not sent.keys() - {"all-gather", "all-reduce", "reduce-scatter"}
    kernels = [leaf.nbytes for leaf in jax.tree.leaves(arguments[0]) if leaf.ndim > 1]
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0])) - sum(kernels)
    assert sum(kernels) <= sent["all-gather"] <= 2 * (sum(kernels) + small)


def test_the_gradients_are_those_of_one_device(layers):
    gradients, params, x = layers
    compiled, arguments = compiled_over(mesh_of(jax.devices()[:4], fsdp=4), layers)
    expected, found = jax.jit(gradients)(params, x), compiled(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)
