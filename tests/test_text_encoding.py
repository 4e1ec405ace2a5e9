"""Weights of tokens and empty prompts: what they do to contexts, compared with the same sums in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.text.encoding import emphasised, zeroed


@pytest.fixture
def context():
    return np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 7), jnp.float32)) + np.float32(0.3)


@pytest.mark.parametrize("restore_mean", [True, False])
def test_each_tokens_context_is_multiplied_by_its_weight(context, restore_mean):
    weights = np.array([[1, 1.5, 1, -0.5, 0], [2, 2, 2, 2, 2]], np.float32)
    expected = context * weights[..., None]
    if restore_mean:
        expected *= context.mean((1, 2), keepdims=True) / expected.mean((1, 2), keepdims=True)
        np.testing.assert_allclose(expected[1], context[1], rtol=1e-6)  # equal weights change nothing then
    weighted = emphasised(jnp.asarray(context), jnp.asarray(weights), np.array(restore_mean))
    np.testing.assert_allclose(weighted, expected, rtol=1e-5, atol=1e-6)


def test_chunks_are_weighted_one_by_one(context):
    weights = np.array([[1, 1.5, 1, 1, 1], [1, 1, 1, 3, 1]], np.float32)
    together = emphasised(jnp.asarray(context), jnp.asarray(weights), np.array(True))
    for n in range(2):
        alone = emphasised(jnp.asarray(context[n : n + 1]), jnp.asarray(weights[n : n + 1]), np.array(True))
        np.testing.assert_allclose(together[n : n + 1], alone, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 5)], ids=["context", "pooled"])
def test_empty_prompts_become_zeros(shape, dtype):
    values = jax.random.normal(jax.random.key(1), shape, jnp.float32).astype(dtype)
    result = zeroed(values, np.array([False, True, False]))
    assert result.dtype == values.dtype and result.shape == shape
    np.testing.assert_array_equal(result[::2], values[::2])
    assert (result[1] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_one_change_nothing(dtype):
    context = jax.random.normal(jax.random.key(0), (3, 5, 7), jnp.float32).astype(dtype)
    weights = jnp.ones((3, 5), jnp.float32).at[1, 2].set(1.5)
    weighted = jax.jit(emphasised)(context, weights, np.bool_(True))
    assert weighted.dtype == context.dtype
    np.testing.assert_array_equal(weighted[::2], context[::2])
    mean = lambda values: np.asarray(values, np.float32).mean()
    assert mean(weighted[1]) == pytest.approx(mean(context[1]), rel=1e-2)
    assert np.abs(np.asarray(weighted[1] - context[1], np.float32)).max() > 0.1
