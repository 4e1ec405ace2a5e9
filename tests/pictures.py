"""For tests of drawing: small random models of each family, in diffusers and in sdjax, and comparisons of pictures.

Imports torch and diffusers inside its functions, so that tests without the `parity` mark run without them.
"""

import itertools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import oracle
import pytest

import sdjax
from sdjax import lora

TINY = Path(sdjax.__file__).parent / "tiny"
STEPS = 6
PROMPTS = ["a red heart", "cyclone over the water, umbrella"]
NEGATIVES = ["grey", "a blurry hot dog"]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2_a": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
"""The samplers that diffusers has too, with their class there."""
STOCHASTIC = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde", "lcm", "tcd")
"""Those that draw noise at every step. Given the same noise, ours and theirs must agree too."""
OTHERS = ("dpmpp_3m_sde", "dpmpp_sde", "dpmpp_2s_a", "restart", "er_sde")
"""The samplers that diffusers lacks. All draw noise, but restart only of 20 steps or more."""


def evaluations_with_noise(sampler):
    """The numbers of the evaluations after which a scheduler of diffusers draws noise."""
    return itertools.count(1, 2) if sampler == "dpm2_a" else itertools.count()


def parity(test):
    """Marks a test that needs diffusers, whose schedulers hand torch tensors to NumPy (NumPy 2 warns of it)."""
    for method in ("__array__ implementation", "__array_wrap__ must accept"):
        test = pytest.mark.filterwarnings(f"ignore:{method}:DeprecationWarning")(test)
    return pytest.mark.parity(test)


# Small models of each family, as diffusers makes and saves them.

SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "clip_sample": False, "set_alpha_to_one": False,
}  # fmt: skip
KINDS = {
    "sd1": {"context": 24, "scheduler": {"skip_prk_steps": True}, "class": "PNDMScheduler"},
    "sd2v": {
        "context": 24,
        "unet": {"use_linear_projection": True, "attention_head_dim": [2, 4]},
        "text": {"hidden_act": "gelu", "pad_token_id": 2},
        "scheduler": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "class": "DDIMScheduler",
    },
    "sdxl": {
        "context": 24 + 32,
        "unet": {
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 20,
        },
        "scheduler": {"timestep_spacing": "leading", "interpolation_type": "linear"},
        "class": "EulerDiscreteScheduler",
    },
}


def build(kind, **changes):
    """A diffusers pipeline with random weights and the tokenizer `micro.TOKENIZER`. changes: of the U-Net's config."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    spec = KINDS[kind]
    unet = (
        {
            "sample_size": 8,
            "block_out_channels": (16, 24),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "cross_attention_dim": spec["context"],
        }
        | spec.get("unet", {})
        | changes
    )
    vae = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "sample_size": 32,
    }
    text = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "max_position_embeddings": 16, **micro.IDS,
    } | spec.get("text", {})  # fmt: skip
    parts = {
        "unet": oracle.randomised(diffusers.UNet2DConditionModel(**unet), 1),
        "vae": oracle.randomised(diffusers.AutoencoderKL(**vae), 2),
        "text_encoder": oracle.randomised(CLIPTextModel(CLIPTextConfig(**text)), 3),
        "tokenizer": CLIPTokenizer.from_pretrained(micro.TOKENIZER, model_max_length=16),
        # Published configs hold options of other classes too, which the other samplers read.
        "scheduler": getattr(diffusers, spec["class"]).from_config(SCHEDULER | spec["scheduler"]),
    }
    if kind == "sd2v":
        parts["tokenizer"].pad_token = "!"  # for SD2 and SDXL's second encoder; SD1 pads with the end token
    if kind != "sdxl":
        return diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    text |= {"hidden_size": 32, "hidden_act": "gelu", "projection_dim": 20}
    second = CLIPTokenizer.from_pretrained(micro.TOKENIZER, model_max_length=16)
    second.pad_token = "!"
    return diffusers.StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=oracle.randomised(CLIPTextModelWithProjection(CLIPTextConfig(**text)), 4),
        tokenizer_2=second,
        add_watermarker=False,
    )


def pair(kind, folder, **changes):
    """(diffusers' pipeline, ours), both read from the folder diffusers saved; "tiny" is the embedded model."""
    import torch
    from diffusers import DiffusionPipeline

    if kind == "tiny":
        folder = TINY
    else:
        build(kind, **changes).save_pretrained(folder)
    # diffusers reads the folder too: in memory, its schedulers still know which options were left out.
    theirs = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    return theirs, sdjax.load("tiny" if kind == "tiny" else folder)


def with_scheduler(pipeline, sampler, monkeypatch, seed=0):
    """The pipeline with another scheduler. A stochastic scheduler draws our noise."""
    import diffusers
    import torch

    extra = {}
    if sampler.startswith("dpmpp"):
        extra["algorithm_type"] = "dpmsolver++" if sampler == "dpmpp_2m" else "sde-dpmsolver++"
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config, **extra)
    draws = evaluations_with_noise(sampler)

    def randn_tensor(shape, **_):
        i = next(draws)
        key = lambda row: jax.random.fold_in(jax.random.key(seed + row), i)
        drawn = [jax.random.normal(key(row), (*shape[2:], shape[1]), jnp.float32) for row in range(shape[0])]
        return torch.from_numpy(np.moveaxis(np.asarray(drawn), -1, 1).copy())

    if sampler in STOCHASTIC:
        monkeypatch.setattr(sys.modules[type(scheduler).__module__], "randn_tensor", randn_tensor)
    # A new pipeline, so that the pipeline of the fixture keeps its scheduler.
    return type(pipeline)(**(pipeline.components | {"scheduler": scheduler}), **settings_of(pipeline))


