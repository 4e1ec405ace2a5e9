"""PyTorch's models as the oracle: random models of any config, saved by diffusers or transformers, read by sdjax.

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
from sdjax.runtime.compiler_options import compiler_options


def quick_jit(function, **options):
    """`jax.jit` for what runs once: without optimisation, and with the emitters that are then quicker to compile."""
    quick = {"xla_backend_optimization_level": 0} | compiler_options("cpu", large=True, save_memory=False)
    return jax.jit(function, compiler_options=quick, **options)


class Read(NamedTuple):
    """A Flax module with the parameters that PyTorch saved."""

    module: Any
    params: dict[str, Any]

    def __call__(self, *inputs, **options):
        """The output of the model."""

        def apply(params, *inputs):
            return self.module.apply({"params": params}, *inputs, **options)

        return quick_jit(apply)(self.params, *inputs)


def randomised(model, seed=0):
    """The PyTorch model with parameters that depend on the seed alone. PyTorch itself leaves norms at one."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (not name.endswith("bias")))
            else:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
    return model.eval().requires_grad_(False)


def read_model(folder: Path, *, dtype="float32", remat=None) -> Read:
    """The model in a folder of diffusers or transformers, read by sdjax."""
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("_class_name") or config["architectures"][0]
    family, module, config_type = {
        "UNet2DConditionModel": (unet, unet.UNet, unet.UNetConfig),
        "AutoencoderKL": (vae, vae.AutoencoderKL, vae.VAEConfig),
        "CLIPTextModel": (clip, clip.TextModel, clip.TextConfig),
        "CLIPTextModelWithProjection": (clip, clip.TextModel, clip.TextConfig),
    }[kind]
    config = config_type.from_dict(config)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= read_tensors(file).tensors
    params = load_params(tensors, family.abstract_params(config), dtype=dtype, what=kind)
    return Read(module(config, Compute(dtype=jnp.dtype(dtype), platform="cpu", remat=remat)), params)


def saved(model, folder: Path, **how) -> Read:
    """Saves the PyTorch model to a folder, and returns the model that sdjax reads from it."""
    model.save_pretrained(folder, max_shard_size="1GB")
    return read_model(folder, **how)


def channels_first(array):
    """The torch tensor [N, C, H, W] of an array [N, H, W, C]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def channels_last(tensor) -> np.ndarray:
    """The array [N, H, W, C] of a torch tensor [N, C, H, W]."""
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


def tensor(array):
    """The torch tensor of an array."""
    import torch

    return torch.from_numpy(np.array(array))


def error(ours, theirs) -> float:
    """The relative error |ours - theirs| / |theirs|, with Euclidean norms."""
    ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
