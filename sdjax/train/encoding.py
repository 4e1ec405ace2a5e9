"""A stage's images and captions -> what its batches are gathered from, through the VAE and the text models."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt8

from sdjax.data import cache
from sdjax.data.dataset import Dataset, join
from sdjax.data.images import to_float
from sdjax.data.records import Record
from sdjax.models.vae import AutoencoderKL
from sdjax.pipeline import collections, encode_ids
from sdjax.train.made import Made, base_weights
from sdjax.train.stages import Run, StagePlan


def encode(run: Run, stage: StagePlan, earlier: Made) -> tuple[Dataset, Dataset | None]:
    """Latents and texts of the training and the held-out images, from the cache or computed (and cached) now.

    The models that make them are read only if needed, and freed before it returns.
    """
    model, data = stage.recipe.model, stage.data
    folder = data.cache or Path(run.config.output) / "cache"
    vae_weights = functools.cache(lambda: base_weights(model, "vae", earlier))
    shared = {
        "folder": folder,
        "model": f"{run.fingerprint} {earlier.digest('vae')} {run.config.dtype}",
        "resolution": data.resolution,
        "background": data.background,
        "on_bad_image": data.on_bad_image,
        # Like drawing, which decodes one picture at a time: large ones would fill the memory.
        "batch_size": 8 if data.resolution <= 128 else 1,
    }

    def encode_images(images: UInt8[np.ndarray, "B R R 3"]) -> Array:
        return _moments(model.vae, vae_weights(), to_float(images))

    def latents(kind: str, wanted: tuple[Record, ...], flip: bool) -> cache.Latents:
        with _bar(f"{stage.stage.name}: encoding {kind} images", len(wanted)) as bar:
            return cache.cache_latents(
                wanted, encode_images, flip=flip, progress=lambda done, _: bar.update(done - bar.n), **shared
            )

    training = latents("training", stage.records, data.flip)
    held_out = latents("held-out", stage.held_out, False) if stage.held_out else None
    captions = [record.caption for record in (*stage.records, *stage.held_out)]
    texts = _encode_texts(run, stage, captions, earlier, folder)
    return join(training, texts), None if held_out is None else join(held_out, texts)


def _encode_texts(run: Run, stage: StagePlan, captions: list[str], earlier: Made, folder: str | Path) -> cache.Texts:
    """Context (and SDXL's pooled vector) of each caption; only its token ids if the text models are trained."""
    model, recipe = stage.recipe.model, stage.recipe
    variables = functools.cache(
        lambda: {
            part: collections(base_weights(model, part, earlier), rows=earlier.rows.get(part))
            for part in model.text_models
        }
    )
    zeroed = model.is_sdxl and bool(model.folder.model_index.get("force_zeros_for_empty_prompt"))

    def encode(captions: list[str]) -> dict[str, Any]:
        arrays: dict[str, Any] = {"empty": np.array([not caption for caption in captions])} if zeroed else {}
        ids = model.tokenize(captions, chunks=stage.windows)
        if recipe.trains_text:
            return arrays | ids
        context, pooled = encode_ids(model.text_models, variables(), ids, recipe.hidden)
        return arrays | {"context": context} | ({"pooled": pooled} if model.is_sdxl else {})

    settings = {
        "ids": recipe.trains_text,
        "windows": stage.windows,
        "hidden": dataclasses.asdict(recipe.hidden),
        "dtype": run.config.dtype,
        "words": stage.words,
        "earlier": earlier.digest(*model.text_models),
    }
    return cache.cache_texts(captions, encode, folder=folder, model=run.fingerprint, settings=settings)


@functools.partial(jax.jit, static_argnums=0)
def _moments(module: AutoencoderKL, params: PyTree, images: Array) -> Array:
    return jnp.asarray(module.apply({"params": params}, images, method="encode"))


def _bar(title: str, total: int):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="image", leave=False, disable=None)
