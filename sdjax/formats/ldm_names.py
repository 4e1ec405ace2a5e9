"""The names CompVis's (LDM's) code gives the U-Net's modules, beside diffusers'.

Both count the same blocks in the same order; LDM numbers them in one run through all levels, so its numbers follow from
how many blocks each level of our parameter tree has.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
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
    """LDM's name of a module given by diffusers' name; None if LDM has no such module."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        if prefix := prefixes.get(".".join(parts[:end])):
            return ".".join([prefix, *parts[end:]])
    return None


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
