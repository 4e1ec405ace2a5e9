"""Keeps freed memory in the process, for programs on the CPU. The commands turn this on; library calls never do.

XLA's CPU backend allocates the temporary memory of a program at each call. glibc returns blocks of that size to the
system when they are freed. Without this module every training step causes a page fault for each 4 KiB of them.
"""

import ctypes
import sys

# Options of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_ROOM = 512 << 20


def keep() -> None:
    """Makes glibc keep freed memory if JAX computes on the CPU.

    Must be called before anything asks JAX for its devices.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another libc
        return
    # One arena for all threads, set before JAX starts threads: a thread keeps the arena that it begins with.
    mallopt(_ARENA_MAX, 1)
    import jax

    # With asynchronous dispatch XLA begins a program while the memory of the last one is still allocated, so that the
    # process needs it twice.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu":
        mallopt(_TRIM_THRESHOLD, -1)  # never return the end of the heap
        mallopt(_MMAP_MAX, 0)  # no blocks outside the heap: glibc returns them when they are freed
        # Grow the heap in large steps. Small blocks may occupy the place of freed temporary memory, which then needs
        # room elsewhere.
        mallopt(_TOP_PAD, _ROOM)
