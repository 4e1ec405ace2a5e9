"""Stable Diffusion in JAX/Flax: drawing and fine-tuning on TPU, GPU and CPU."""

from typing import TYPE_CHECKING, Any

from sdjax.errors import ConfigError, DataError, SdjaxError, TrainingStopped

if TYPE_CHECKING:
    from sdjax.draw.pipeline import StableDiffusion, load
    from sdjax.draw.upscaling import upscale
    from sdjax.formats.png_parameters import save_png

__all__ = [
    "ConfigError",
    "DataError",
    "SdjaxError",
    "StableDiffusion",
    "TrainingStopped",
    "load",
    "save_png",
    "upscale",
]

# These are imported when they are first used, so `import sdjax` and the `--help` of a command do not wait for JAX.
_MODULE_OF = {
    "StableDiffusion": "sdjax.draw.pipeline",
    "load": "sdjax.draw.pipeline",
    "save_png": "sdjax.formats.png_parameters",
    "upscale": "sdjax.draw.upscaling",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdjax' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
