"""A quick look at latents: their colours by a linear map, which is fitted to the decoder of the model."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax.draw import grids
from sdjax.model import Model

_CELLS = 8  # side of the latents that the map is fitted to


class Preview:
    """Makes pictures of latents without the decoder, which is slow."""

    def __init__(self, model: Model) -> None:
        channels, factor = model.outline.vae.config.latent_channels, model.outline.vae.config.factor
        latents = np.random.default_rng(0).normal(size=(4, _CELLS // 4, _CELLS // 4, channels)).astype(np.float32)
        latents = latents.repeat(4, 1).repeat(4, 2)  # patches of one value, since the decoder looks around
        pixels = np.asarray(model.decode_latents(jnp.asarray(latents)), np.float32)
        colours = pixels.reshape(4, _CELLS, factor, _CELLS, factor, 3).mean((2, 4))
        self._factor = factor
        self._map, *_ = np.linalg.lstsq(_with_one(latents).reshape(-1, channels + 1), colours.reshape(-1, 3))

    def __call__(self, latents: Float[Array, "B h w C"]) -> Image.Image:
        """A sheet of the pictures, as large as the finished ones. Noisy latents are brought to the usual range."""
        values = np.asarray(latents, np.float32)
        values = values / np.maximum(values.std((1, 2, 3), keepdims=True), 1)
        pixels = np.clip(_with_one(values) @ self._map, 0, 1)
        images = [Image.fromarray((255 * image).astype(np.uint8)) for image in pixels]
        size = images[0].width * self._factor, images[0].height * self._factor
        return grids.sheet([image.resize(size, Image.Resampling.BILINEAR) for image in images])


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], -1)
