"""Several processes that train together, each with devices of its own. One process alone is the usual case.

All of them run the same program: they take the same decisions in the same order, and their devices form one mesh. Only
the first process writes files that are not shared out, draws and reports.
"""

import functools
import os
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sdjax.errors import ConfigError

HEARTBEAT = 30
"""Seconds after which the others notice that a process is gone, if no broken connection tells them at once."""

_STARTED_BY = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run, before anything asks JAX for its devices.

    coordinator: "HOST:PORT" of the first process, with the number of processes and the index of this one; or "auto",
    where JAX finds all three itself, as on a TPU pod. None: auto under Slurm and Open MPI, else a process alone.
    Raises ConfigError for a wrong argument, or if the processes do not find each other.
    """
    if coordinator is None and (count is not None or index is not None):
        raise ConfigError("--processes and --process need --coordinator HOST:PORT")
    if coordinator is None and not _are_several():
        return
    if coordinator in (None, "auto"):
        arguments: dict[str, Any] = {}
    elif count is None or index is None or not 0 <= index < count:
        raise ConfigError(f"--coordinator {coordinator} needs --processes N and --process I, from 0 to N - 1")
    else:
        arguments = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as e:
        first = next(iter(str(e).splitlines()), "")[:200]
        raise ConfigError(f"the processes did not find each other at {coordinator or 'auto'}: {first}") from e
    for number, handler in handlers.items():  # JAX has put its own in their place, and Python does not know
        if handler is not None:
            signal.signal(number, handler)


def _are_several() -> bool:
    started = max(int(os.environ.get(name) or 1) for name in _STARTED_BY)
    return started > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def are_joined() -> bool:
    """Whether `join` joined several processes. This does not make JAX look for its devices."""
    return jax.distributed.is_initialized()


def are_several() -> bool:
    """Whether this process trains together with others."""
    return jax.process_count() > 1


def index() -> int:
    """The index of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes, draws and reports."""
    return jax.process_index() == 0


def share(count: int) -> range:
    """The numbers of the pieces of work, of `count`, that this process does: neighbours, which read the same files."""
    index, processes = jax.process_index(), jax.process_count()
    return range(count * index // processes, count * (index + 1) // processes)


def wait(event: str) -> None:
    """Waits until every process is here. event: a name, to notice processes that wait for different things."""
    if are_several():
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(event)


def largest(number: int) -> Any:
    """Returns the largest of the numbers that the processes give, as an array that is perhaps still to be computed."""
    if not are_several():
        return number
    parts, largest_of = _over_all_devices()
    given = jax.make_array_from_callback((jax.device_count(),), parts, lambda _: np.array([number], np.int32))
    return largest_of(given)


@functools.cache
def _over_all_devices() -> tuple[NamedSharding, Any]:
    """The sharding of an array with one number a device, and the program that finds the largest."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    return NamedSharding(mesh, P("devices")), jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))


class Agreed:
    """The largest of the numbers that the processes give at the same call. With several, one call late.

    So no process waits for the others, which are busy with the step between the calls.
    """

    def __init__(self) -> None:
        self._waiting: Any = 0

    def __call__(self, number: int) -> int:
        """Gives a number, and returns the largest one."""
        if not are_several():
            return number
        before, self._waiting = self._waiting, largest(number)
        return int(before)