def settings_of(pipeline):
    """The settings of a pipeline beside its components."""
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    settings = {name: pipeline.config[name] for name in names if name in pipeline.config}
    return settings | ({"add_watermarker": False} if "force_zeros_for_empty_prompt" in settings else {})


def their_picture(pipeline, *prompts, latents, steps=STEPS, guidance=7.5, **how):
    """Draws with diffusers and returns (final latents, pixels), both NHWC. prompts: the prompts, the negative ones."""
    import torch

    if prompts:
        how["prompt"] = prompts[0]
    if len(prompts) > 1:
        how["negative_prompt"] = prompts[1]
    pipeline.set_progress_bar_config(disable=True)
    final = pipeline(
        latents=oracle.channels_first(latents),
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **how,
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(final / pipeline.vae.config.scaling_factor).sample
    pictures = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return oracle.channels_last(final), pixels_of(pictures)


def pixels_of(pictures):
    """The pixels of pictures, [B, H, W, 3], as integers that can be subtracted."""
    return np.stack([np.asarray(picture, np.int32) for picture in pictures])


def start(batch=2, size=8):
    """Unit noise, [batch, size, size, 4]."""
    return np.random.default_rng(3).normal(size=(batch, size, size, 4)).astype(np.float32)


def assert_same(ours, theirs, final_latents):
    """The latents differ by at most 1e-3 of the largest latent (or of 1), and the pixels by at most 2 of 255."""
    latents, pixels = theirs
    assert np.isfinite(latents).all()
    error = np.abs(final_latents() - latents).max() / max(1.0, np.abs(latents).max())
    steps = np.abs(pixels_of(ours) - pixels).max()
    print(f"latents within {error:.1e}, pixels within {steps} / 255")
    assert error <= 1e-3
    assert steps <= 2
    assert pixels.std() > 5  # a picture, not a grey field on which anything agrees


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


def compilations(action):
    """The number of programs that are compiled while `action()` runs."""
    before = len(COMPILED)
    action()
    return len(COMPILED) - before


def text_and_unet_lora(sd, seed=0, alpha=2.0):
    """Part -> adapter tree of a LoRA that visibly changes the pictures, through the text model and the U-Net."""

    def filled(layer):
        key = jax.random.key(seed + layer["up"].size)
        return layer | {"up": 0.3 * jax.random.normal(key, layer["up"].shape, jnp.float32)}

    def adapter(part, which):
        new = lora.init(jax.random.key(seed), sd.params[part], rank=4, alpha=alpha, which=which)
        return lora.map_layers(filled, new)

    return {"unet": adapter("unet", "transformer"), "text_encoder": adapter("text_encoder", "attention+ff")}
