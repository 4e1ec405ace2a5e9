"""Compares the memory that `sdjax plan` names for training steps with what a process takes while it does them.

    python tests/benchmarks/plan_memory.py configs/lora_style.toml [--resolution 256 --batch 1 ...]

The step is compiled from shapes. Then its arguments are made (filled with 0.01, since pages of zeros take no
memory) and three steps are done. What is measured is the growth of the process's memory from before the arguments are
made to its peak, on Linux. A recipe for a published model is done at its shapes, without its weights.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from recipe_cost import KINDS, TINY, skeleton

from sdjax.runtime import chips, compiled
from sdjax.train import config_file, programs, stages


def resident(key: str) -> float:
    """Returns a line of /proc/self/status in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * float(line.split()[1])


def filled(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return np.full(leaf.shape, 0.01 if jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) else 1, leaf.dtype)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("recipe")
parser.add_argument("--resolution", type=int)
parser.add_argument("--batch", type=int)
parser.add_argument("--dtype", default="float32")
args = parser.parse_args()

with tempfile.TemporaryDirectory() as temporary:
    config = config_file.load(args.recipe)
    model = str(skeleton(KINDS[config.model], Path(temporary) / "model")) if config.model in KINDS else config.model
    data = dataclasses.replace(
        config.data,
        path=str(TINY / "samples"),
        buckets=False,
        resolution=args.resolution or config.data.resolution,
        batch_size=args.batch or config.data.batch_size,
    )
    config = dataclasses.replace(config, model=model, data=data, dtype=args.dtype, stages=config.stages[:1])
    devices = jax.devices()[:1]
    (plan,) = stages.plan_runs(config, devices)[0].stages
    program = programs.step(config, [plan], devices)
    (planned,) = compiled.compile_for(chips.present(), [program])
    step = program.lower(lambda tree: tree).compile()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    batch = programs.batch_shapes(plan, programs.largest(plan))
    state = plan.parallel.place_state(jax.tree.map(filled, plan.state))
    frozen = plan.parallel.place_frozen(jax.tree.map(filled, plan.frozen))
    placed = plan.parallel.place_batch({name: np.asarray(filled(leaf)) for name, leaf in batch.items()})
    jax.block_until_ready((state, frozen, placed))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    arguments = resident("VmRSS") - before
    for _ in range(3):
        state, metrics = step(state, frozen, placed, jax.random.key(0))
        float(metrics["loss"])
    peak = resident("VmHWM") - before
    print(
        json.dumps(
            {
                "recipe": args.recipe,
                "arguments_gb": arguments / 1e9,
                "planned_gb": planned.memory / 1e9,
                "peak_gb": peak / 1e9,
                "planned / peak": round(planned.memory / peak, 3),
            }
        )
    )
