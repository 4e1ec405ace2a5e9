"""Running out of memory, turned into an error that says what to do about it."""

import contextlib
from collections.abc import Iterator

from sdjax.errors import TrainingStopped


@contextlib.contextmanager
def advice(text: str) -> Iterator[None]:
    """Raises `TrainingStopped("out of memory: ...")` in place of the error that JAX or Python raises for it."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingStopped(f"out of memory: {text}") from error
