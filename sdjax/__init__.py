"""Stable Diffusion in JAX/Flax: drawing and fine-tuning on TPU, GPU and CPU."""

from sdjax.errors import ConfigError, DataError, SdjaxError, TrainingStopped
from sdjax.formats.png_parameters import save_png
from sdjax.pipeline import StableDiffusion, load

__all__ = ["ConfigError", "DataError", "SdjaxError", "StableDiffusion", "TrainingStopped", "load", "save_png"]
