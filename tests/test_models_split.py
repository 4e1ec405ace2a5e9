"""Layers whose weights lie in parts on the devices: what they exchange, and that the result is the same."""

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
        x = Conv(64, compute)(x)
        x = GroupNorm(4, 1e-5, compute)(x)
        return Dense(64, compute)(Conv(64, compute)(nn.silu(x)))


@pytest.fixture(scope="module")
def layers():
    """The gradients of a loss of some layers, by all weights, with their arguments on the host."""
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 64))
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
    """The activations are few here, so left alone the compiler would send them."""
    compiled, (params, _) = compiled_over(mesh_of(jax.devices()[:4], fsdp=4), layers)
    sent = Text(compiled.as_text()).between_devices()
    assert sent.keys() == {"all-gather", "all-reduce"}
    size = lambda leaves: sum(leaf.nbytes for leaf in leaves)
    leaves = jax.tree.leaves(params)
    first = params["Conv_0"]["kernel"].nbytes  # which nothing behind it needs
    assert size(leaf for leaf in leaves if leaf.ndim > 1) * 2 - first <= sent["all-gather"] <= 2 * size(leaves) - first
    assert sent["all-reduce"] == size(leaves)


def test_the_gradients_are_those_of_one_device(layers):
    gradients, params, x = layers
    compiled, arguments = compiled_over(mesh_of(jax.devices()[:4], fsdp=4), layers)
    expected, found = jax.jit(gradients)(params, x), compiled(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), expected, found)
