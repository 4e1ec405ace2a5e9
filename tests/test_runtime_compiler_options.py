"""XLA's options: the installed JAX accepts them, and platforms other than the CPU get none."""

import jax
import jax.numpy as jnp
import pytest

from sdjax.runtime.compiler_options import compiler_options, is_large


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("save_memory", [False, True])
def test_a_program_compiles_with_the_options(large, save_memory):
    options = compiler_options("cpu", large=large, save_memory=save_memory)
    assert bool(options) >= save_memory
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2


def test_other_platforms_keep_their_defaults():
    assert compiler_options("gpu", large=True) == compiler_options("tpu", large=True) == {}


def test_a_model_of_a_hundred_million_weights_is_large():
    shape = jax.ShapeDtypeStruct((10_000, 10_000), jnp.float32)
    assert is_large({"a": {"kernel": shape}})
    assert not is_large({"a": {"kernel": jax.ShapeDtypeStruct((9_999, 10_000), jnp.float32)}})
