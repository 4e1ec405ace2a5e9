"""The loss of the autoencoder against PyTorch, the normalisation of its latents, and its augmentation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.models import vae
from sdjax.train.autoencoder import augment, divergence, measures, normalise

CONFIG = vae.VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5)
MODULE = vae.AutoencoderKL(CONFIG)
RANDOM = np.random.default_rng(0)


def pictures(*shape):
    return RANDOM.uniform(-1, 1, size=shape).astype(np.float32)


@pytest.mark.parity
def test_measures_against_torch():
    import torch
    from torch.nn import functional

    ours, theirs = pictures(3, 16, 8, 3), pictures(3, 16, 8, 3)
    a, b = (torch.tensor(x).permute(0, 3, 1, 2) for x in (ours, theirs))
    pool = lambda x: functional.avg_pool2d(x, 4)
    chroma = lambda x: x - x.mean(1, keepdim=True)
    expected = {
        "l1": functional.l1_loss(a, b),
        "l2": functional.mse_loss(a, b),
        "pooled": functional.l1_loss(pool(a), pool(b)),
        "chroma": functional.l1_loss(pool(chroma(a)), pool(chroma(b))),
        "gradient": functional.l1_loss(a.diff(dim=2), b.diff(dim=2)) + functional.l1_loss(a.diff(dim=3), b.diff(dim=3)),
    }
    measured = measures(jnp.asarray(ours), jnp.asarray(theirs))
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert float(measured[name]) == pytest.approx(float(value), rel=1e-5), name

    moments = torch.tensor(pictures(2, 4, 4, 8))
    normal = torch.distributions.Normal
    mean, deviation = moments[..., :4], torch.exp(0.5 * moments[..., 4:])
    exact = torch.distributions.kl_divergence(normal(mean, deviation), normal(0.0, 1.0))
    np.testing.assert_allclose(divergence(jnp.asarray(moments.numpy())), exact.numpy(), rtol=1e-5, atol=1e-6)


def test_normalised_latents_are_centred_and_the_pictures_stay():
    images = jnp.asarray(pictures(6, 16, 16, 3))
    params = MODULE.init(jax.random.key(0), images)["params"]
    params["quant_conv"]["bias"] = jnp.arange(8, dtype=jnp.float32) / 3
    moments = MODULE.apply({"params": params}, images, method="encode")
    changed = normalise(CONFIG, params, np.asarray(vae.posterior_mean(moments)).reshape(-1, 4))
    after = MODULE.apply({"params": changed}, images, method="encode")
    latents = vae.scale_latents(CONFIG, vae.posterior_mean(after))
    np.testing.assert_allclose(jnp.mean(latents, axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(latents, axis=(0, 1, 2)), 1, rtol=1e-4)
    decoded = [MODULE.apply({"params": p}, images) for p in (params, changed)]
    np.testing.assert_allclose(decoded[1], decoded[0], atol=1e-4)
    # With the same noise, the sample of the posterior is the same sample, normalised.
    noise = jnp.asarray(pictures(*moments.shape[:-1], 4))
    samples = [
        MODULE.apply({"params": p}, vae.posterior_sample(m, noise), method="decode")
        for p, m in ((params, moments), (changed, after))
    ]
    np.testing.assert_allclose(samples[1], samples[0], atol=1e-4)


def test_augmentation_moves_and_swaps_channels_only():
    image = jnp.asarray(pictures(16, 16, 3))
    augmented = jax.vmap(augment, in_axes=(0, None))(jax.random.split(jax.random.key(0), 64), image)
    for picture in augmented:
        # The middle pixel comes from at most 4 pixels away, with its channels in some order.
        around = np.sort(np.asarray(image[4:13, 4:13]).reshape(-1, 3), axis=1)
        middle = np.sort(np.asarray(picture[8, 8]))
        assert np.abs(around - middle).max(axis=1).min() == 0
    assert len({tuple(np.asarray(picture[8, 8])) for picture in augmented}) > 30
