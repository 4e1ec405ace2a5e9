"""Several devices: how the CPU is divided into them, and how arrays are placed on a mesh of them."""

import contextlib
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from sdjax.errors import ConfigError


def divide_cpu(devices: int) -> None:
    """Makes JAX see the CPU as this many devices, unless XLA_FLAGS sets their number.

    XLA computes most operations of a small model in one thread, so parts of a batch on several devices use the cores
    better than the whole batch on one. Each device holds a copy of what is not split. Call this before anything asks
    JAX for its devices.
    """
    if devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def check_count(count: int) -> None:
    """Raises ConfigError if JAX has fewer devices."""
    if not 1 <= count <= jax.device_count():
        raise ConfigError(f"{count} devices: JAX has {jax.device_count()}")


def in_host_memory() -> AbstractContextManager:
    """Returns a context within which new arrays lie in the memory of the host, if JAX has the CPU among its devices."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


BATCH = ("data", "fsdp")
"""The axes of a mesh that a batch is split over."""


def mesh_of(devices: Sequence[Any], *, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh of devices. The axes fsdp and tensor have these sizes, the axis data has the rest."""
    axes = (*BATCH, "tensor")
    return Mesh(np.array(devices).reshape(-1, fsdp, tensor), axes, axis_types=(AxisType.Auto,) * 3)


def parts(mesh: Mesh) -> int:
    """Returns the number of parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def within(mesh: Mesh | None) -> AbstractContextManager:
    """Returns a context. Programs that are compiled in it divide by hand over the mesh what the compiler cannot divide.

    Such are the kernels written in Pallas, see `models.kernels.attention.by_example`. None: one device.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def is_shape(leaf: Any) -> bool:
    """Whether a leaf of a tree is only the shape of an array."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """Returns an array placed on a mesh, or its shape placed there."""
    if is_shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)  # several processes: each places what its devices hold
    return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])


def held(leaf: Any, mesh: Mesh) -> Any:
    """Returns an array placed over several processes as this one holds it, on the mesh of its own devices.

    These devices must hold all of it. In a process alone this changes nothing.
    """
    if is_shape(leaf) or leaf.is_fully_addressable:
        return leaf
    parts = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, NamedSharding(mesh, leaf.sharding.spec), parts)


def copies(mesh: Mesh, tree: PyTree) -> PyTree:
    """Returns arrays, or their shapes, placed whole on every device of the mesh."""
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, P())), tree)


def at_once(mesh: Mesh | None, count: int) -> int:
    """Returns how many of `count` examples are computed at once if each part of a batch is one example."""
    return parts(mesh) if mesh is not None and count % parts(mesh) == 0 else 1


def split_examples(mesh: Mesh | None, tree: PyTree, axis: int = 0) -> PyTree:
    """Returns arrays of one example each row, or their shapes, placed on the mesh. axis: that of the rows.

    The rows are split if their number is a multiple of `parts`, else every device gets all. None: as they are.
    """
    if mesh is None:
        return tree

    def split(leaf: Any) -> Any:
        spec = P(*(None,) * axis, BATCH) if leaf.shape[axis] % parts(mesh) == 0 else P()
        return put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(split, tree)
