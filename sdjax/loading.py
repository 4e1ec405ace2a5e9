"""Models from what they are kept in: the embedded one, diffusers' folders, single files, the hub."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sdjax import diffusion
from sdjax.errors import ConfigError
from sdjax.formats.diffusers_folder import read_folder
from sdjax.formats.parameter_names import load_params
from sdjax.formats.single_file import SUFFIXES, read_single_file
from sdjax.models import clip, unet, vae
from sdjax.models.layers import Compute
from sdjax.pipeline import StableDiffusion
from sdjax.prompt import Tokenizer
from sdjax.text_encoding import TEXT_ENCODERS

DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | os.PathLike,
    dtype: str = "float32",
    *,
    variant: str | None = None,
    platform: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: str = "",
    weights: bool = True,
) -> StableDiffusion:
    """Loads a model: "tiny" (embedded), a diffusers folder, a .safetensors or .ckpt file of a whole model, or a hub id.

    dtype: float32, bfloat16 or float16, of weights and computation (in float16 the VAE stays float32, which it needs).
    variant: of the weight files, such as "fp16". platform: "cpu", "gpu" or "tpu" to trace for another platform than
    JAX's default. tokenizer: for a file, which holds none: the folder of a tokenizer, or of a model that has one;
    default Stable Diffusion's own, from the hub or its cache. prediction_type: "epsilon" or "v_prediction" where the
    model's own setting is wrong; a file of Stable Diffusion 2 does not tell. weights: see `outline`.
    Raises DataError for files that are missing, damaged or of another kind; nothing is half loaded.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: choices are {', '.join(DTYPES)}")
    path = Path(__file__).parent / "tiny" if source == "tiny" else Path(source)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        folder = read_single_file(path, tokenizer=tokenizer, prediction_type=prediction_type)
    elif tokenizer is not None:
        raise ConfigError(f"tokenizer = {str(tokenizer)!r} is for models of a single file; {source} has its own")
    else:
        folder = read_folder(path if source == "tiny" else source, variant=variant)
    schedule = diffusion.altered(diffusion.NoiseSchedule.from_config(folder.scheduler), prediction_type=prediction_type)
    if prediction_type:
        folder = dataclasses.replace(folder, scheduler=dict(schedule.config))
    configs: dict[str, Any] = {
        "unet": unet.UNetConfig.from_dict(folder.configs["unet"]),
        "vae": vae.VAEConfig.from_dict(folder.configs["vae"]),
    }
    for name in TEXT_ENCODERS:
        if name in folder.configs:
            configs[name] = clip.TextConfig.from_dict(folder.configs[name])
    tokenizers = {
        TEXT_ENCODERS[name]: Tokenizer.from_folder(
            folder.tokenizers[TEXT_ENCODERS[name]], window=config.max_position_embeddings
        )
        for name, config in configs.items()
        if name in TEXT_ENCODERS
    }
    own = {name: jnp.dtype(dtype) for name in configs}
    if dtype == "float16":
        own["vae"] = jnp.dtype("float32")
    abstract = {"unet": unet.abstract_params, "vae": vae.abstract_params}
    compute = {name: Compute(dtype=own[name], platform=platform) for name in configs}
    sd = StableDiffusion(
        unet=unet.UNet(configs["unet"], compute["unet"]),
        vae=vae.AutoencoderKL(configs["vae"], compute["vae"]),
        text_models={name: clip.TextModel(configs[name], compute[name]) for name in TEXT_ENCODERS if name in configs},
        params={name: abstract.get(name, clip.abstract_params)(config) for name, config in configs.items()},
        tokenizers=tokenizers,
        schedule=schedule,
        folder=folder,
        name=str(source),
    )
    return with_weights(sd) if weights else sd


outline = functools.partial(load, weights=False)
"""The model as `load` gives it, but with the shapes of its parameters in place of its weights: no weight is read.

Its configs and tokenizers are complete, so that settings can be checked against it before anything slow begins.
"""


def with_weights(sd: StableDiffusion, *, dtype: Any = None) -> StableDiffusion:
    """The model of an outline with all its weights."""
    return dataclasses.replace(sd, params={part: load_weights(sd, part, dtype=dtype) for part in sd.params})


def load_weights(sd: StableDiffusion, part: str, *, dtype: Any = None) -> dict[str, Any]:
    """Reads the parameters of one part (`unet`, `vae`, ...) of a model, by default in the dtype it computes in."""
    module = {"unet": sd.unet, "vae": sd.vae, **sd.text_models}[part]
    tensors = sd.folder.tensors(part)
    return load_params(tensors, sd.params[part], dtype=dtype or module.compute.dtype, what=f"{sd.name}: {part}")
