"""Autoencoders of random small configurations against diffusers.

PyTorch's library saves every model, and our reader reads it.
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_configs import FLOAT32, HALF, examples, normal

pytestmark = pytest.mark.parity


@st.composite
def vae_configs(draw):
    blocks = draw(st.sampled_from([1, 2, 3]))
    quant = draw(st.booleans())
    return {
        "block_out_channels": tuple(draw(st.sampled_from([8, 16])) for _ in range(blocks)),
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": draw(st.sampled_from([1, 2])),
        "latent_channels": draw(st.sampled_from([4, 4, 16])),
        "norm_num_groups": draw(st.sampled_from([2, 4, 8])),
        "act_fn": draw(st.sampled_from(["silu", "mish"])),
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
        "mid_block_add_attention": draw(st.booleans()),
    }


def build_vae(config, seed=0):
    from diffusers import AutoencoderKL

    return oracle.randomised(AutoencoderKL(**config), seed)


def vae_errors(model, ours, images, latents):
    """Returns the errors of the moments of the posterior, and of the decoded pictures."""
    moments = oracle.channels_last(model.encode(oracle.channels_first(images)).latent_dist.parameters)
    pictures = oracle.channels_last(model.decode(oracle.channels_first(latents)).sample)
    encoded, decoded = ours(images, method="encode"), ours(latents, method="decode")
    assert encoded.dtype == decoded.dtype == jnp.float32
    return oracle.error(encoded, moments), oracle.error(decoded, pictures)


@examples(12)
@given(config=vae_configs(), seed=st.integers(0, 1000), size=st.sampled_from([(2, 2), (1, 3), (4, 2)]))
def test_autoencoders(config, seed, size):
    model = build_vae(config, seed)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    images = np.tanh(normal(seed, 2, 2 * factor * size[0], 2 * factor * size[1], 3))
    latents = normal(seed + 1, 2, *size, config["latent_channels"])
    with tempfile.TemporaryDirectory() as folder:
        ours = oracle.saved(model, Path(folder))
    assert max(vae_errors(model, ours, images, latents)) <= FLOAT32


def test_an_autoencoder_as_published_in_every_dtype(tmp_path):
    config = {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    model = build_vae(config)
    images, latents = np.tanh(normal(0, 1, 32, 64, 3)), normal(1, 1, 4, 8, 4)
    assert max(vae_errors(model, oracle.saved(model, tmp_path), images, latents)) <= FLOAT32
    for dtype, bound in HALF.items():
        assert max(vae_errors(model, oracle.read_model(tmp_path, dtype=dtype), images, latents)) <= bound
