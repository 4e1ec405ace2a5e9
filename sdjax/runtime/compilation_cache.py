"""The persistent compilation cache that the commands turn on: a second start does not compile again.

A library call never turns it on by itself: where compiled programs are kept is the program's business, not ours.
"""

import os
import tempfile
import warnings
from pathlib import Path


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/sdjax/xla`, or `~/.cache/sdjax/xla`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "sdjax" / "xla"


def enable(folder: str | Path | None = None) -> None:
    """Keep compiled programs in `folder` (default: `default_folder()`), readable by this user alone.

    `JAX_COMPILATION_CACHE_DIR`, when set, wins; when set to nothing there is no cache. A folder that cannot be used, or
    that others can write, gives a warning and the program goes on without a cache: whoever can write that folder can
    run code in this process.
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
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
