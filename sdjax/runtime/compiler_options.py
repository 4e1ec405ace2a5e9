"""XLA's options for large programs on the CPU. Other platforms keep XLA's defaults."""

import functools
from typing import Any

import jax
from jaxtyping import PyTree


@functools.cache
def compiler_options(platform: str, *, large: bool, save_memory: bool = True) -> dict[str, Any]:
    """The value for `jax.jit(compiler_options=...)`, which only an outermost `jit` accepts.

    platform: "cpu", "gpu" or "tpu".
    large: use the older of the two emitters that turn fused operations into loops on the CPU. JAX 0.7 to 0.10 have
    both, JAX 0.12 has only the newer. With the older a step of SD1.5's U-Net takes as little as 0.9 of the time, and
    its compilation 0.3 to 0.7 GB less. The newer compiles equal loops only once, in 0.7 of the time, which matters more
    for a small model.
    save_memory: order the operations to save memory. Otherwise they are ordered for concurrency, which is faster only
    if all weights are trained. SD1.5 at 512 px then needs twice the memory for a LoRA step, and 2.7 GB instead of 0.2
    to draw, because the kernels of all convolutions are transformed at the start.
    """
    if platform != "cpu":
        return {}
    options = _known({"xla_cpu_use_fusion_emitters": False}) if large else {}
    if save_memory:
        options |= _known({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}) or _known(
            {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # its name in older versions of XLA
        )
    return options


def is_large(params: PyTree) -> bool:
    """Whether a model is so large that one step takes seconds on a CPU."""
    return sum(leaf.size for leaf in jax.tree.leaves(params)) >= 100_000_000


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options, or none if this XLA has no such option."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options
