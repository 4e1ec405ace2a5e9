"""Random small configurations, the same in every run, and random arrays."""

import numpy as np
from hypothesis import HealthCheck, Phase, settings

# Largest allowed |ours - theirs| / |theirs| of an output.
FLOAT32 = 1e-4
HALF = {"bfloat16": 3e-2, "float16": 5e-3}


def examples(count):
    """Returns the settings of hypothesis for this number of examples.

    Hypothesis does not simplify an example that fails, because that would take hours of compilation.
    """
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def normal(seed, *shape):
    """Returns normal numbers, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
