"""One pure training step under `jit` over a mesh or under `pmap`, with the same calls around it.

The step is `train_step(state, frozen, batch, key, *, reduce) -> (state, metrics)`. It averages over the batch it sees
and passes gradients and metrics through `reduce`: under `jit` it sees the whole batch and `reduce` changes nothing,
under `pmap` it sees its device's part and `reduce` is the mean over devices. Randomness must come from
`batch["index"]`, the place of an example in the whole batch, so that it does not depend on the partition.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from sdjax.errors import ConfigError
from sdjax.runtime.compiler_options import compiler_options


class TrainStep(Protocol):
    def __call__(
        self, state: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array, *, reduce: Callable[[PyTree], PyTree]
    ) -> tuple[PyTree, PyTree]: ...


class Parallel(NamedTuple):
    """A training step over several devices. `key` is passed to `step` as it is."""

    devices: int
    """Parts the batch is split into."""
    step: Any
    """`step(state, frozen, batch, key) -> (state, metrics)` of placed arguments, the state donated; has `.lower`."""
    place_state: Callable[[PyTree], PyTree]
    """Tree -> on each device, split over the fsdp axis if there is one; the tree given stays valid."""
    place_frozen: Callable[[PyTree], PyTree]
    """The same, but not copied where it already lies there."""
    place_batch: Callable[[Mapping[str, np.ndarray]], PyTree]
    """The whole batch (each process passes all of it) -> its parts on the devices."""
    fetch: Callable[[PyTree], PyTree]
    """Placed state -> host tree of NumPy arrays and typed PRNG keys."""


def divide_cpu(devices: int) -> None:
    """Have JAX see the CPU as so many devices, unless XLA_FLAGS tells it how many.

    XLA computes most operations of a small model in one thread, so that parts of a batch, each on a device of its own,
    use the cores better than the batch as a whole. Each device holds a copy of what is not split. To be called before
    anything asks JAX for its devices.
    """
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def parallelize(
    train_step: TrainStep,
    *,
    batch_size: int,
    mode: Literal["jit", "pmap"] = "jit",
    data: int = -1,
    fsdp: int = 1,
    devices: Sequence[Any] | None = None,
    large: bool = False,
    save_memory: bool = True,
) -> Parallel:
    """Wrap a pure step for the devices (default: all). large and save_memory: as of `compiler_options`, under jit.

    `data * fsdp` devices take part, -1 standing for what is left. Raises ConfigError if there are not that many, or if
    they do not divide `batch_size`, the number of examples in the whole batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    data, fsdp = _mesh_sizes(data, fsdp, len(devices))
    count = data * fsdp
    if batch_size % count:
        fitting = [n for n in range(1, data) if batch_size % (n * fsdp) == 0]
        raise ConfigError(
            f"a batch of {batch_size} images cannot be split over {count} devices; make it a multiple of {count}"
            + (f", or parallel.mesh.data one of {fitting}" if fitting else "")
        )
    if mode == "jit":
        options = compiler_options(devices[0].platform, large=large, save_memory=save_memory)
        return _under_jit(train_step, data, fsdp, devices[:count], options)
    if fsdp != 1 or jax.process_count() > 1:
        raise ConfigError("parallel.mode = 'pmap' splits the batch only, within one process; use 'jit'")
    return _under_pmap(train_step, devices[:count])


