"""XLA's options for the programs that take time on the CPU; other platforms keep their defaults."""

import functools
from typing import Any

import jax
from jaxtyping import PyTree


@functools.cache
def compiler_options(platform: str, *, large: bool, save_memory: bool = True) -> dict[str, Any]:
    """For `jax.jit(compiler_options=...)` of a program on "cpu", "gpu" or "tpu"; only the outermost may have them.

    XLA for the CPU had two ways to make loops of fused operations in JAX 0.7 to 0.10, and lost the older with 0.12.
    large: take the older where there are both; a step of SD1.5's U-Net then needs down to 0.9 of the time, and its
    compilation 0.3 to 0.7 GB less. The newer compiles loops that are alike once, in 0.7 of the time, which counts more
    for a small model.
    save_memory: order the program for that instead of concurrency, which gains time only where all weights are trained:
    SD1.5 at 512 px then holds twice as much for a LoRA step, and 2.7 GB instead of 0.2 to draw, as the kernels of all
    convolutions are transformed at the start.
    """
    if platform != "cpu":
        return {}
    options = _known({"xla_cpu_use_fusion_emitters": False}) if large else {}
    if save_memory:
        options |= _known({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}) or _known(
            {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # as it was called before
        )
    return options


def is_large(params: PyTree) -> bool:
    """Whether a step of a model with these weights takes seconds on a CPU."""
    return sum(leaf.size for leaf in jax.tree.leaves(params)) >= 100_000_000


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options, or none if this XLA has no such option."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
