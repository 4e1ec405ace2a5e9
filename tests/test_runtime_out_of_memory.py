"""Real shortages of memory, in a process with a limit, give one error with the advice."""

import subprocess
import sys

import pytest

ALLOCATIONS = {
    "Python": "bytearray(2**40)",
    "NumPy": "np.ones(2**37)",
    "JAX": "jnp.ones(2**37).block_until_ready()",
    "a compiled program": "float(jax.jit(lambda x: jnp.sort(jnp.sin(x * jax.lax.iota(x.dtype, 2**36)))[0])(1.0))",
}


def run(code):
    code = f"""
import resource
import jax, jax.numpy as jnp, numpy as np
from sdjax.runtime.out_of_memory import advice
jax.devices()
resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
{code}
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("kind", ALLOCATIONS)
def test_advice_is_given(kind):
    result = run(f"with advice('draw less'):\n    {ALLOCATIONS[kind]}")
    assert result.stderr.splitlines()[-1] == "sdjax.errors.TrainingStopped: out of memory: draw less"


def test_other_errors_stay_as_they_are():
    result = run("with advice('draw less'):\n    jax.jit(lambda x: jax.pure_callback(lambda x: 1 / 0, x, x))(1.0)")
    assert result.returncode == 1 and "division by zero" in result.stderr and "draw less" not in result.stderr
