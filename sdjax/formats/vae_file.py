"""Reads an autoencoder that takes the place of a model's: a folder in diffusers' layout, a single file, or a hub id."""

import dataclasses
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.diffusers_folder import ModelFolder, read_vae_folder
from sdjax.formats.ldm_config import vae_config
from sdjax.formats.ldm_names import ldm_vae_name, vae_name
from sdjax.formats.parameter_names import listing
from sdjax.formats.single_file import renamed, vae_tensors
from sdjax.formats.weights_file import SUFFIXES, read_tensors


def with_vae(
    model: ModelFolder, source: str | os.PathLike, *, variant: str | None = None, weights: bool = True
) -> ModelFolder:
    """Returns the model with another autoencoder.

    source: an autoencoder, or a model that has one: a folder, a hub id, or a .safetensors or .ckpt file with LDM's or
    diffusers' names. A file holds no config, so scaling_factor and force_upcast stay those of the model.
    variant, weights: see `read_folder`.
    Raises DataError for a source of something else, and for latents of another shape than the model's.
    """
    path, old = Path(source), model.configs["vae"]
    state = {part: tensors for part, tensors in model.state.items() if part != "vae"}
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        config, state["vae"] = _read_file(path, old)
        files = (path,)
    else:
        config, files = read_vae_folder(source, variant=variant, weights=weights)
    for name, of in (("latent channels", _channels), ("pixels a latent", _factor)):
        if of(config) != of(old):
            raise DataError(f"{source}: an autoencoder of {of(config)} {name}; the model needs {of(old)}")
    return dataclasses.replace(
        model, configs={**model.configs, "vae": config}, weights={**model.weights, "vae": files}, state=state
    )


def _channels(config: Mapping[str, Any]) -> int:
    return config.get("latent_channels", 4)


def _factor(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config.get("block_out_channels", [0] * 4)) - 1)


def _read_file(path: Path, old: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and the tensors, by diffusers' names, of the autoencoder in a file. old: the config it replaces."""
    tensors = read_tensors(path).tensors
    tensors = vae_tensors(tensors) or tensors
    by_ldm = not any(key.startswith("encoder.down_blocks.") for key in tensors)
    stem = "encoder.down.{}." if by_ldm else "encoder.down_blocks.{}."
    levels = next(i for i in itertools.count() if not any(key.startswith(stem.format(i)) for key in tensors))
    if not levels:
        raise DataError(f"{path}: no autoencoder: it holds {listing(sorted(tensors)) or 'nothing'}")
    ldm = tensors if by_ldm else renamed(tensors, lambda module: ldm_vae_name(module, levels))
    try:
        config = dict(old) | vae_config(ldm)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return config, renamed(ldm, lambda module: vae_name(module, levels)) if by_ldm else dict(tensors)
