"""XLA's options for the programs that take time on the CPU; other platforms keep their defaults."""

import functools
from typing import Any

import jax


@functools.cache
def compiler_options(platform: str, *, save_memory: bool = True) -> dict[str, Any]:
    """For `jax.jit(compiler_options=...)` of a program on "cpu", "gpu" or "tpu"; only the outermost may have them.

    XLA for the CPU had two ways to make loops of fused operations in JAX 0.7 to 0.10, and lost the older with 0.12.
    Where there are both, the older is taken: with it a U-Net's step needs 0.9 of the time, and compiling 0.3 to 0.7 GB
    less. save_memory: order the program for that instead of concurrency, which gains time only where all weights are
    trained: SD1.5 at 512 px then holds twice as much for a LoRA step, and 2.7 GB instead of 0.2 to draw, as the kernels
    of all convolutions are transformed at the start.
    """
    if platform != "cpu":
        return {}
    options = _known({"xla_cpu_use_fusion_emitters": False})
    if save_memory:
        options |= _known({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}) or _known(
            {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # as it was called before
        )
    return options


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options, or none if this XLA has no such option."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
