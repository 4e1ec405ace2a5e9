"""The names of the U-Net's and the VAE's modules in CompVis' code (LDM), beside those of diffusers.

diffusers and LDM count the blocks of a U-Net in the same order. LDM numbers them without a break through all levels, so
its numbers follow from the number of blocks at each level.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_IN_VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}

_DEFAULTS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}


def ldm_prefixes(unet: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' prefix -> LDM's, for the modules of a U-Net: `down_blocks.1.attentions.0` -> `input_blocks.4.1`.

    unet: a parameter tree. What follows the prefix of an attention is the same in both.
    """
    prefixes = dict(_TOP)
    number = 1
    for level, block in _numbered(unet, "down_blocks"):
        for i, _ in _numbered(block, "resnets"):
            _add_pair(prefixes, block, f"down_blocks.{level}", i, f"input_blocks.{number}")
            number += 1
        if "downsamplers_0" in block:
            prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    _add_resnet(prefixes, "mid_block.resnets.0", "middle_block.0")
    prefixes["mid_block.attentions.0"] = "middle_block.1"
    _add_resnet(prefixes, "mid_block.resnets.1", "middle_block.2")
    number = 0
    for level, block in _numbered(unet, "up_blocks"):
        for i, _ in _numbered(block, "resnets"):
            _add_pair(prefixes, block, f"up_blocks.{level}", i, f"output_blocks.{number}")
            number += 1
        if "upsamplers_0" in block:
            place = 2 if "attentions_0" in block else 1
            prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{place}.conv"
    return prefixes


def ldm_name(module: str, prefixes: Mapping[str, str]) -> str | None:
    """LDM's name of a U-Net module, from diffusers' name; None if LDM has none.

    prefixes: those of `ldm_prefixes`. With inverted prefixes the function returns diffusers' name for LDM's.
    """
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if prefix := prefixes.get(".".join(parts[:end])):
            return ".".join([prefix, *parts[end:]])
    return None


def ldm_vae_name(module: str, levels: int) -> str:
    """LDM's name of a VAE module, from diffusers' name. LDM numbers the decoder's levels in reverse order."""
    name = re.sub(r"(?<=mid_block\.)resnets\.(\d+)", lambda match: f"block_{int(match[1]) + 1}", module)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("mid_block.", "mid.")
    name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample").replace("resnets", "block")
    for ours, theirs in _IN_VAE.items():
        if name.endswith(f".{ours}"):
            return name.removesuffix(ours) + theirs
    return name


def vae_name(module: str, levels: int) -> str:
    """The inverse of `ldm_vae_name`."""
    name = re.sub(r"mid\.block_(\d+)", lambda match: f"mid_block.resnets.{int(match[1]) - 1}", module)
    name = name.replace("mid.attn_1", "mid_block.attentions.0")
    name = re.sub(r"\bdown\.(\d+)", r"down_blocks.\1", name)
    name = re.sub(r"\bup\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    name = re.sub(r"\.block\.(\d+)", r".resnets.\1", name)
    name = name.replace(".downsample.", ".downsamplers.0.").replace(".upsample.", ".upsamplers.0.")
    for ours, theirs in _IN_VAE.items():
        # Only the attention of a VAE has a `norm`.
        if name.endswith(f".{theirs}") and (ours != "group_norm" or ".attentions." in name):
            return name.removesuffix(theirs) + ours
    return name


def unet_structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tree without weights that has the blocks of a U-Net with this config of diffusers, for `ldm_prefixes`.

    What the config leaves out has diffusers' default, which is the structure of Stable Diffusion 1.
    """
    config = {**_DEFAULTS, **config}
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    layers = list(layers) if isinstance(layers, (list, tuple)) else [layers] * levels
    tree: dict[str, Any] = {}
    for way, counts in (("down", layers), ("up", [n + 1 for n in layers[::-1]])):
        for level, (kind, count) in enumerate(zip(config[f"{way}_block_types"], counts, strict=True)):
            stems = ["resnets", "attentions"] if kind.startswith("CrossAttn") else ["resnets"]
            names = [f"{stem}_{i}" for stem in stems for i in range(count)]
            names += [f"{way}samplers_0"] if level < levels - 1 else []
            tree[f"{way}_blocks_{level}"] = {name: {} for name in names}
    return tree


def _numbered(tree: Mapping[str, Any], stem: str) -> Iterator[tuple[int, Any]]:
    """Yields the number and the subtree of each module whose name is `stem` and a number, from 0 on."""
    for i in itertools.count():
        if f"{stem}_{i}" not in tree:
            return
        yield i, tree[f"{stem}_{i}"]


def _add_pair(prefixes: dict[str, str], block: Mapping[str, Any], ours: str, i: int, theirs: str) -> None:
    _add_resnet(prefixes, f"{ours}.resnets.{i}", f"{theirs}.0")
    if f"attentions_{i}" in block:
        prefixes[f"{ours}.attentions.{i}"] = f"{theirs}.1"


def _add_resnet(prefixes: dict[str, str], ours: str, theirs: str) -> None:
    prefixes |= {f"{ours}.{name}": f"{theirs}.{other}" for name, other in _IN_RESNET.items()}
