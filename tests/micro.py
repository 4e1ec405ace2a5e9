"""For tests of training: a very small model with random weights, a few images, short runs, and what runs leave."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw

import sdjax.tiny
from sdjax.formats.diffusers_folder import save_folder
from sdjax.models import clip, unet, vae
from sdjax.outline import Outline
from sdjax.runtime.compiler_options import compiler_options
from sdjax.train import checkpoint
from sdjax.train.config import RunConfig
from sdjax.train.config_file import from_table

os.environ.setdefault("SOURCE_DATE_EPOCH", "0")  # runs that are compared may begin on two days

UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "attention_head_dim": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
    "cross_attention_dim": 32,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
}
EMBEDDED = Path(sdjax.tiny.__file__).parent
STAND_IN_VAE = {
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "sample_size": 64,
}
TOKENIZER = Path(__file__).parent / "tokenizer"
"""A BPE tokenizer of 2263 words, of which the first two begin and end a text. Its window has 16 positions."""
IDS = {"vocab_size": 2263, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, **IDS}

WORDS = {"train": ["textual_inversion"], "placeholder_tokens": ["<plana>", "<sky>"], "vectors_per_token": [2, 1]}
"""A stage that trains two new words."""
EVERYTHING = [
    {"name": "words", **WORDS, "init_tokens": ["red circle", "<rand-0.1>"], "weight_decay": 0.1, "clip_ti_decay": True},
    {"name": "style", "train": ["lora"], "lora_targets": "attention+ff", "ema_decay": 0.9},
    {
        "name": "both",
        "train": ["lora", "textual_inversion"],
        "lora_continue": True,
        "lora_parts": ["unet", "text_encoder"],
        "placeholder_tokens": ["<sky>", "<new>"],
        "template": "object",
        "learning_rate": {"unet": 1e-3, "text_encoder": 1e-3, "textual_inversion": 1e-2},
    },
    {"name": "autoencoder", "train": ["vae"], "vae_normalise": True, "vae_augment": True, "data": {"flip": True}},
    {"name": "whole", "train": ["unet", "text_encoder"], "ema_decay": 0.9, "noise_offset": 0.1, "loss": "huber"},
]
"""Stages that train every kind of part, each on top of the results before it."""


def make_model(folder: Path, *, sdxl: bool = False, inpainting: bool = False, stand_in: bool = False) -> Path:
    """Writes a model for pictures of 16 x 16 pixels, with random weights and the noise schedule of tiny.

    A stand-in for the embedded model has its words and its pictures of 64 x 64 pixels.
    """
    tiny = Outline.load("tiny")
    text = {**tiny.folder.configs["text_encoder"], **TEXT}
    configs = {"unet": dict(UNET), "vae": dict(VAE), "text_encoder": text}
    configs["unet"] |= {"in_channels": 9} if inpainting else {}
    index = {key: value for key, value in tiny.folder.model_index.items() if key != "_class_name"}
    tokenizers = {"tokenizer": TOKENIZER}
    if stand_in:
        tokenizers = {"tokenizer": EMBEDDED / "tokenizer"}
        text |= {name: tiny.folder.configs["text_encoder"][name] for name in (*IDS, "num_hidden_layers")}
        configs["unet"] |= {"sample_size": 16}
        configs["vae"] = {**VAE, **STAND_IN_VAE}
    if sdxl:
        configs["unet"] |= XL
        configs["text_encoder_2"] = {**text, "architectures": ["CLIPTextModelWithProjection"], "projection_dim": 16}
        tokenizers["tokenizer_2"] = tokenizers["tokenizer"]
        index |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": index["tokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    shapes = {
        name: {"unet": unet.abstract_params, "vae": vae.abstract_params}.get(name, clip.abstract_params)(
            {"unet": unet.UNetConfig, "vae": vae.VAEConfig}.get(name, clip.TextConfig).from_dict(config)
        )
        for name, config in configs.items()
    }
    random = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        return (random.normal(size=leaf.shape) / max(1, np.prod(leaf.shape[:-1])) ** 0.5).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(fill, shapes)
    save_folder(
        folder,
        configs=configs,
        params=params,
        tokenizers=tokenizers,
        scheduler=tiny.folder.scheduler,
        model_index=index,
        dtype=jnp.dtype("float32"),
    )
    return folder


def make_images(folder: Path, count: int = 12) -> Path:
    """Writes images of discs in several colours, with captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    colours = ["red", "green", "blue", "orange"]
    with (folder / "metadata.jsonl").open("w") as lines:
        for i in range(count):
            image = Image.new("RGB", (16, 16), "white")
            colour = colours[i % len(colours)]
            ImageDraw.Draw(image).ellipse((1 + i % 3, 2, 10 + i % 5, 13), fill=colour)
            image.save(folder / f"{i:02d}.png")
            lines.write(json.dumps({"file_name": f"{i:02d}.png", "text": f"{colour} circle"}) + "\n")
    return folder


def settings(model: Path, images: Path, output: Path, *, stages: list[dict] | None = None, **changes) -> RunConfig:
    """Returns a short run on one device: 6 steps, a checkpoint every 2 steps. `changes` replace whole tables."""
    stage = {"name": "style", "train": ["lora"], "steps": 6, "learning_rate": 5e-3, "lora_rank": 2}
    table = {
        "model": str(model),
        "output": str(output),
        "data": {"path": str(images), "resolution": 16, "batch_size": 4, "validation_count": 4},
        "stages": [{**stage, **s} for s in stages or [{}]],
        "validation": {"prompts": ["red circle", "blue circle"], "steps": 2, "guidance": 2.0, "every": 3},
        "checkpoint": {"every": 2, "keep": 10},
        "parallel": {"mesh": {"data": 1}},
    }
    return from_table({**table, **changes})


def metric_lines(output: Path, key: str = "loss") -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl that have a key."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def exported(output: Path, stage: str = "style") -> dict[str, bytes]:
    """Returns the content of every weight file that a stage of a run exported, by its path in the export."""
    folder = output / "export" / stage
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    assert files
    return files


def remove_checkpoints_after(output: Path, step: int) -> None:
    """Removes the checkpoints of a run after a step, counted over all stages, as if it had been killed there."""
    for later in checkpoint.steps(output / "checkpoints"):
        if later > step:
            shutil.rmtree(output / "checkpoints" / f"step_{later:08d}")


def quick_compilation():
    """Yields while XLA optimises little, for a fixture: tests of training mostly compile.

    Steps of training and of drawing are compiled as for large models, by the emitters that then take half the time.
    """
    former = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        as_large = lambda platform, **how: compiler_options(platform, **(how | {"large": True}))
        patch.setattr("sdjax.train.parallel.compiler_options", as_large)
        patch.setattr("sdjax.draw.loop.is_large", lambda params: True)
        yield
    jax.config.update("jax_disable_most_optimizations", former)
