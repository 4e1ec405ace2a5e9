"""Reads a LoRA file of any style as a LoRA tree, and writes one."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import ConfigError, DataError
from sdjax.formats.embedding_file import bundle
from sdjax.formats.families import CONTEXT_WIDTHS
from sdjax.formats.lora_kohya import (
    context_width,
    is_kohya,
    kohya_hashes,
    kohya_metadata,
    read_kohya,
    write_kohya,
)
from sdjax.formats.lora_layer import from_torch, to_torch
from sdjax.formats.lora_lycoris import LycorisAdapter, from_lycoris, to_lycoris
from sdjax.formats.lora_peft import read_peft, write_peft
from sdjax.formats.parameter_names import listing
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.weights_file import read_tensors
from sdjax.lora import adaptable
from sdjax.trees import layers, nest

log = logging.getLogger(__name__)

STYLES = ("kohya", "peft")
PEFT_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives the LoRA in a folder."""
KOHYA_FILE = "lora.safetensors"
_PLAIN = {"down", "up", "scale", "magnitude"}
_FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.bin")


class LoraFile(NamedTuple):
    """adapters: part -> LoRA tree in float32. words: the names of words bundled in the file. metadata: by name."""

    adapters: dict[str, Any]
    words: list[str]
    metadata: dict[str, str]


def load_lora(path: str | os.PathLike, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The LoRA tree in a file; see `read_lora`. Logs a warning if the file also holds words."""
    file = read_lora(path, expected)
    if file.words:
        log.warning("%s also holds words: %s; --embedding or with_embedding reads them", path, ", ".join(file.words))
    return file.adapters


def read_lora(path: str | os.PathLike, expected: Mapping[str, Any]) -> LoraFile:
    """Reads a file of kohya's, LyCORIS's or PEFT's style.

    path: a file, or a folder that holds `pytorch_lora_weights.safetensors` or `.bin`. expected: the parameter trees, or
    their shapes, of the parts that the LoRA may adapt; every key must belong to one of their layers.
    Raises DataError for the LoRA of another model, another kind of network, unknown keys, wrong shapes, NaN and Inf.
    """
    path = Path(path)
    path = folder_file(path) if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise DataError(f"{path}: holds no tensors")
    if any(key.startswith(("unet:", "text_encoder:")) for key in tensors):
        raise DataError(f"{path}: a LoRA of cloneofsimo's format, which is not supported")
    try:
        _check_family(tensors, expected)
        adapters = read_kohya(tensors, expected) if is_kohya(tensors) else read_peft(tensors, metadata, expected)
        found = adaptable(expected)
        flat = {}
        for place, adapter in adapters.items():
            layer, name = found[place], "/".join(place)
            kernel = layer["kernel" if "kernel" in layer else "scale"].shape
            if isinstance(adapter, LycorisAdapter):
                flat[place] = from_lycoris(adapter, kernel, name)
            else:
                flat[place] = from_torch(adapter, kernel, name)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    words = sorted({key.split(".")[1] for key in tensors if key.startswith("bundle_emb.")})
    return LoraFile(nest(flat), words, dict(metadata))


def folder_file(folder: Path) -> Path:
    """The LoRA file in a folder. Raises DataError if there is none by diffusers' names."""
    files = [folder / name for name in _FOLDER_FILES if (folder / name).exists()]
    if not files:
        raise DataError(f"{folder}: holds neither {' nor '.join(_FOLDER_FILES)}")
    return files[0]


def is_plain(lora: Mapping[str, Any]) -> bool:
    """Whether all layers of an adapter tree are LoRA or DoRA, which PEFT's naming can hold."""
    return all(layer.keys() <= _PLAIN for _, layer in layers(lora, "scale"))


def save_lora(
    path: str | os.PathLike,
    lora: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    style: str = "kohya",
    embeddings: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a LoRA tree to a .safetensors file.

    expected: the parameter trees, or their shapes, of the whole model. They tell whether it is SDXL (`text_encoder_2`)
    and how kohya's style numbers its blocks. style: "kohya", which every program reads, or "peft" for diffusers, of
    which ComfyUI reads no attention layer of the U-Net. embeddings: word -> text model -> vectors of new words, bundled
    in a file of kohya's style for A1111 and ComfyUI; diffusers refuses the file, and `embedding_file.load_embedding`
    reads them. metadata: replaces or adds to the entries that the style records.
    DoRA in kohya's style is read rightly by LyCORIS and sdjax alone, which a warning says: A1111 and ComfyUI normalise
    in other ways, and kohya's scripts and diffusers drop the magnitudes. diffusers reads it in "peft".
    Raises ConfigError for a wrong style or embeddings with "peft", DataError for an empty LoRA, for layers that the
    model does not have, NaN and Inf (also those that `dtype` causes), and for LoHa and its like with "peft".
    """
    if style not in STYLES:
        raise ConfigError(f"LoRA style {style!r}: choices are {', '.join(STYLES)}")
    adapters = {
        place: to_torch(layer, "/".join(place)) if layer.keys() <= _PLAIN else to_lycoris(layer, place)
        for place, layer in layers(lora, "scale")
    }
    if stray := ["/".join(place) for place in adapters.keys() - adaptable(expected).keys()]:
        raise DataError(f"{path}: the LoRA adapts layers that the model does not have: {listing(stray)}")
    if not adapters:
        raise DataError(f"{path}: the LoRA adapts no layer, nothing to save")
    with np.errstate(over="ignore"):
        tensors = write_peft(adapters, dtype) if style == "peft" else write_kohya(adapters, expected, dtype)
    if style == "kohya" and any(name.endswith(".dora_scale") for name in tensors):
        log.warning(
            "%s: DoRA. A1111, ComfyUI, kohya's scripts and diffusers read it wrongly in this naming; LyCORIS and sdjax "
            "read it rightly. For the others merge it: sdjax convert MODEL NEW.safetensors --to single_file --lora %s",
            *(path, path),
        )
    if embeddings and style == "peft":
        raise ConfigError("a LoRA in PEFT's style cannot hold embeddings: save them as separate files")
    tensors |= {name: rows.astype(dtype) for name, rows in bundle(embeddings or {}).items()}
    if bad := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise DataError(f"{path}: NaN or Inf in the LoRA (as {np.dtype(dtype)}): {listing(bad)}")
    if style == "peft":
        records = {"format": "pt"} | dict(metadata or {})
    else:
        records = kohya_metadata(tensors, expected) | dict(metadata or {})
        records |= kohya_hashes(tensors, records)
    save_safetensors(path, tensors, records)


def _check_family(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> None:
    """Raises DataError naming the family of the LoRA if the model is of another. A list of keys would tell less."""
    width = context_width(expected)
    for key, tensor in tensors.items():
        halves = (
            "lora_down.weight",
            "lora_A.weight",
            "lora.down.weight",
            "to_k_lora.down.weight",
            "hada_w1_b",
            ".diff",
        )
        if "attn2" in key and "to_k" in key and key.endswith(halves) and tensor.ndim >= 2:
            if width is not None and tensor.shape[1] != width:
                raise DataError(f"made for {_family(tensor.shape[1])}; the model is {_family(width)}")
            return


def _family(width: int) -> str:
    return f"{CONTEXT_WIDTHS.get(width, 'a model')} (text width {width})"
