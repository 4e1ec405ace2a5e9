"""Says what a file or folder is, from the names and shapes in it: a model, a LoRA or an embedding. No model is needed.

Of a model only the headers are read, of a LoRA also the values, for the norms.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats import lora_kohya, lora_peft
from sdjax.formats.diffusers_folder import read_folder
from sdjax.formats.embedding_file import FAMILIES, load_embedding
from sdjax.formats.families import CONTEXT_WIDTHS, SDXL
from sdjax.formats.lora_file import folder_file
from sdjax.formats.lora_layer import TorchAdapter, alpha_of, from_torch
from sdjax.formats.lora_lycoris import FORM_NAMES
from sdjax.formats.single_file import family_of, is_whole_model, split_parts
from sdjax.formats.weights_file import is_safetensors, read_tensors
from sdjax.lora import low_rank

_TARGET = re.compile(
    r"(attn\d_to_[a-z]+|self_attn_\w_proj|self_attn_out_proj|mlp_fc\d|ff_net_\d|proj_(?:in|out)|conv\d|conv_\w+|conv"
    r"|time_emb_proj|(?:in|out|emb)_layers_\d|skip_connection|op|linear_\d)(?:_\d|_proj)*$"
)
"""The end of a layer's name that says what it computes, without its place in the model."""


def describe(source: str | os.PathLike) -> dict[str, Any]:
    """What a file or folder is, as a table that JSON can hold.

    Every table has `kind` ("model", "LoRA" or "embedding"), `form`, `family`, `dtypes` and `metadata`. A model has
    `parts`; a LoRA `layers` with kind, rank, alpha and norm of each, their sums, and `words`; an embedding `words`.
    Raises DataError for a file that is damaged or of another kind.
    """
    path = Path(source)
    if path.is_dir() and (path / "model_index.json").exists():
        return _model_folder(path)
    if path.is_dir():
        path = folder_file(path)
    elif not path.exists():
        raise DataError(f"{path}: no such file or folder")
    tensors, metadata = read_tensors(path) if _holds_tensors(path) else ({}, {})
    try:
        if is_whole_model(tensors):
            family = family_of(tensors)
            return _model(family, "single file", split_parts(tensors, family), metadata)
        if groups := _lora_layers(tensors):
            return _lora(path, groups, tensors, metadata)
        words = _words(path, tensors)
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    widths = {width for word in words.values() for width in word["widths"].values()}
    families = ["SDXL"] if len(widths) > 1 else [FAMILIES.get(width, "") for width in widths]
    return {
        "kind": "embedding",
        "form": path.suffix.removeprefix("."),
        "family": families[0] or None,
        "dtypes": _dtypes(tensors.values()),
        "words": words,
        "metadata": dict(metadata),
    }


def _holds_tensors(path: Path) -> bool:
    """Whether the file is read as tensors by name. A1111's pickles of embeddings are not."""
    if is_safetensors(path):
        return True
    try:
        return bool(read_tensors(path).tensors)
    except DataError:
        return False


# ------------------------------------------------------------------------------------------------ models


def _model_folder(path: Path) -> dict[str, Any]:
    folder = read_folder(path)
    width = folder.configs["unet"].get("cross_attention_dim", 768)
    family = CONTEXT_WIDTHS.get(width[0] if isinstance(width, list) else width)
    parts = {part: folder.tensors(part) for part in folder.configs}
    return _model(family, "folder", parts, folder.metadata) | {
        "prediction_type": folder.scheduler.get("prediction_type", "epsilon")
    }


