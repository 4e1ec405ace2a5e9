"""Memory that a CPU program frees stays with the process: the commands turn this on, the library leaves it alone.

XLA's CPU backend allocates a program's temporary memory anew at each call. glibc returns blocks of that size to the
system as they are freed, so that every training step begins with a page fault for each 4 KiB of it, all over again.
"""

import ctypes
import sys

# Options of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_ROOM = 512 << 20


def keep() -> None:
    """Tell glibc to keep what is freed, if JAX computes on the CPU; elsewhere nothing is kept.

    To be called before anything asks JAX for its devices.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # another libc
        return
    mallopt(_ARENA_MAX, 1)  # a thread that begins with an arena of its own stays with it
    import jax

    # In threads of its own XLA begins a program while the last one's memory is still there, which then takes it twice.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu":
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_MMAP_MAX, 0)  # no block outside the heap, as those are returned when they are freed
        # Small blocks that settle where the temporary memory was must leave it a place to come back to.
        mallopt(_TOP_PAD, _ROOM)
