"""Several adapters: sums, stacks, and the parts that train; dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adapters import BATCH, SD1, apply, inputs_of, random_adapter

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.models import unet
from sdjax.trees import leaves


def test_adding_equals_the_sum_of_merges(base_unet):
    config, params = base_unet
    one = random_adapter(params, 1, alpha=1.0)
    two = random_adapter(params, 2, rank=3, which="all")
    both = lora.add([(one, 0.7), (two, -0.4)])
    expected = lora.merge(lora.merge(params, one, 0.7), two, -0.4)
    merged = dict(leaves(lora.merge(params, both)))
    for path, leaf in leaves(expected):
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-5, atol=1e-6)
    assert oracle.error(apply(config, params, both), apply(config, expected)) < 1e-5


def test_dora_layers_add_only_to_trees_without_these_layers(base_unet):
    _, params = base_unet
    dora = random_adapter(params, which=["attn1/to_q$"], dora=True)
    other = random_adapter(params, which=["attn2/to_q$"])
    both = lora.merge(params, lora.add([(dora, 1.0), (other, 0.5)]))
    expected = dict(leaves(lora.merge(lora.merge(params, dora), other, 0.5)))
    for path, leaf in leaves(both):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be added to another adapter"):
        lora.add([(dora, 1.0), (random_adapter(params), 1.0)])
    with pytest.raises(ConfigError, match="cannot be weighted"):
        lora.add([(dora, 0.5)])


def test_a_stack_equals_its_adapters_one_by_one(base_unet):
    """The adapters differ in ranks, targets and scales."""
    config, params = base_unet
    adapters = [
        random_adapter(params, 1, rank=3, alpha=1.0),
        random_adapter(params, 2, which="all"),
        random_adapter(params, 3, rank=1, which=["attn2"]),
    ]
    together = apply(config, params, lora.stack(adapters))
    for i, adapter in enumerate(adapters):
        assert oracle.error(together[i], apply(config, params, adapter)[i]) < 1e-5
    with pytest.raises(ConfigError, match="DoRA layers cannot be stacked"):
        lora.stack([random_adapter(params, dora=True), adapters[0]])


def test_many_adapters_by_vmap(base_unet):
    """One input with a batch of adapter trees, by `jax.vmap`."""
    config, params = base_unet
    adapters = [random_adapter(params, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    inputs = inputs_of(SD1)
    model = unet.UNet(config)
    out = oracle.quick_jit(jax.vmap(lambda adapter: model.apply({"params": params, "lora": adapter}, *inputs)))(stacked)
    for i, adapter in enumerate(adapters):
        assert oracle.error(out[i], apply(config, params, adapter)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", {"down", "up", "magnitude"}),
        ("loha", {"down", "up", "down_2", "up_2", "magnitude"}),
        ("lokr", {"w1", "w2", "w2_down", "w2_up", "magnitude"}),
    ],
)
def test_split_and_join_are_inverse(kind, names):
    params = {"mid": {"to_q": {"kernel": jnp.zeros((4, 4))}, "conv": {"kernel": jnp.zeros((3, 3, 32, 32))}}}
    adapter = random_adapter(params, which="all", dora=True, kind=kind, rank=1)
    trained, scales = lora.split(adapter)
    assert {path[-1] for path, _ in leaves(trained)} == names
    assert {path[-1] for path, _ in leaves(scales)} == {"scale"}
    joined = dict(leaves(lora.join(trained, scales)))
    assert joined.keys() == dict(leaves(adapter)).keys()
    for path, leaf in leaves(adapter):
        np.testing.assert_array_equal(joined[path], leaf)


# Dropout.


def test_dropout_drops_its_rate_and_keeps_the_mean():
    """The adapter of one linear layer passes its input through, so that the output shows what is dropped."""
    width, rate = 64, 0.3
    adapter = {"down": jnp.eye(width), "up": jnp.eye(width), "scale": jnp.float32(1.0)}
    x = jnp.ones((4, 100, width), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    def output(x, keys):
        dropped = lora.with_dropout({"layer": adapter}, rate, keys)["layer"]
        return np.asarray(lora.adapted(dropped, x, jnp.zeros_like(x), jnp.zeros((width, width))))

    y = output(x, keys)
    assert set(np.unique(y.round(5))) == {0.0, np.float32(1 / 0.7).round(5)}
    assert abs((y == 0).mean() - rate) < 0.01
    assert abs(y.mean() - 1) < 0.02
    # What is dropped from an example depends on its key only, not on the rest of the batch.
    assert not np.array_equal(y[0], y[1])
    np.testing.assert_array_equal(output(x[2:3], keys[2:3])[0], y[2])


def test_dropout_drops_from_the_adapters_only(base_unet):
    config, params = base_unet
    keys = jax.random.split(jax.random.key(0), BATCH)
    adapter = random_adapter(params)
    whole, none = apply(config, params, adapter), apply(config, params, lora.with_dropout(adapter, 0.0, keys))
    assert oracle.error(none, whole) < 1e-6
    some = apply(config, params, lora.with_dropout(adapter, 0.5, keys))
    assert oracle.error(some, whole) > 0.01
    # With a new adapter, which changes nothing, the output is that of the base model.
    fresh = lora.with_dropout(lora.init(jax.random.key(0), params, rank=2), 0.5, keys)
    np.testing.assert_array_equal(apply(config, params, fresh), apply(config, params))
