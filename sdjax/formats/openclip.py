"""Converts OpenCLIP's text model, which SD2 and SDXL have in single files, to the names of transformers and back.

Two layouts differ too: OpenCLIP keeps the projections of queries, keys and values in one tensor, and `text_projection`
transposed.
"""

import re
from collections.abc import Mapping

import numpy as np

_OUTSIDE = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection": "text_projection",
}
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "self_attn": "attn",  # its in_proj, of queries, keys and values together
}
# OpenCLIP keeps these as parameters of the model, so their names do not end in `.weight`.
_BARE = ("positional_embedding", "text_projection")


def from_openclip(tensors: Mapping[str, np.ndarray], *, sd2: bool) -> dict[str, np.ndarray]:
    """The tensors of a text model by the names of transformers.

    sd2: leave out the projection and the last block, which Stable Diffusion 2 does not use.
    """
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    width = tensors["positional_embedding"].shape[-1] if "positional_embedding" in tensors else 0
    # Some files of SD2 hold 23 of the 24 blocks.
    count = 23 if sd2 and width == 1024 else len(blocks) - sd2
    modules = {name: module for module, name in _modules(count).items()}
    converted: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        block = re.match(r"transformer\.resblocks\.(\d+)\.", key)
        unused = key == "text_projection" or (block is not None and int(block[1]) >= count)
        if key in ("logit_scale", "attn_mask") or (sd2 and unused):
            continue
        module, _, leaf = key.rpartition(".")
        if key in _BARE:
            converted[f"{modules[key]}.weight"] = tensor.T if key == "text_projection" else tensor
        elif leaf in ("in_proj_weight", "in_proj_bias"):
            for letter, third in zip("qkv", np.split(tensor, 3), strict=True):
                converted[f"{modules.get(module, module)}.{letter}_proj.{leaf.removeprefix('in_proj_')}"] = third
        else:
            converted[f"{modules.get(module, module)}.{leaf}"] = tensor
    return converted


def to_openclip(tensors: Mapping[str, np.ndarray], *, sd2: bool) -> dict[str, np.ndarray]:
    """The inverse of `from_openclip`.

    sd2: add a projection and a spare last block, which loaders of Stable Diffusion 2 expect and never use.
    """
    count = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers."))
    names = _modules(count)
    converted: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        attention, _, projection = module.rpartition(".")
        if projection in ("k_proj", "v_proj"):
            continue
        if projection == "q_proj":
            thirds = [tensors[f"{attention}.{letter}_proj.{leaf}"] for letter in "qkv"]
            converted[f"{names[attention]}.in_proj_{leaf}"] = np.concatenate(thirds)
        elif names[module] in _BARE:
            converted[names[module]] = tensor.T if module == "text_projection" else tensor
        else:
            converted[f"{names[module]}.{leaf}"] = tensor
    converted["logit_scale"] = np.array(np.log(100.0), np.float32)
    if sd2:
        width = tensors["embeddings.token_embedding.weight"].shape[1]
        converted["text_projection"] = np.eye(width, dtype=np.float32)
        last, spare = f"transformer.resblocks.{count - 1}.", f"transformer.resblocks.{count}."
        converted |= {spare + key.removeprefix(last): copy for key, copy in converted.items() if key.startswith(last)}
    return converted


def _modules(blocks: int) -> dict[str, str]:
    """Name of each module in transformers -> its name in OpenCLIP."""
    inside = {
        f"encoder.layers.{i}.{ours}": f"transformer.resblocks.{i}.{theirs}"
        for i in range(blocks)
        for ours, theirs in _IN_BLOCK.items()
    }
    return _OUTSIDE | inside
