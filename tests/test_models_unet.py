"""U-Nets of random small configurations against diffusers.

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

from sdjax.models.unet import low_frequencies

pytestmark = pytest.mark.parity


@st.composite
def unet_configs(draw, family):
    """Any mix of block types, widths, heads and depths, with the options of the family."""
    groups = draw(st.sampled_from([2, 4]))
    blocks = draw(st.sampled_from([1, 1, 2, 2, 3]))
    each = lambda values: tuple(draw(values) for _ in range(blocks))
    per_block = lambda values: draw(st.one_of(values, st.lists(values, min_size=blocks, max_size=blocks)))
    down = each(st.sampled_from(["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]))
    up = each(st.sampled_from(["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]))
    config = {
        "sample_size": 8,
        "in_channels": 9 if family == "inpainting" else 4,
        "out_channels": 4,
        "block_out_channels": each(st.sampled_from([8, 16, 24])),
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": draw(st.sampled_from(["UNetMidBlock2DCrossAttn"] * 3 + ["UNetMidBlock2D", None])),
        "layers_per_block": draw(st.sampled_from([1, 1, [2, 1, 1][:blocks], [1, 2, 1][:blocks]])),
        "attention_head_dim": per_block(st.sampled_from([1, 2, 4, 8])),
        "cross_attention_dim": draw(st.sampled_from([6, 12, 16])),
        "only_cross_attention": per_block(st.booleans()),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "act_fn": draw(st.sampled_from(["silu", "silu", "mish", "gelu", "relu"])),
        "use_linear_projection": family in ("sd2", "sdxl"),
        "upcast_attention": draw(st.booleans()),
        "mid_block_scale_factor": draw(st.sampled_from([1, 1.5])),
        "resnet_out_scale_factor": draw(st.sampled_from([1.0, 0.7])),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([0, 1])),
        "time_embedding_dim": draw(st.sampled_from([None, 20])),
        "conv_in_kernel": draw(st.sampled_from([3, 1])),
        "conv_out_kernel": draw(st.sampled_from([3, 5])),
    }
    if draw(st.booleans()):
        config["time_cond_proj_dim"] = 10
    if family == "sdxl":
        config |= {
            "transformer_layers_per_block": draw(st.sampled_from([2, [0, 1, 2][-blocks:], [1, 2, 1][:blocks]])),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": draw(st.sampled_from([4, 6])),
        }
        config["projection_class_embeddings_input_dim"] = 6 * config["addition_time_embed_dim"] + 14
    if family == "sdxl" and isinstance(depth := config["transformer_layers_per_block"], list):
        # A level without transformers has blocks without attention.
        config["down_block_types"] = tuple(kind if n else "DownBlock2D" for kind, n in zip(down, depth, strict=True))
        config["up_block_types"] = tuple(kind if n else "UpBlock2D" for kind, n in zip(up, depth[::-1], strict=True))
    return config


def unet_inputs(config, seed, batch, height, width, tokens):
    added = {}
    if config.get("addition_embed_type"):
        sizes = np.random.default_rng(seed).integers(0, 1024, (batch, 6)).astype(np.float32)
        added |= {"text_embeds": normal(seed + 1, batch, 14), "time_ids": sizes}
    if config.get("time_cond_proj_dim"):
        added["timestep_cond"] = normal(seed + 2, batch, config["time_cond_proj_dim"])
    timesteps = np.linspace(3, 981, batch, dtype=np.float32)
    latents = normal(seed + 3, batch, height, width, config["in_channels"])
    return latents, timesteps, normal(seed + 4, batch, tokens, config["cross_attention_dim"]), added or None


def run_diffusers(model, latents, timesteps, context, added=None):
    added = {name: oracle.tensor(value) for name, value in (added or {}).items()}
    condition = added.pop("timestep_cond", None)
    output = model(
        oracle.channels_first(latents),
        oracle.tensor(timesteps),
        oracle.tensor(context),
        timestep_cond=condition,
        added_cond_kwargs=added,
    )
    return oracle.channels_last(output.sample)


def build_unet(config, seed=0):
    from diffusers import UNet2DConditionModel

    return oracle.randomised(UNet2DConditionModel(**config), seed)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "inpainting"])
def test_unets(family):
    errors = {}

    @examples(11)
    @given(
        config=unet_configs(family),
        seed=st.integers(0, 1000),
        size=st.sampled_from([(8, 8), (4, 8), (7, 5), (6, 9), (12, 4)]),
        tokens=st.sampled_from([1, 7, 77]),
    )
    def check(config, seed, size, tokens):
        model = build_unet(config, seed)
        inputs = unet_inputs(config, seed, 2, *size, tokens)
        with tempfile.TemporaryDirectory() as folder:
            ours = oracle.saved(model, Path(folder))
        error = oracle.error(ours(*inputs), run_diffusers(model, *inputs))
        assert error <= FLOAT32
        errors[str((config, size, tokens))] = error

    check()
    print(f"{family}: {len(errors)} configurations, largest error {max(errors.values()):.1e}")
    assert len(errors) >= 10  # different ones


# The four published models with fewer channels: all other options as in their config.json.
PUBLISHED = {
    "sd1": {
        "attention_head_dim": 8,
        "block_out_channels": (16, 32, 32, 32),
        "cross_attention_dim": 24,
        "layers_per_block": 2,
    },
    "sd2": {
        "attention_head_dim": [1, 2, 4, 4],
        "block_out_channels": (16, 32, 64, 64),
        "cross_attention_dim": 32,
        "layers_per_block": 2,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 4],
        "block_out_channels": (16, 32, 64),
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "layers_per_block": 2,
        "projection_class_embeddings_input_dim": 62,
        "transformer_layers_per_block": [1, 2, 4],  # 10 as published
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    },
    "inpainting": {
        "attention_head_dim": 8,
        "block_out_channels": (16, 32, 32, 32),
        "cross_attention_dim": 24,
        "in_channels": 9,
        "layers_per_block": 2,
    },
}
SHARED = {"in_channels": 4, "norm_num_groups": 8, "sample_size": 8}


@pytest.mark.parametrize("family", PUBLISHED)
def test_unets_as_published_in_every_dtype(tmp_path, family):
    config = SHARED | PUBLISHED[family]
    model = build_unet(config)
    inputs = unet_inputs(config, 5, 2, 16, 8, 77)
    expected = run_diffusers(model, *inputs)
    assert oracle.error(oracle.saved(model, tmp_path)(*inputs), expected) <= FLOAT32
    for dtype, bound in HALF.items():
        out = oracle.read_model(tmp_path, dtype=dtype)(*inputs)
        assert out.dtype == dtype
        error = oracle.error(out.astype(jnp.float32), expected)
        print(f"{family} {dtype}: {error:.1e}")
        assert error <= bound


@pytest.mark.parametrize("size", [(6, 5), (8, 8), (1, 3)])
def test_low_frequencies_are_four_coefficients_of_the_fourier_transform(size):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    shifted = np.fft.fftshift(np.fft.fft2(x, axes=(1, 2)), axes=(1, 2))
    kept = np.zeros_like(shifted)
    region = np.s_[:, *(slice(max(side // 2 - 1, 0), side // 2 + 1) for side in size)]
    kept[region] = shifted[region]
    expected = np.fft.ifft2(np.fft.ifftshift(kept, axes=(1, 2)), axes=(1, 2)).real
    np.testing.assert_allclose(low_frequencies(jnp.asarray(x)), expected, atol=1e-6)
