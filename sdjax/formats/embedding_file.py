"""Textual Inversion embeddings: the files of diffusers, A1111, kohya, OneTrainer and cloneofsimo -> rows by word.

A file holds one word, except cloneofsimo's, and except words bundled in a kohya LoRA (`bundle_emb.<word>.<key>`).
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.parameter_names import listing
from sdjax.formats.safetensors_file import is_floating, read_safetensors, save_safetensors
from sdjax.formats.torch_pickle import read_torch

Rows = dict[str, np.ndarray]
"""Text model (`text_encoder`, `text_encoder_2`) -> the vectors [n, D] of one word."""

_SUFFIXES = (".safetensors", ".sft", ".pt", ".bin", ".pth", ".ckpt")
_NAMELESS = {"*", "", "emb_params", "emp_params", "string_to_param"}
"""Keys that say nothing about the word."""
_BOTH = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))  # what SDXL's two models are called
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second text model"}
_BUNDLE = "bundle_emb."


def load_embedding(path: str | os.PathLike, widths: Mapping[str, int] | None = None) -> dict[str, Rows]:
    """An embedding file of any kind -> word -> text model -> rows [n, D] in float32.

    widths: of the model's text models, by name; they tell which of them a tensor belongs to. None: whatever width, the
    first text model unless the file says otherwise. The word is what the file
    calls it, else the file's own name; it never holds a path.
    Raises DataError for another model's embedding, a file without one, wrong shapes, NaN and Inf.
    """
    path = Path(path)
    try:
        found = _read(path)
        embeddings: dict[str, Rows] = {}
        for name, tensors in found.items():
            word = clean_word(name) or clean_word(path.stem) or "embedding"
            if word in embeddings:
                raise DataError(f"the word {word!r} is there twice")
            embeddings[word] = _assign(tensors, widths, word)
        return embeddings
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def save_embedding(
    path: str | os.PathLike, word: str, rows: Mapping[str, np.ndarray], *, dtype: Any = np.float32
) -> None:
    """Writes one word in diffusers' form, which A1111 and ComfyUI read too.

    rows: text model -> [n, D]: one tensor named as the word; for SDXL's two models `clip_l` and `clip_g`.
    """
    save_safetensors(path, _tensors(word, rows, word), {"format": "pt", "name": word}, dtype=dtype)


def bundle(embeddings: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors that carry words inside a kohya LoRA file, as A1111 and ComfyUI read them."""
    tensors = {}
    for word, rows in embeddings.items():
        if "." in word:
            raise DataError(f"the word {word!r}: a bundle's words cannot hold a dot; save it as a file of its own")
        own = _tensors(word, rows, "string_to_param.*")
        tensors |= {f"{_BUNDLE}{word}.{key}": tensor for key, tensor in own.items()}
    return tensors


def file_name(word: str) -> str:
    """`<plana>` -> `plana.safetensors`: letters, digits, `.`, `_` and `-` of the word alone."""
    stem = re.sub(r"[^\w.-]+", "-", word).strip(".-") or "embedding"
    return f"{stem}.safetensors"


def clean_word(name: str) -> str:
    """A word out of what a file calls it: no folders, no white space; empty where nothing is left."""
    name = re.split(r"[/\\]", name)[-1].strip()
    return "" if name in _NAMELESS or not name.strip(".") else re.sub(r"[\s\x00-\x1f]+", "_", name)


def _tensors(word: str, rows: Mapping[str, np.ndarray], single: str) -> dict[str, np.ndarray]:
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if len(rows) > 1 else dict.fromkeys(rows, single)
    if not rows or rows.keys() - {"text_encoder", "text_encoder_2"}:
        raise DataError(f"the word {word!r} has rows for {listing(rows) or 'no text model'}")
    tensors = {names[model]: np.asarray(own, np.float32) for model, own in rows.items()}
    counts = {len(own) if own.ndim == 2 else 0 for own in tensors.values()}
    if len(counts) > 1 or 0 in counts:
        raise DataError(f"the word {word!r} has rows {[list(own.shape) for own in tensors.values()]}, not [n, D] alike")
    if not all(np.isfinite(own).all() for own in tensors.values()):
        raise DataError(f"the word {word!r} holds NaN or Inf")
    return tensors


