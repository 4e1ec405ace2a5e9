"""The persistent compilation cache of JAX, with which a second start does not compile again.

The commands turn the cache on. Library calls never do: the program that uses the library decides where it keeps
compiled programs.
"""

import contextlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def default_folder() -> Path:
    """The folder `$XDG_CACHE_HOME/sdjax/xla`, or `~/.cache/sdjax/xla`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "sdjax" / "xla"


def enable(folder: str | Path | None = None) -> None:
    """Keeps compiled programs in a folder, by default `default_folder()`, that only this user can read.

    The environment variable `JAX_COMPILATION_CACHE_DIR` takes precedence; if it is empty there is no cache. A folder
    that cannot be used, or that other users can write to, gives a warning, and the program continues without a cache.
    The reason is that whoever can write to the folder can run code in this process.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        chosen = os.environ["JAX_COMPILATION_CACHE_DIR"]
        if not chosen:
            jax.config.update("jax_compilation_cache_dir", None)
        return
    path = None
    try:
        path = Path(folder) if folder is not None else default_folder()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid"):
            status = path.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                raise PermissionError("other users can write there")
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        warnings.warn(f"no compilation cache in {path}: {error}; every start compiles again", stacklevel=2)
        return
    _repair(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _repair(folder: Path) -> None:
    """Removes the entries of a program when JAX warns that it cannot read one, so that it is written anew.

    JAX compiles the program again, but never replaces an entry, such as one that a killed process has cut off.
    """
    show = warnings.showwarning

    def shown(message: Any, *rest: Any, **options: Any) -> None:
        show(message, *rest, **options)
        if found := re.search(r"reading persistent compilation cache entry for '([\w<>.-]+)'", str(message)):
            for path in folder.glob(f"{found[1]}-*"):
                path.unlink(missing_ok=True)

    warnings.showwarning = shown


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Compiles without the cache: a program for a device that is only described can be kept there, but not read."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    enabled = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  # JAX makes it while it is imported
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX reads the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()
