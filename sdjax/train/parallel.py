"""Runs a pure training step on several devices, under `jit` over a mesh or under `pmap`, behind one interface.

The step is `train_step(state, frozen, batch, key, *, reduce) -> (state, metrics)`. It averages over the examples it
gets, and passes the loss and the gradients through `reduce`. Under `jit` it gets the whole batch, and `reduce` changes
nothing. Under `pmap` it gets the examples of its device, and `reduce` is the mean over the devices. Its random numbers
must depend on `batch["index"]`, the place of an example in the whole batch, so that the partition changes none of them.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from sdjax.errors import ConfigError
from sdjax.runtime.compiler_options import compiler_options
from sdjax.runtime.devices import BATCH, held, in_host_memory, is_shape, mesh_of, put, within
from sdjax.train.partition import mesh_sizes, spec, written


class TrainStep(Protocol):
    """A pure training step. See the start of this module."""

    def __call__(
        self, state: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array, *, reduce: Callable[[PyTree], PyTree]
    ) -> tuple[PyTree, PyTree]: ...


class Parallel(NamedTuple):
    """A training step on several devices.

    The functions that place also take shapes (`jax.ShapeDtypeStruct`), for a step that is only compiled.
    """

    devices: int
    """The number of devices."""
    step: Any
    """`step(state, frozen, batch, key) -> (state, metrics)`, compiled by `jit` or `pmap`, so it has `lower`. It takes
    placed arguments and any key. The state is donated."""
    place_state: Callable[[PyTree], PyTree]
    """Copies a state to the devices, split as `train.partition` says. The argument stays valid."""
    place_frozen: Callable[[PyTree], PyTree]
    """Places frozen weights as `place_state` does, but does not copy an array that is in place already."""
    place_batch: Callable[[Mapping[str, np.ndarray]], PyTree]
    """Splits a batch over the axes data and fsdp. Every process passes the whole batch."""
    held: Callable[[PyTree], PyTree]
    """Returns placed weights as this process holds them, whole, on its own devices."""
    fetch: Callable[[PyTree], PyTree]
    """Returns a placed state as a tree of NumPy arrays and typed PRNG keys."""
    loading: Callable[[], AbstractContextManager]
    """Within it new arrays lie where `place_state` and `place_frozen` take them from: with several devices under `jit`
    in the memory of the host, because one device may be too small for all of them."""
    place_model: Callable[[PyTree], PyTree]
    """Places the weights of a model for other programs than the step, such as drawing: with several devices under `jit`
    as `place_frozen` does, but on those of this process, else on one device."""
    mesh: Mesh | None
    """The mesh that `place_model` places on. None: one device."""


def parallelize(
    train_step: TrainStep,
    *,
    batch_size: int,
    mode: Literal["jit", "pmap"] = "jit",
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
    large: bool = False,
    save_memory: bool = True,
) -> Parallel:
    """Returns a pure step on the first `data * fsdp * tensor` devices of `devices` (by default all of JAX).

    batch_size: examples in the whole batch. data, fsdp, tensor: sizes of the axes; -1 takes the devices that the others
    leave. large, save_memory: see `compiler_options`; only for jit.
    Raises ConfigError as `mesh_sizes` does, and if `data * fsdp` does not divide `batch_size`.
    """
    devices = list(jax.devices() if devices is None else devices)
    data, fsdp, tensor = mesh_sizes(len(devices), data, fsdp, tensor)
    parts = data * fsdp
    if batch_size % parts:
        fitting = [n for n in range(1, data) if batch_size % (n * fsdp) == 0]
        raise ConfigError(
            f"a batch of {batch_size} images cannot be split over {parts} {'groups of ' * (tensor > 1)}devices; "
            f"make it a multiple of {parts}" + (f", or parallel.mesh.data one of {fitting}" if fitting else "")
        )
    devices = devices[: parts * tensor]
    if mode == "jit":
        options = compiler_options(devices[0].platform, large=large, save_memory=save_memory)
        return _under_jit(train_step, devices, fsdp, tensor, options)
    if fsdp != 1 or tensor != 1 or jax.process_count() > 1:
        raise ConfigError("parallel.mode = 'pmap' splits the batch only, within one process; use 'jit'")
    return _under_pmap(train_step, devices)


def _under_jit(step_of: TrainStep, devices: list[Any], fsdp: int, tensor: int, options: dict[str, Any]) -> Parallel:
    mesh = mesh_of(devices, fsdp=fsdp, tensor=tensor)
    own_mesh = mesh_of(_own(devices, fsdp * tensor), fsdp=fsdp, tensor=tensor)
    everywhere = NamedSharding(mesh, P())
    parts = NamedSharding(mesh, P(BATCH))

    def shardings(tree: PyTree, mesh: Mesh = mesh) -> PyTree:
        return jax.tree.map_with_path(
            lambda path, leaf: NamedSharding(mesh, spec(written(path), leaf.shape, mesh)), tree
        )

    def place_state(tree: PyTree) -> PyTree:
        # The step overwrites its state, and device_put may share memory with the argument, even with may_alias=False.
        return jax.tree.map(lambda leaf, to: put(leaf if is_shape(leaf) else leaf.copy(), to), tree, shardings(tree))

    def place_frozen(tree: PyTree, mesh: Mesh = mesh) -> PyTree:
        return jax.tree.map(put, tree, shardings(tree, mesh))

    def train_step(state: PyTree, frozen: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, PyTree]:
        with within(mesh):
            state, metrics = step_of(state, frozen, batch, key, reduce=lambda tree: tree)
        return jax.lax.with_sharding_constraint((state, metrics), (shardings(state), everywhere))

    def held_here(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: held(leaf, own_mesh), tree)

    def fetch(state: PyTree) -> PyTree:
        return _fetch(held_here(state))

    def place_batch(batch: Mapping[str, np.ndarray]) -> PyTree:
        return {name: put(array, parts) for name, array in batch.items()}

    step = jax.jit(train_step, donate_argnums=0, compiler_options=options)
    several = in_host_memory, functools.partial(place_frozen, mesh=own_mesh), own_mesh
    one = contextlib.nullcontext, jax.device_put, None
    placed = place_state, place_frozen, place_batch, held_here, fetch
    return Parallel(len(devices), step, *placed, *(several if len(devices) > 1 else one))


def _own(devices: Sequence[Any], parts: int) -> list[Any]:
    """Returns the devices of this process, or all of them if they are only described.

    Raises ConfigError unless every process has as many, and holds all `parts` of what is split over fsdp and tensor.
    """
    if jax.process_count() == 1:
        return list(devices)
    by_process: dict[int, list[Any]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    counts = set(map(len, by_process.values()))
    if len(by_process) < jax.process_count() or len(counts) > 1:
        raise ConfigError(f"parallel.mesh takes {len(devices)} devices; every process must have as many of them")
    if (most := counts.pop()) % parts:
        raise ConfigError(f"parallel.mesh: fsdp x tensor = {parts} must divide the {most} devices of a process")
    return by_process[jax.process_index()]


def together(train_step: TrainStep) -> TrainStep:
    """Returns one step that does the steps of several trainings, which have the same shapes and share frozen weights.

    Its arguments are stacked: the states and keys along axis 0; the batches along axis 1, because axis 0 is split over
    the devices; the frozen trees by `stack_frozen`.
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
    """Returns trees of the same shapes as one tree, stacked along a new axis."""
    return jax.tree.map(lambda *leaves: _stack(leaves, axis), *trees)


