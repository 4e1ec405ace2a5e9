"""Turns running out of memory into an error that says what to do."""

import contextlib
from collections.abc import Iterator

from sdjax.errors import TrainingStopped


@contextlib.contextmanager
def advice(text: str) -> Iterator[None]:
    """Raises TrainingStopped with this advice if JAX or Python runs out of memory in the block."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingStopped(f"out of memory: {text}") from error
