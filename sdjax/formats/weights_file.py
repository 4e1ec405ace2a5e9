"""One file of tensors, whatever its kind."""

import os
from pathlib import Path

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import SafetensorsFile, read_safetensors
from sdjax.formats.torch_pickle import read_state_dict

_SAFETENSORS = (".safetensors", ".sft")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_tensors(path: str | os.PathLike) -> SafetensorsFile:
    """Tensors and metadata (none in a pickle) of a .safetensors file or a PyTorch pickle; views, read when touched."""
    suffix = Path(path).suffix.lower()
    if suffix in _SAFETENSORS:
        return read_safetensors(path)
    if suffix in _PICKLES:
        return SafetensorsFile(read_state_dict(path), {})
    raise DataError(f"{path}: not a kind of weight file; known: {', '.join((*_SAFETENSORS, *_PICKLES))}")
