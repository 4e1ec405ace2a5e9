"""PyTorch's models as the oracle: random ones of any config, saved by diffusers or transformers and read back by us.

Imports torch inside its functions, so that tests without the `parity` mark run without it.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.formats.parameter_names import load_params
from sdjax.formats.weights_file import read_tensors
from sdjax.models import clip, unet, vae
from sdjax.models.layers import Compute


class Read(NamedTuple):
    """One of our models, read from a folder PyTorch saved."""

    module: Any
    params: dict[str, Any]

    def __call__(self, *inputs, **options):
        """The model's output. Compiled without optimisation: here every model runs once and compiling is the cost."""

        def apply(params, *inputs):
            return self.module.apply({"params": params}, *inputs, **options)

        return jax.jit(apply, compiler_options={"xla_backend_optimization_level": 0})(self.params, *inputs)


def randomised(model, seed=0):
    """The PyTorch model with every parameter drawn anew: its own start leaves norms at one and biases at zero."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False)


def read_model(folder: Path, *, dtype="float32", remat=False) -> Read:
    """The model in one diffusers or transformers folder, through our own reader."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name") or config["architectures"][0]
    room, module, config_type = {
        "UNet2DConditionModel": (unet, unet.UNet, unet.UNetConfig),
        "AutoencoderKL": (vae, vae.AutoencoderKL, vae.VAEConfig),
        "CLIPTextModel": (clip, clip.TextModel, clip.TextConfig),
        "CLIPTextModelWithProjection": (clip, clip.TextModel, clip.TextConfig),
    }[kind]
    config = config_type.from_dict(config)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file).tensors
    params = load_params(tensors, room.abstract_params(config), dtype=dtype, what=kind)
    return Read(module(config, Compute(dtype=jnp.dtype(dtype), platform="cpu", remat=remat)), params)


def saved(model, folder: Path, **how) -> Read:
    """The PyTorch model saved to a folder and read back by us."""
    model.save_pretrained(folder, max_shard_size="1GB")
    return read_model(folder, **how)


def channels_first(array):
    """NHWC -> a torch tensor, NCHW."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def channels_last(tensor) -> np.ndarray:
    """A torch tensor, NCHW -> NHWC."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def tensor(array):
    """An array -> a torch tensor."""
    import torch

    return torch.from_numpy(np.array(array))


def error(ours, theirs) -> float:
    """|ours - theirs| / |theirs|."""
    ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
