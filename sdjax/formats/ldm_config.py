"""Infers the configs of a CompVis (LDM) checkpoint, which holds none, from the shapes of its weights.

Shapes do not show the number of heads and norm groups, the noise schedule and the scale of the latents. These are taken
from the model's family.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.families import REFINER, SD1, SD2, SDXL

_SCALING = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025, REFINER: 0.13025}
_ADDED = {SDXL: 6, REFINER: 5}  # numbers beside the pooled text that the U-Net is conditioned on
_HEAD_WIDTH = 64  # channels of a head, except in SD1's U-Net, which has 8 heads at every level

Tensors = Mapping[str, np.ndarray]


def infer_configs(family: str, parts: Mapping[str, Tensors], prediction_type: str) -> dict[str, dict[str, Any]]:
    """The content of diffusers' config.json for each part.

    parts: part -> tensors. The names in the U-Net and the VAE are LDM's, the names in a text model are those of
    transformers without `text_model.`.
    Raises DataError for a part that does not have the structure of Stable Diffusion.
    """
    try:
        configs = {name: _text_config(family, name, text) for name, text in parts.items() if name.startswith("text")}
        pooled = configs.get("text_encoder_2", {}).get("projection_dim", 0)
        size = {SD1: 512, SD2: 768 if prediction_type == "v_prediction" else 512, SDXL: 1024, REFINER: 1024}[family]
        vae = {
            "act_fn": "silu",
            "force_upcast": family in _ADDED,
            "norm_num_groups": 32,
            "sample_size": size,
            "scaling_factor": _SCALING[family],
            **_vae_config(parts["vae"]),
        }
        unet = _unet_config(family, parts["unet"], pooled)
        unet["sample_size"] = size // 2 ** (len(vae["block_out_channels"]) - 1)
        if family == SD2:
            unet["upcast_attention"] = prediction_type == "v_prediction"
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"not the structure of a {family} model: no {error.args[0]}") from None
    return {"unet": unet, "vae": vae, **configs}


def scheduler_config(family: str, prediction_type: str, *, zero_terminal_snr: bool = False) -> dict[str, Any]:
    """The content of scheduler_config.json, the same as in the published folders of the family."""
    name = {SD1: "PNDMScheduler", SD2: "DDIMScheduler"}.get(family, "EulerDiscreteScheduler")
    config = {
        "_class_name": name,
        "_diffusers_version": "0.42.0",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
    }
    if name == "PNDMScheduler":
        config |= {"skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
    if name == "DDIMScheduler":
        config |= {"set_alpha_to_one": False, "clip_sample": False}
    if zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def _unet_config(family: str, unet: Tensors, pooled: int) -> dict[str, Any]:
    blocks = _count(unet, "input_blocks.{}.0.")
    channels, layers, depths = [], [0], [0]
    for i in range(1, blocks):
        if any(key.startswith(f"input_blocks.{i}.0.op.") for key in unet):
            layers.append(0)
            depths.append(0)
            continue
        if layers[-1] == 0:
            channels.append(_shape(unet, f"input_blocks.{i}.0.out_layers.3.weight")[0])
        layers[-1] += 1
        depths[-1] = max(depths[-1], _count(unet, f"input_blocks.{i}.1.transformer_blocks.{{}}."))
    attention = [depth > 0 for depth in depths]
    depths[-1] = depths[-1] or _count(unet, "middle_block.1.transformer_blocks.{}.")
    depths = [max(depth, 1) for depth in depths]
    context = _shape(unet, "middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    linear = len(_shape(unet, "middle_block.1.proj_in.weight")) == 2
    heads = 8 if family == SD1 else [max(1, width // _HEAD_WIDTH) for width in channels]
    config = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.0",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": _shape(unet, "input_blocks.0.0.weight")[1],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": _shape(unet, "out.2.weight")[0],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attention[::-1]],
        "use_linear_projection": linear,
    }
    if "time_embed.cond_proj.weight" in unet:
        config["time_cond_proj_dim"] = _shape(unet, "time_embed.cond_proj.weight")[1]
    if "label_emb.0.0.weight" in unet:
        width = _shape(unet, "label_emb.0.0.weight")[1]
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // _ADDED.get(family, 6),
            "projection_class_embeddings_input_dim": width,
        }
    return config


def vae_config(vae: Tensors) -> dict[str, Any]:
    """The part of an autoencoder's config.json that its shapes show. vae: tensors by LDM's names.

    Raises DataError for tensors of something else.
    """
    try:
        return _vae_config(vae)
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"not the structure of an autoencoder: no {error.args[0]}") from None


def _vae_config(vae: Tensors) -> dict[str, Any]:
    levels = _count(vae, "encoder.down.{}.")
    layers = _count(vae, "encoder.down.0.block.{}.")
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.0",
        "block_out_channels": [_shape(vae, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": _shape(vae, "encoder.conv_in.weight")[1],
        "latent_channels": _shape(vae, "decoder.conv_in.weight")[1],
        "layers_per_block": layers,
        "out_channels": _shape(vae, "decoder.conv_out.weight")[0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in vae,
        "use_post_quant_conv": "post_quant_conv.weight" in vae,
    }


def _text_config(family: str, name: str, text: Tensors) -> dict[str, Any]:
    words, width = _shape(text, "embeddings.token_embedding.weight")
    openclip = family == SD2 or name == "text_encoder_2"
    projects = name == "text_encoder_2"
    return {
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,  # stands for the largest id, as in the published folders
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": _shape(text, "encoder.layers.0.mlp.fc1.weight")[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": _shape(text, "embeddings.position_embedding.weight")[0],
        "model_type": "clip_text_model",
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "num_hidden_layers": _count(text, "encoder.layers.{}."),
        "pad_token_id": 1,
        "projection_dim": _shape(text, "text_projection.weight")[0] if projects else width,
        "vocab_size": words,
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many prefixes, numbered from 0, begin a tensor's name. prefix: with `{}` in place of the number."""
    return next(i for i in itertools.count() if not any(key.startswith(prefix.format(i)) for key in tensors))


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    if tensors[name].ndim < 2:
        raise ValueError(f"{name} of two or more axes")
    return tensors[name].shape
