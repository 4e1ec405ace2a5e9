"""Loads models: the embedded model, diffusers folders, single files, and models of the hub."""

import dataclasses
import os
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax.numpy as jnp

from sdjax import diffusion
from sdjax.errors import ConfigError
from sdjax.formats.diffusers_folder import ModelFolder, read_folder
from sdjax.formats.parameter_names import load_params
from sdjax.formats.single_file import read_single_file
from sdjax.formats.weights_file import SUFFIXES
from sdjax.model import Model, Outline
from sdjax.models import clip, unet, vae
from sdjax.models.layers import Compute
from sdjax.settings import Dtype, read_value
from sdjax.text.encoding import TEXT_ENCODERS
from sdjax.text.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """Options of how a model is found and computed.

    variant: the variant of the weight files, such as "fp16".
    platform: "cpu", "gpu" or "tpu", to trace for another platform than JAX's default.
    tokenizer: the folder of a tokenizer, or of a model that has one, for a model in a single file, which holds none.
    By default the tokenizer of Stable Diffusion, from the hub or its cache.
    prediction_type: "epsilon" or "v_prediction", if the model's setting is wrong. A single file of Stable Diffusion 2
    does not say which of them it is.
    """

    variant: str | None
    platform: str | None
    tokenizer: str | os.PathLike | None
    prediction_type: str


def load(source: str | os.PathLike, dtype: str = "float32", **how: Unpack[Options]) -> Model:
    """Loads a model with its weights; see `outline`."""
    return with_weights(outline(source, dtype, **how))


def outline(
    source: str | os.PathLike,
    dtype: str = "float32",
    *,
    variant: str | None = None,
    platform: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    prediction_type: str = "",
) -> Outline:
    """Loads a model without its weights, none of which is read.

    source: "tiny" (embedded), a diffusers folder, a .safetensors or .ckpt file of a whole model, or a hub id.
    dtype: the number type of the weights and the computation: float32, bfloat16 or float16. With float16 the VAE stays
    in float32, whose range it needs. The other arguments are described in `Options`.
    Raises ConfigError for a wrong argument, DataError for files that are missing, damaged or of another kind.
    """
    read_value(Dtype, str(dtype), "dtype")
    folder = _find(source, variant, tokenizer, prediction_type)
    schedule = diffusion.altered(diffusion.NoiseSchedule.from_config(folder.scheduler), prediction_type=prediction_type)
    if prediction_type:
        folder = dataclasses.replace(folder, scheduler=dict(schedule.config))
    computed_in = lambda part: jnp.dtype("float32" if part == "vae" and dtype == "float16" else dtype)
    compute = {part: Compute(dtype=computed_in(part), platform=platform) for part in folder.configs}
    unet_config = unet.UNetConfig.from_dict(folder.configs["unet"])
    vae_config = vae.VAEConfig.from_dict(folder.configs["vae"])
    texts = {name: clip.TextConfig.from_dict(folder.configs[name]) for name in TEXT_ENCODERS if name in folder.configs}
    return Outline(
        unet=unet.UNet(unet_config, compute["unet"]),
        vae=vae.AutoencoderKL(vae_config, compute["vae"]),
        text_models={name: clip.TextModel(config, compute[name]) for name, config in texts.items()},
        shapes={
            "unet": unet.abstract_params(unet_config),
            "vae": vae.abstract_params(vae_config),
            **{name: clip.abstract_params(config) for name, config in texts.items()},
        },
        tokenizers={
            place: Tokenizer.from_folder(folder.tokenizers[place], window=texts[name].max_position_embeddings)
            for name, place in TEXT_ENCODERS.items()
            if name in texts
        },
        schedule=schedule,
        folder=folder,
        name=str(source),
    )


def with_weights(outline: Outline, *, dtype: Any = None) -> Model:
    """Loads all weights of a model. dtype: see `load_weights`."""
    return Model(outline, {part: load_weights(outline, part, dtype=dtype) for part in outline.shapes})


def load_weights(outline: Outline, part: str, *, dtype: Any = None) -> dict[str, Any]:
    """Loads the parameters of one part, such as `unet`. dtype: by default the number type of the computation."""
    return load_params(
        outline.folder.tensors(part),
        outline.shapes[part],
        dtype=dtype or outline.module(part).compute.dtype,
        what=f"{outline.name}: {part}",
    )


def _find(
    source: str | os.PathLike, variant: str | None, tokenizer: str | os.PathLike | None, prediction_type: str
) -> ModelFolder:
    path = Path(__file__).parent / "tiny" if source == "tiny" else Path(source)
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return read_single_file(path, tokenizer=tokenizer, prediction_type=prediction_type)
    if tokenizer is not None:
        raise ConfigError(f"tokenizer = {str(tokenizer)!r} is for models of a single file; {source} has its own")
    return read_folder(path if source == "tiny" else source, variant=variant)
