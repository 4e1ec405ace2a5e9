"""The names CompVis's (LDM's) code gives modules of the U-Net and the VAE, and OpenCLIP's those of a text model.

diffusers and LDM count the U-Net's blocks in the same order; LDM numbers them in one run through all levels, so its
numbers follow from how many blocks each level of our parameter tree has.
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
_IN_OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection": "text_projection",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn.in_proj": "attn.in_proj",
}


def ldm_prefixes(unet: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' prefix -> LDM's, for every block of a U-Net parameter tree.

    `down_blocks.1.attentions.0` -> `input_blocks.4.1`; what stands under an attention has the same name in both.
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
    """LDM's name of a module given by diffusers' name; None if LDM has none. Inverted `prefixes` lead back."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if prefix := prefixes.get(".".join(parts[:end])):
            return ".".join([prefix, *parts[end:]])
    return None


def ldm_vae_name(module: str, levels: int) -> str:
    """LDM's name of a VAE's module given by diffusers' name; LDM counts the decoder's levels from the outside in."""
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
        # A VAE has a `norm` in its attention alone.
        if name.endswith(f".{theirs}") and (ours != "group_norm" or ".attentions." in name):
            return name.removesuffix(theirs) + ours
    return name


def unet_structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of a U-Net with a diffusers config, as far as `ldm_prefixes` looks at them."""
    levels = len(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    layers = list(layers) if isinstance(layers, (list, tuple)) else [layers] * levels
    tree: dict[str, Any] = {}
    for way, counts, step in (
        ("down", layers, "downsamplers_0"),
        ("up", [n + 1 for n in layers[::-1]], "upsamplers_0"),
    ):
        for level, (kind, count) in enumerate(zip(config[f"{way}_block_types"], counts, strict=True)):
            parts = ["resnets", "attentions"] if kind.startswith("CrossAttn") else ["resnets"]
            names = [f"{part}_{i}" for part in parts for i in range(count)]
            names += [step] if level < levels - 1 else []
            tree[f"{way}_blocks_{level}"] = {name: {} for name in names}
    return tree


def openclip_name(module: str) -> str:
    """OpenCLIP's name of a text model's module given by transformers' name (`in_proj`: q, k and v in one)."""
    layer, number, rest = re.fullmatch(r"(?:(encoder\.layers)\.(\d+)\.)?(.+)", module).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return (f"transformer.resblocks.{number}." if layer else "") + _IN_OPENCLIP[rest]


def _numbered(tree: Mapping[str, Any], stem: str) -> Iterator[tuple[int, Any]]:
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
