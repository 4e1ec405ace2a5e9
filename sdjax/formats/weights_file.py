"""Reads one file of tensors of any kind."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import SafetensorsFile, is_floating, read_safetensors
from sdjax.formats.torch_file import read_state_dict

_SAFETENSORS = (".safetensors", ".sft")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (*_SAFETENSORS, *_PICKLES)


def is_safetensors(path: str | os.PathLike) -> bool:
    """Whether the name of the file is that of a safetensors file."""
    return Path(path).suffix.lower() in _SAFETENSORS


def read_tensors(path: str | os.PathLike, entries: Sequence[str] = ("state_dict",)) -> SafetensorsFile:
    """The tensors of a safetensors file or a PyTorch pickle, with the metadata of a safetensors file.

    The tensors are views into the mapped file, read from the disk when they are used. entries: see `read_state_dict`.
    """
    if is_safetensors(path):
        return read_safetensors(path)
    if Path(path).suffix.lower() in _PICKLES:
        return SafetensorsFile(read_state_dict(path, entries), {})
    raise DataError(f"{path}: not a kind of weight file; known: {', '.join(SUFFIXES)}")


def to_float32(tensor: np.ndarray, name: str) -> np.ndarray:
    """The tensor in float32. Raises DataError naming `name` for integers, NaN and Inf."""
    if not is_floating(tensor.dtype):
        raise DataError(f"{name}: {tensor.dtype} where floating-point numbers are expected")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise DataError(f"{name}: holds NaN or Inf")
    return tensor