def _model(
    family: str | None, form: str, parts: Mapping[str, Mapping[str, np.ndarray]], metadata: Mapping[str, str]
) -> dict[str, Any]:
    first = next((tensor for name, tensor in parts["unet"].items() if name in _FIRST_CONVOLUTION), None)
    return {
        "kind": "model",
        "form": form,
        "family": family,
        "inpainting": first is not None and first.shape[1] == 9,
        "dtypes": _dtypes(tensor for tensors in parts.values() for tensor in tensors.values()),
        "parts": {
            part: {
                "tensors": len(tensors),
                "parameters": sum(tensor.size for tensor in tensors.values()),
                "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            }
            for part, tensors in parts.items()
        },
        "metadata": dict(metadata),
    }


_FIRST_CONVOLUTION = ("input_blocks.0.0.weight", "conv_in.weight")


# ------------------------------------------------------------------------------------------------ LoRAs


def _lora_layers(tensors: Mapping[str, np.ndarray]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(Part, name of a layer) -> the tensors of its adapter; empty for a file that is no LoRA."""
    groups: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)
    split = lora_kohya.split_key if lora_kohya.is_kohya(tensors) else lora_peft.split_key
    for key, tensor in tensors.items():
        if place := split(key):
            part, module, name = place
            groups[part, module][name] = tensor
    return groups


def _lora(
    path: Path,
    groups: Mapping[tuple[str, str], Mapping[str, np.ndarray]],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    kohya = lora_kohya.is_kohya(tensors)
    settings = {} if kohya else lora_peft.read_settings(metadata)
    rows = []
    for (part, module), parts in groups.items():
        kind, rank = _kind(parts), _rank(parts)
        alpha = alpha_of(parts, (part, module))
        scale = alpha / rank if alpha and rank else 1.0
        if not kohya and rank:
            scale = lora_peft.scale_of(settings, (part, module), rank, alpha)
            alpha = scale * rank
        try:
            norm = _norm(parts, scale, f"{part}.{module}")
        except (KeyError, ValueError) as error:
            raise DataError(f"{part}.{module}: tensors are missing or do not fit: {error}") from None
        rows.append({"part": part, "layer": module, "kind": kind, "rank": rank, "alpha": alpha, "norm": norm})
    bundled = any(key.startswith("bundle_emb.") for key in tensors)
    targets: dict[str, Counter] = defaultdict(Counter)
    for row in rows:
        match = _TARGET.search(row["layer"].replace(".", "_"))
        targets[row["part"]][match[1] if match else row["layer"]] += 1
    return {
        "kind": "LoRA",
        "form": "kohya" if kohya else "peft",
        "family": _family(groups, metadata),
        "dtypes": _dtypes(tensors.values()),
        "kinds": dict(Counter(row["kind"] for row in rows)),
        "ranks": dict(Counter(row["rank"] for row in rows if row["rank"])),
        "alphas": dict(Counter(row["alpha"] or row["rank"] for row in rows if row["rank"])),
        "targets": {part: dict(counts) for part, counts in targets.items()},
        "words": _words(path, tensors) if bundled else {},
        "metadata": dict(metadata),
        "layers": rows,
    }


def _kind(parts: Mapping[str, np.ndarray]) -> str:
    kinds = [name for start, name in FORM_NAMES.items() if any(key.startswith(start) for key in parts)]
    kind = kinds[0] if kinds else "unknown"
    if "magnitude" not in parts:
        return kind
    return "DoRA" if kind == "LoRA" else f"{kind} with DoRA"


def _rank(parts: Mapping[str, np.ndarray]) -> int | None:
    names = ("down", "hada_w1_b", "b2.weight", "lokr_w1_b", "lokr_w2_b")
    tensor = next((parts[name] for name in names if name in parts), None)
    return tensor.shape[0] if tensor is not None and tensor.ndim else None


def _norm(parts: Mapping[str, np.ndarray], scale: float, name: str) -> float | None:
    """The Frobenius norm of the change of a layer before any magnitude. None for forms that need the base's weights."""
    wide = {key: np.asarray(tensor, np.float32) for key, tensor in parts.items()}
    if {"down", "up"} <= parts.keys() and "lora_mid.weight" not in parts:
        down, up = wide["down"], wide["up"].reshape(len(wide["up"]), -1)
        flat = down.reshape(len(down), -1)
        layer = from_torch(TorchAdapter(flat, up, scale), (flat.shape[1], len(up)), name)
        return low_rank.norm(layer)
    if any(key.startswith(("hada_t", "lokr_t")) for key in parts) or not any(map(parts.__contains__, _DENSE)):
        return None
    if "hada_w1_a" in parts:
        one, two = (_product(wide[f"hada_w{i}_a"], wide[f"hada_w{i}_b"]) for i in "12")
        return abs(scale) * float(np.linalg.norm(one * two))
    for name in {"diff", "w_norm"} & parts.keys():
        return float(np.linalg.norm(wide[name]))
    whole = lambda i: f"lokr_w{i}" in wide
    factors = [wide[f"lokr_w{i}"] if whole(i) else _product(wide[f"lokr_w{i}_a"], wide[f"lokr_w{i}_b"]) for i in "12"]
    return abs(scale) * math.prod(float(np.linalg.norm(factor)) for factor in factors)


_DENSE = ("hada_w1_a", "diff", "w_norm", "lokr_w1", "lokr_w1_a")
"""Tensors of the forms, beside LoRA, whose norm follows from the file alone."""


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left @ right.reshape(len(right), -1)


def _family(groups: Mapping[tuple[str, str], Mapping[str, np.ndarray]], metadata: Mapping[str, str]) -> str | None:
    for (_, module), parts in groups.items():
        inputs = parts.get("down", parts.get("hada_w1_b"))
        if "attn2" in module and module.endswith("to_k") and inputs is not None and inputs.ndim >= 2:
            return CONTEXT_WIDTHS.get(inputs.shape[1])
    if any(part == "text_encoder_2" for part, _ in groups):
        return SDXL
    return lora_kohya.recorded_family(metadata)


# ------------------------------------------------------------------------------------------------ words


def _words(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Word -> the widths and norms of its vectors, by text model.

    tensors: those of the file, by which the error for a file of another kind names it.
    """
    try:
        words = load_embedding(path)
    except DataError:
        if tensors:
            family_of(tensors)
        raise
    return {
        word: {
            "vectors": len(next(iter(rows.values()))),
            "widths": {model: vectors.shape[1] for model, vectors in rows.items()},
            "norms": {model: np.linalg.norm(vectors, axis=1).tolist() for model, vectors in rows.items()},
        }
        for word, rows in words.items()
    }


def _dtypes(tensors: Iterable[np.ndarray]) -> dict[str, int]:
    """The number of tensors of each dtype."""
    return dict(Counter(str(tensor.dtype) for tensor in tensors))