def stack_frozen(trees: Sequence[Mapping[str, PyTree]]) -> dict[str, PyTree]:
    """Returns the frozen trees of several trainings as one. `params` is the same in all of them and is not stacked."""
    stacked = stack([{name: tree for name, tree in each.items() if name != "params"} for each in trees])
    return stacked | {"params": trees[0]["params"]}


def unstack(tree: PyTree, count: int) -> list[PyTree]:
    """Returns the `count` trees of a tree stacked along axis 0."""
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
        # A program is the only way to replicate for pmap that every version of JAX has. It needs a mapped argument. Its
        # axis must have the name of the step's axis, or the step is compiled again for the state that it returns.
        place = jax.eval_shape if any(map(is_shape, jax.tree.leaves(tree))) else lambda copy, *trees: copy(*trees)
        return place(copy, np.arange(count, dtype=np.int32), tree)

    def place_batch(batch: Mapping[str, np.ndarray]) -> PyTree:
        split = lambda array: array.reshape(count, -1, *array.shape[1:])
        return {name: jax.eval_shape(split, x) if is_shape(x) else split(x) for name, x in batch.items()}

    def fetch(state: PyTree) -> PyTree:
        return _fetch(jax.tree.map(lambda leaf: leaf[0], state))

    placed = replicate, replicate, place_batch, lambda tree: tree, fetch
    return Parallel(count, step, *placed, contextlib.nullcontext, jax.device_put, None)


def _fetch(state: PyTree) -> PyTree:
    def fetch(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            words = np.asarray(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(jnp.asarray(words), impl=jax.random.key_impl(leaf))
        return np.asarray(leaf)

    return jax.tree.map(fetch, state)
