"""U-Nets, autoencoders and text models of random small configurations against diffusers and transformers.

Every model is saved by PyTorch's libraries and read by our own reader. float32 agrees to 1e-4 of the output's norm,
bfloat16 to 3e-2.
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.parity

FLOAT32 = 1e-4
HALF = {"bfloat16": 3e-2, "float16": 5e-3}


def drawn(examples):
    """The same configurations in every run; a failure is reported as drawn, since shrinking compiles for hours."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# U-Nets.


@st.composite
def unet_configs(draw, family):
    """Any mix of block types, widths, heads and depths, with what tells the family apart."""
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
        # A level of no transformers is one that does not attend.
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

    @drawn(11)
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
    assert len(errors) >= 10  # really that many different ones


# The four models as published, narrowed: every option as in their config.json.
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


# Autoencoders.


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
    """Of the posterior's moments and of the decoded pictures."""
    moments = oracle.channels_last(model.encode(oracle.channels_first(images)).latent_dist.parameters)
    pictures = oracle.channels_last(model.decode(oracle.channels_first(latents)).sample)
    encoded, decoded = ours(images, method="encode"), ours(latents, method="decode")
    assert encoded.dtype == decoded.dtype == jnp.float32
    return oracle.error(encoded, moments), oracle.error(decoded, pictures)


@drawn(12)
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


# Text models.


@st.composite
def text_configs(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    window = draw(st.sampled_from([16, 77]))
    return {
        "vocab_size": 60,
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "intermediate_size": draw(st.sampled_from([12, 32])),
        "num_hidden_layers": draw(st.sampled_from([1, 2, 3])),
        "num_attention_heads": heads,
        "max_position_embeddings": window,
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "projection_dim": draw(st.sampled_from([6, 16])),
        # Files of before 2023 say 2 and mean the largest id of all.
        "eos_token_id": draw(st.sampled_from([2, 59, 1])),
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def build_text_model(config, projects, seed=0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    return oracle.randomised(kind(CLIPTextConfig(**config)), seed)


def token_ids(config, seed, batch=3):
    """Random words, an end token at another place in each row, then padding."""
    window, end = config["max_position_embeddings"], config["eos_token_id"]
    end = config["vocab_size"] - 1 if end == 2 else end
    ids = np.random.default_rng(seed).integers(3, config["vocab_size"] - 1, (batch, window), dtype=np.int32)
    for row in range(batch):
        ids[row, 4 + 3 * row :] = end  # SD1 pads with the end token: only the first counts
    return ids


@drawn(12)
@given(config=text_configs(), projects=st.booleans(), seed=st.integers(0, 1000), data=st.data())
def test_text_models(config, projects, seed, data):
    model = build_text_model(config, projects, seed)
    ids = token_ids(config, seed)
    clip_skip = data.draw(st.integers(1, config["num_hidden_layers"]))
    final_norm = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        ours = oracle.saved(model, Path(folder))
    context, pooled = ours(ids, clip_skip=clip_skip, final_norm=final_norm)
    theirs = model(oracle.tensor(ids).long(), output_hidden_states=True)
    hidden = theirs.hidden_states[-clip_skip]
    if final_norm:
        hidden = getattr(model, "text_model", model).final_layer_norm(hidden)
    assert oracle.error(context, hidden) <= FLOAT32
    assert oracle.error(pooled, theirs.text_embeds if projects else theirs.pooler_output) <= FLOAT32


@pytest.mark.parametrize("projects", [False, True])
def test_a_text_model_in_half_precision(tmp_path, projects):
    config = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "eos_token_id": 59, "projection_dim": 16, "max_position_embeddings": 77,
    }  # fmt: skip
    model = build_text_model(config, projects)
    model.save_pretrained(tmp_path)
    ids = token_ids(config, 0)
    theirs = model(oracle.tensor(ids).long())
    for dtype, bound in HALF.items():
        context, pooled = oracle.read_model(tmp_path, dtype=dtype)(ids)
        assert context.dtype == pooled.dtype == dtype
        assert oracle.error(context.astype(jnp.float32), theirs.last_hidden_state) <= bound
        expected = theirs.text_embeds if projects else theirs.pooler_output
        assert oracle.error(pooled.astype(jnp.float32), expected) <= bound