def _mesh_sizes(data: int, fsdp: int, devices: int) -> tuple[int, int]:
    if data == -1:
        data = max(1, devices // fsdp)
    elif fsdp == -1:
        fsdp = max(1, devices // data)
    if data * fsdp > devices:
        raise ConfigError(f"parallel.mesh wants {data} x {fsdp} devices, but there are {devices}")
    return data, fsdp


def _under_jit(step_of: TrainStep, data: int, fsdp: int, devices: list[Any], options: dict[str, Any]) -> Parallel:
    mesh = jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    everywhere = NamedSharding(mesh, P())
    parts = NamedSharding(mesh, P(("data", "fsdp")))

    def split(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _split_largest(leaf.shape, fsdp))

    def place_state(tree: PyTree) -> PyTree:
        # A copy, since the step overwrites it and device_put (even with may_alias=False) may share the first device's.
        return jax.tree.map(lambda leaf: _put(leaf.copy(), split(leaf)), tree)

    def place_frozen(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _put(leaf, split(leaf)), tree)

    def train_step(state: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        state, metrics = step_of(state, frozen, batch, key, reduce=lambda tree: tree)
        return jax.lax.with_sharding_constraint((state, metrics), (jax.tree.map(split, state), everywhere))

    def fetch(state: PyTree) -> PyTree:
        gather = jax.jit(lambda leaf: leaf, out_shardings=everywhere)  # a process reads what lies on its own devices
        return jax.tree.map(lambda leaf: _fetch(leaf if leaf.is_fully_replicated else gather(leaf)), state)

    def place_batch(batch: Mapping[str, np.ndarray]) -> PyTree:
        # By callback, since a process can place only what lies on its own devices.
        return {
            name: jax.make_array_from_callback(array.shape, parts, lambda part, array=array: array[part])
            for name, array in batch.items()
        }

    step = jax.jit(train_step, donate_argnums=0, compiler_options=options)
    return Parallel(data * fsdp, step, place_state, place_frozen, place_batch, fetch)


def together(train_step: TrainStep) -> TrainStep:
    """The steps of several trainings, alike in all shapes, as one step over one set of frozen weights.

    Every argument is stacked: state and key in front, the frozen tree as `stack_frozen` does, the batch behind its
    first axis, which is the one that is split over devices.
    """

    def step(
        state: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array, *, reduce: Callable[[PyTree], PyTree]
    ) -> tuple[PyTree, PyTree]:
        shared = {name: None if name == "params" else 0 for name in frozen}
        return jax.vmap(functools.partial(train_step, reduce=reduce), in_axes=(0, shared, 1, 0))(
            state, frozen, batch, key
        )

    return step


def stack(trees: Sequence[PyTree], axis: int = 0) -> PyTree:
    """Trees alike in shape -> one tree with an axis more."""
    return jax.tree.map(lambda *leaves: _stack(leaves, axis), *trees)


def stack_frozen(trees: Sequence[Mapping[str, PyTree]]) -> dict[str, PyTree]:
    """What several trainings leave as it is; `params` are the same in all and not stacked."""
    own = stack([{name: tree for name, tree in each.items() if name != "params"} for each in trees])
    return own | {"params": trees[0]["params"]}


def unstack(tree: PyTree, count: int) -> list[PyTree]:
    """The inverse of `stack` along the first axis."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(count)]


def _stack(leaves: Sequence[Any], axis: int) -> Any:
    on_host = all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves)
    return np.stack(leaves, axis) if on_host else jnp.stack(leaves, axis)


def _under_pmap(train_step: TrainStep, devices: list[Any]) -> Parallel:
    count = len(devices)
    step = jax.pmap(
        functools.partial(train_step, reduce=lambda tree: jax.lax.pmean(tree, "data")),
        axis_name="data",
        in_axes=(0, 0, 0, None),
        out_axes=(0, None),
        donate_argnums=0,
        devices=devices,
    )
    copy = jax.pmap(lambda _, tree: tree, axis_name="data", in_axes=(0, None), out_axes=0, devices=devices)

    def replicate(tree: PyTree) -> PyTree:
        # By a program, which is the one way that every version of jax has for pmap; it wants one mapped argument, and
        # the same axis name as the step, or else the step compiles a second time for the state it returns.
        return copy(np.arange(count, dtype=np.int32), tree)

    def place_batch(batch: Mapping[str, np.ndarray]) -> PyTree:
        return {name: array.reshape(count, -1, *array.shape[1:]) for name, array in batch.items()}

    def fetch(state: PyTree) -> PyTree:
        return _fetch(jax.tree.map(lambda leaf: leaf[0], state))

    return Parallel(count, step, replicate, replicate, place_batch, fetch)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.jit(lambda: leaf, out_shardings=sharding)()  # device_put refuses keys across processes
    return jax.device_put(leaf, sharding)


def _split_largest(shape: tuple[int, ...], parts: int) -> P:
    """Split the longest axis that `parts` divides; a leaf with none is copied."""
    fitting = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if parts == 1 or not fitting:
        return P()
    axis = max(fitting, key=lambda a: shape[a])
    return P(*(None,) * axis, "fsdp")


def _fetch(state: PyTree) -> PyTree:
    def fetch(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(leaf))
        return np.asarray(leaf)

    return jax.tree.map(fetch, state)


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


def reduced_bytes(program: str) -> int:
    """Bytes summed across devices in one run of a compiled program, from its text (`compiled.as_text()`)."""
    total = 0
    for line in program.splitlines():
        result = re.search(r"= (.*?) (all-reduce|all-reduce-start|reduce-scatter)\(", line)
        if result:
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", result[1]):
                total += _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
    return total
