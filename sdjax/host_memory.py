"""Memory that a CPU program frees stays with the process: the commands turn this on, the library leaves it alone.

XLA's CPU backend allocates a program's temporary memory anew at each call. glibc returns blocks of that size to the
system as they are freed, so that every training step begins with a page fault for each 4 KiB of it, all over again.
"""

import ctypes
import sys

# From glibc's malloc.h. One arena: freed memory of one thread serves the next.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep() -> None:
    """Tell glibc to keep what is freed, if JAX computes on the CPU; elsewhere nothing is changed."""
    import jax

    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another libc
        for option, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, 2**30), (_ARENA_MAX, 1)):
            mallopt(ctypes.c_int(option), ctypes.c_int(value))
