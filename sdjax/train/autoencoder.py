"""The loss of the autoencoder, and the normalisation of its latents.

The loss is the error of the reconstruction plus the KL divergence (Kingma and Welling 2014, as used in Rombach et al.
2022). There is no discriminator. A plain L1 distance would give blurred pictures, so the loss also measures averaged
pixels, colour alone and edges.
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
"""Side, in pixels, of the squares that the measures `pooled` and `chroma` average over."""
SHIFT = 4
"""The most pixels that `augment` moves an image by."""


def loss(
    stage: Stage, module: vae.AutoencoderKL, params: PyTree, batch: Mapping[str, Array], key: PRNGKeyArray
) -> Float[Array, ""]:
    """Returns the mean loss of a batch: `pixels` [B, H, W, 3] (8 bits), `index` [B].

    The random numbers of an image depend on the key and its index.
    """
    images = batch["pixels"].astype(jnp.float32) / 127.5 - 1
    keys = jax.vmap(lambda index: jax.random.split(jax.random.fold_in(key, index)))(batch["index"])
    if stage.vae_augment:
        images = jax.vmap(augment)(keys[:, 0], images)
    moments = jnp.asarray(module.apply({"params": params}, images, method="encode"))
    shape = (*moments.shape[1:-1], moments.shape[-1] // 2)
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys[:, 1])
    latents = vae.posterior_sample(moments, noise)
    decoded = jnp.asarray(module.apply({"params": params}, latents, method="decode"))
    terms = measures(decoded, images) | {"kl": jnp.mean(divergence(moments))}
    return jnp.sum(jnp.stack([weight * terms[name] for name, weight in stage.vae_loss.items()]))


def augment(key: PRNGKeyArray, image: Float[Array, "H W 3"]) -> Float[Array, "H W 3"]:
    """Returns the image moved by up to SHIFT pixels, with its edge repeated and its channels in random order."""
    move, colours = jax.random.split(key)
    padded = jnp.pad(image, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    y, x = jax.random.randint(move, (2,), 0, 2 * SHIFT + 1)
    moved = jax.lax.dynamic_slice(padded, (y, x, 0), image.shape)
    return moved[..., jax.random.permutation(colours, 3)]


def measures(decoded: Float[Array, "B H W 3"], images: Float[Array, "B H W 3"]) -> dict[str, Float[Array, ""]]:
    """Returns the terms of the reconstruction loss, each a mean over all values. Values are in [-1, 1].

    l1, l2: of the pixels. pooled: l1 of the means of POOL x POOL pixels. chroma: l1 of the same means less their mean
    over the channels. gradient: l1 of the differences between neighbouring pixels.
    """
    error = decoded - images
    batch, height, width, channels = error.shape
    squares = error.reshape(batch, height // POOL, POOL, width // POOL, POOL, channels)
    pooled = jnp.mean(squares, axis=(2, 4))
    gradient = jnp.mean(jnp.abs(jnp.diff(error, axis=1))) + jnp.mean(jnp.abs(jnp.diff(error, axis=2)))
    return {
        "l1": jnp.mean(jnp.abs(error)),
        "l2": jnp.mean(jnp.square(error)),
        "pooled": jnp.mean(jnp.abs(pooled)),
        "chroma": jnp.mean(jnp.abs(pooled - jnp.mean(pooled, axis=-1, keepdims=True))),
        "gradient": gradient,
    }


def divergence(moments: Float[Array, "B h w 2*c"]) -> Float[Array, "B h w c"]:
    """Returns the KL divergence of the posterior from N(0, 1), in nats for each latent value."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -30.0, 20.0)
    return 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)


def normalised(
    module: vae.AutoencoderKL, params: PyTree, buckets: Sequence[UInt8[np.ndarray, "N F H W 3"]]
) -> dict[str, Any]:
    """Returns the weights, normalised by the latents of these images. Of 4096 images or more, every n-th is used."""

    @jax.jit
    def means(images: Array) -> Array:
        moments = module.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1, method="encode")
        return vae.posterior_mean(jnp.asarray(moments))

    every = max(1, sum(map(len, buckets)) // 2048)
    batches = [pixels[i : i + 8 * every : every, 0] for pixels in buckets for i in range(0, len(pixels), 8 * every)]
    channels = module.config.latent_channels
    latents = [np.asarray(means(batch)).reshape(-1, channels) for batch in batches]
    return normalise(module.config, params, np.concatenate(latents))


def normalise(config: vae.VAEConfig, params: Mapping[str, Any], means: Float[np.ndarray, "N c"]) -> dict[str, Any]:
    """Returns the weights, changed so that each channel of the scaled latents has mean 0 and deviation 1.

    means: the mean of the posterior at many places of many images. A config has one `scaling_factor` for all channels,
    so the change is made in `quant_conv` and undone in `post_quant_conv`. The whole autoencoder computes the same as
    before.
    """
    gain = 1 / (means.std(axis=0, dtype=np.float64) * config.scaling_factor)
    offset = (config.shift_factor or 0.0) - means.mean(axis=0, dtype=np.float64) * gain
    gain, offset = gain.astype(np.float32), offset.astype(np.float32)
    encode, decode = params["quant_conv"], params["post_quant_conv"]
    # Scaling by the gain adds 2 log(gain) to the log variance.
    gains, offsets = np.concatenate([gain, np.ones_like(gain)]), np.concatenate([offset, 2 * np.log(gain)])
    kernel = decode["kernel"] / gain[:, None]
    return {
        **params,
        "quant_conv": {"kernel": encode["kernel"] * gains, "bias": encode["bias"] * gains + offsets},
        "post_quant_conv": {"kernel": kernel, "bias": decode["bias"] - np.einsum("abio,i->o", kernel, offset)},
    }
