"""What a compiled program needs and does, as its compiler says."""

import contextlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from sdjax.runtime import compilation_cache, hlo
from sdjax.runtime.chips import Chip, Target
from sdjax.runtime.devices import within

_WITHOUT_A_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
"""Options for a GPU that is only described: its compiler cannot try out which way to multiply is the fastest."""


class Figures(NamedTuple):
    """What one run of a program needs and does on each device."""

    memory: float
    """Most bytes in use at a time: arguments, results and temporaries."""
    flops: float
    moved: float | None
    """Bytes read from and written to the memory of the device. None for a GPU, whose compiler does not count them."""
    between: dict[str, int]
    """Kind of collective operation, such as "all-reduce" -> bytes of its results."""
    cycles: float | None
    """The compiler's estimate. None where it makes none."""
    kernels: int
    """Kernels that the estimate leaves out, such as those written in Pallas."""
    compile_seconds: float


class Program(NamedTuple):
    """A program that is compiled from shapes, to see what it needs."""

    name: str
    lower: Callable[[Callable[..., tuple]], Any]
    """`lower(place)` returns the lowered program, as `jax.jit(function).lower` does. `place(weights, *others)` returns
    the shapes of all arguments, placed on devices."""
    runs: int
    """How often it runs."""
    resident: PyTree = ()
    """Shapes on devices of what lies there beside the arguments of the program."""
    devices: int = 1


def on_mesh(mesh: Mesh, place: Callable[[PyTree], PyTree], program: Program) -> Program:
    """Returns a program that runs on a mesh. place: puts shapes of its weights there."""

    def lower(_: Any) -> Any:
        with within(mesh):
            return program.lower(lambda weights, *others: (place(weights), *others))

    return program._replace(lower=lower, devices=mesh.size)


class Planned(NamedTuple):
    """A program and what its compiler says of it."""

    program: Program
    figures: Figures | None
    """None if the compiler refused the program because of its memory."""
    memory: float
    """Bytes on one device while the program runs, with what lies there beside it."""


class OutOfMemory(Exception):
    """The compiler found that a program needs more memory than the device has. needed: in bytes."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"{needed / 1e9:.1f} GB")
        self.needed = needed


def on_device(tree: PyTree, device: Any) -> PyTree:
    """Returns the shapes of a tree of arrays or shapes, as shapes of arrays on the device."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def bytes_on_a_device(tree: PyTree) -> int:
    """Returns the bytes that a tree of placed shapes takes on one device."""

    def shape(leaf: Any) -> tuple[int, ...]:
        if leaf.sharding is None:
            return leaf.shape[1:]  # placed for pmap: the first axis is that of the devices
        return leaf.sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_for(target: Target, programs: Iterable[Program]) -> list[Planned]:
    """Compiles programs one after the other, and says on stderr which, and what each needs as soon as that is known."""
    planned, first = [], target.devices[0]
    cache = compilation_cache.disabled if target.described else contextlib.nullcontext
    for program in programs:
        print(f"compiling {program.name} ...", file=sys.stderr, flush=True)
        beside = bytes_on_a_device(program.resident)
        with cache(), jax.numpy_dtype_promotion("standard"):  # JAX's attention in half precision mixes number types
            start = time.perf_counter()
            lowered = program.lower(lambda *arguments: on_device(arguments, first))
            try:
                compiled = _compile(lowered, _WITHOUT_A_GPU if target.described and first.platform == "gpu" else None)
                figures = figures_of(compiled, lowered, time.perf_counter() - start)
                planned.append(Planned(program, figures, figures.memory + beside))
            except OutOfMemory as error:
                planned.append(Planned(program, None, error.needed + beside))
        print(_said(planned[-1]), file=sys.stderr, flush=True)
    return planned


def _said(planned: Planned) -> str:
    """What a program needs, in a line."""
    words = [f"{_short(planned.memory / 1e9)} GB"]
    if planned.figures is None:
        return f"  {words[0]}, more than the device has"
    if planned.figures.cycles is not None:
        words.append(f"{_short(planned.figures.cycles / 1e6)} million cycles beside {planned.figures.kernels} kernels")
    if planned.figures.moved is not None:
        words.append(f"{_short(planned.figures.moved / 1e9)} GB moved")
    return f"  {', '.join(words)}, compiled in {planned.figures.compile_seconds:.0f} s"


def fits(planned: Planned, target: Target) -> bool:
    """Whether the memory of a device is enough for a program."""
    return planned.figures is not None and planned.memory <= target.memory


def report(target: Target, planned: Sequence[Planned]) -> dict[str, Any]:
    """Returns the figures of programs as JSON. Bytes are in units of 10^9 or 10^6, and those of one device."""
    rows, seconds = [], 0.0
    for program, figures, memory in planned:
        row: dict[str, Any] = {"name": program.name, "devices": program.devices, "runs": program.runs}
        row |= {"memory_gb": _short(memory / 1e9), "available_gb": _short(target.memory / 1e9)}
        if figures is not None:
            least = seconds_at_least(figures, target.chip)
            row |= {
                "teraflop": _short(figures.flops / 1e12),
                "moved_gb": None if figures.moved is None else _short(figures.moved / 1e9),
                "between_devices_mb": _short(sum(figures.between.values()) / 1e6),
                "megacycles": None if figures.cycles is None else _short(figures.cycles / 1e6),
                "kernels_without_estimate": figures.kernels,
                "seconds_at_least": least,
                "compile_s": _short(figures.compile_seconds),
            }
            seconds += (least or 0) * program.runs
        rows.append(row)
    return {
        "device": target.name,
        "devices": len(target.devices),
        "fits": all(fits(each, target) for each in planned),
        "programs": rows,
        "hours_at_least": _short(seconds / 3600) if target.chip else None,
    }


def _short(value: float) -> float:
    """A number with four digits."""
    return float(f"{value:.4g}")


def seconds_at_least(figures: Figures, chip: Chip | None) -> float | None:
    """Returns the time that a run of a program cannot be faster than, or the compiler's estimate if that is longer."""
    if chip is None:
        return None
    estimate = figures.cycles / chip.clock if figures.cycles and chip.clock else 0.0
    return _short(max(figures.flops / chip.flops, (figures.moved or 0) / chip.bandwidth, estimate))


def _compile(lowered: Any, options: dict[str, Any] | None) -> Any:
    """Compiles a lowered program. Raises OutOfMemory where the compiler refuses it because of its memory."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"RESOURCE_EXHAUSTED.*?(?:\(|Used )([\d.]+)([KMG])", str(error), re.DOTALL)
        if needed is None:
            raise
        raise OutOfMemory(float(needed[1]) * 1024 ** (1 + "KMG".index(needed[2]))) from None


def figures_of(compiled: Any, lowered: Any, seconds: float) -> Figures:
    """Reads the figures of a compiled program. The compiler counts what a loop does once; here it counts each time.

    lowered: the same program before it was compiled. A GPU's compiler counts nothing, so operations are counted there.
    """
    memory, text = compiled.memory_analysis(), hlo.Text(compiled.as_text())
    cost = compiled.cost_analysis() or {}
    moved = cost.get("bytes accessed")
    flops = (lowered.cost_analysis() or {} if moved is None else cost).get("flops", 0.0)
    in_use = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Figures(
        memory=max(in_use - memory.alias_size_in_bytes, getattr(memory, "peak_memory_in_bytes", 0) or 0),
        flops=flops * text.products_repeated(),
        moved=None if moved is None else moved * text.results_repeated(),
        between=text.between_devices(),
        cycles=text.estimated_cycles(),
        kernels=text.kernels(),
        compile_seconds=seconds,
    )
