"""The autoencoder's loss, and the normalisation of its latents.

Reconstruction plus KL divergence (Kingma and Welling 2014, as Rombach et al. 2022 use them). There is no discriminator
here: measures of pooled pixels, of colour alone and of edges make up for what a plain L1 distance leaves blurred.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, UInt8

from sdjax.models import vae
from sdjax.train.config import Stage

POOL = 4
"""Side of the squares of pixels that the pooled measures average over."""
SHIFT = 4
"""Pixels a picture is moved by at most."""


def loss(
    stage: Stage, module: vae.AutoencoderKL, params: PyTree, batch: Mapping[str, Array], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Mean loss over a batch of `pixels` [B, H, W, 3] (8 bits) with `index` [B], which the random numbers hang on."""
    images = batch["pixels"].astype(jnp.float32) / 127.5 - 1
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(batch["index"])
    if stage.vae_augment:
        images = jax.vmap(_augment)(keys[:, 0], images)
    moments = jnp.asarray(module.apply({"params": params}, images, method="encode"))
    shape = (*moments.shape[1:-1], moments.shape[-1] // 2)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys[:, 1])
    latents = vae.posterior_sample(moments, noise)
    decoded = jnp.asarray(module.apply({"params": params}, latents, method="decode"))
    terms = measures(decoded, images) | {"kl": jnp.mean(divergence(moments))}
    return jnp.sum(jnp.stack([weight * terms[name] for name, weight in stage.vae_loss.items()]))


def measures(decoded: Float[Array, "B H W 3"], images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, ""]]:
    """The terms of the reconstruction loss, means over everything, for values in [-1, 1].

    l1, l2: pixel by pixel. pooled: l1 of POOL x POOL means. chroma: the same of what is left when each pixel's mean
    over the channels is taken off. gradient: l1 of the differences between neighbours.
    """
    error = decoded - images
    batch, height, width, channels = error.shape
    squares = error.reshape(batch, height // POOL, POOL, width // POOL, POOL, channels)
    pooled = jnp.mean(squares, axis=(2, 4))
    steps = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return {
        "l1": jnp.mean(jnp.abs(error)),
        "l2": jnp.mean(jnp.square(error)),
        "pooled": jnp.mean(jnp.abs(pooled)),
        "chroma": jnp.mean(jnp.abs(pooled - jnp.mean(pooled, axis=-1, keepdims=True))),
        "gradient": steps,
    }


def divergence(moments: Float[Array, "B h w 2*c"]) -> Float[Array, "B h w c"]:
    """KL divergence of the posterior from N(0, 1), in nats a latent."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -30.0, 20.0)
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)


def normalised(
    module: vae.AutoencoderKL, params: PyTree, buckets: Sequence[UInt8[np.ndarray, "N F H W 3"]]
) -> dict[str, Any]:
    """`normalise` by what the autoencoder makes of these pictures (about 2048 of them, evenly spread)."""

    @jax.jit
    def means(images: Array) -> Array:
        moments = module.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1, method="encode")
        return vae.posterior_mean(jnp.asarray(moments))

    every = max(1, sum(map(len, buckets)) // 2048)
    batches = [pixels[i : i + 8 * every : every, 0] for pixels in buckets for i in range(0, len(pixels), 8 * every)]
    channels = module.config.latent_channels
    found = [np.asarray(means(batch)).reshape(-1, channels) for batch in batches]
    return normalise(module.config, params, np.concatenate(found))


def normalise(config: vae.VAEConfig, params: Mapping[str, Any], means: Float[np.ndarray, "N c"]) -> dict[str, Any]:
    """The weights with each latent channel brought to mean 0 and deviation 1 after scaling.

    means: the posterior's mean at many places of many pictures. The change is folded into `quant_conv` and
    `post_quant_conv`, so that the autoencoder as a whole computes what it did: a config has one `scaling_factor` for
    all channels.
    """
    gain = 1 / (means.std(axis=0, dtype=np.float64) * config.scaling_factor)
    offset = (config.shift_factor or 0.0) - means.mean(axis=0, dtype=np.float64) * gain
    gain, offset = gain.astype(np.float32), offset.astype(np.float32)
    encode, decode = params["quant_conv"], params["post_quant_conv"]
    # The log variance moves by that of the gain.
    gains, offsets = np.concatenate([gain, np.ones_like(gain)]), np.concatenate([offset, 2 * np.log(gain)])
    kernel = decode["kernel"] / gain[:, None]
    return {
        **params,
        "quant_conv": {"kernel": encode["kernel"] * gains, "bias": encode["bias"] * gains + offsets},
        "post_quant_conv": {"kernel": kernel, "bias": decode["bias"] - np.einsum("abio,i->o", kernel, offset)},
    }


def _augment(key: PRNGKeyArray, image: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    """The picture moved by up to SHIFT pixels (its edge repeated), its channels in any order."""
    move, colours = jax.random.split(key)
    padded = jnp.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    y, x = jax.random.randint(move, (2,), 0, 2 * SHIFT + 1)
    moved = jax.lax.dynamic_slice(padded, (y, x, 0), image.shape)
    return moved[..., jax.random.permutation(colours, 3)]