def _read(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Word, or "" if the file does not say -> tensors by the text model's name in the file, "" for a single one."""
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"not a kind of embedding file; known: {', '.join(_SUFFIXES)}")
    if path.suffix.lower() in (".safetensors", ".sft"):
        tensors, metadata = read_safetensors(path)
        named = [key for key in tensors if metadata.get(key) == "<embed>"]
        if named:  # cloneofsimo: beside a LoRA, its words marked
            return {key: {"": tensors[key]} for key in named}
        if any(key.startswith(_BUNDLE) for key in tensors):
            return _read_bundle(tensors)
        return _split(tensors, metadata.get("name", ""))
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise DataError(f"holds a {type(content).__name__}, not a table of tensors")
    if "string_to_param" in content:
        name = content.get("name")
        return _one(_unwrap(content["string_to_param"]), name if isinstance(name, str) else "")
    return _split({key: value for key, value in _unwrap(content).items() if isinstance(value, np.ndarray)}, "")


def _unwrap(table: Any) -> Mapping[str, Any]:
    """Early files hold a torch module, its tensors under `_parameters`."""
    table = table.get("_parameters", table) if isinstance(table, Mapping) else {}
    return {str(key): value for key, value in table.items()}


def _one(table: Mapping[str, Any], name: str) -> dict[str, dict[str, np.ndarray]]:
    tensors = {key: value for key, value in table.items() if isinstance(value, np.ndarray)}
    if len(tensors) != 1:
        raise DataError(f"string_to_param holds {len(tensors)} tensors where one is expected")
    ((key, tensor),) = tensors.items()
    return {name or key: {"": tensor}}


def _split(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, dict[str, np.ndarray]]:
    for both in _BOTH:
        if tensors.keys() & set(both):
            if tensors.keys() != set(both):
                raise DataError(f"holds {listing(sorted(tensors))} where {' and '.join(both)} are expected")
            return {name: {ours: tensors[key] for ours, key in zip(("clip_l", "clip_g"), both, strict=True)}}
    if not tensors:
        raise DataError("holds no tensors")
    foreign = lambda key: key.startswith(("unet:", "text_encoder:")) or ".lora_" in key
    if wrong := [key for key, tensor in tensors.items() if tensor.ndim not in (1, 2) or foreign(key)]:
        raise DataError(f"not an embedding file: it holds {listing(wrong)}")
    if len(tensors) == 1:
        ((key, tensor),) = tensors.items()
        return {key if clean_word(key) else name: {"": tensor}}
    return {key: {"": tensor} for key, tensor in tensors.items()}  # cloneofsimo: a tensor a word


def _read_bundle(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    words: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if key.startswith(_BUNDLE):
            word, _, part = key.removeprefix(_BUNDLE).partition(".")
            words[word]["*" if part.startswith("string_to_param.") else part] = tensor
    found = {}
    for word, parts in words.items():
        (own,) = _split(parts, "").values() if len(parts) == 1 or "clip_l" in parts else ({},)
        if not own:
            raise DataError(f"bundle_emb.{word} holds {listing(sorted(parts))}: one tensor, or clip_l and clip_g")
        found[word] = own
    return found


def _assign(tensors: Mapping[str, np.ndarray], widths: Mapping[str, int] | None, word: str) -> Rows:
    names = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    rows = {}
    for key, tensor in tensors.items():
        tensor = _to_float32(tensor, word)
        width = tensor.shape[1]
        if widths is None:
            rows[names.get(key, "text_encoder")] = tensor
            continue
        model = names.get(key) or next((name for name, own in widths.items() if own == width), None)
        if model is None or widths.get(model) != width:
            kind = "SDXL" if key else _FAMILIES.get(width, "another model")
            own = ", ".join(str(own) for own in widths.values())
            raise DataError(f"the word {word!r} was made for {kind} (width {width}); the model's width is {own}")
        rows[model] = tensor
    if len({len(own) for own in rows.values()}) > 1:
        raise DataError(f"the word {word!r} has {[len(own) for own in rows.values()]} vectors in its two text models")
    return rows


def _to_float32(tensor: np.ndarray, word: str) -> np.ndarray:
    if tensor.ndim not in (1, 2) or not tensor.size or not is_floating(tensor.dtype):
        raise DataError(f"the word {word!r} is a {tensor.dtype} of shape {list(tensor.shape)}, not [n, D] or [D]")
    tensor = np.atleast_2d(tensor.astype(np.float32))
    if not np.isfinite(tensor).all():
        raise DataError(f"the word {word!r} holds NaN or Inf")
    return tensor
