"""Textual Inversion files of diffusers, A1111, kohya, OneTrainer and cloneofsimo: word -> its vectors.

A file holds one word. Files of cloneofsimo hold several, and so do LoRA files of kohya's style with bundled words
(`bundle_emb.<word>.<key>`).
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.families import SD1, SD2
from sdjax.formats.parameter_names import listing
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.formats.torch_file import read_torch
from sdjax.formats.weights_file import SUFFIXES, is_safetensors, to_float32

Rows = dict[str, np.ndarray]
"""Text model (`text_encoder`, `text_encoder_2`) -> the vectors [n, D] of one word."""

_NAMELESS = {"*", "", "emb_params", "emp_params", "string_to_param"}
"""Keys that do not tell the word."""
TEXT_MODELS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""Name of the tensor in a file for SDXL -> text model."""
_BOTH = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))  # names of SDXL's two text models in files
FAMILIES = {768: SD1, 1024: SD2, 1280: "SDXL's second text model"}
"""Width of a single tensor -> the model that it was made for."""
_BUNDLE = "bundle_emb."


def load_embedding(path: str | os.PathLike, widths: Mapping[str, int] | None = None) -> dict[str, Rows]:
    """The words of an embedding file of any kind: word -> text model -> vectors [n, D] in float32.

    widths: text model -> width D. The width of a tensor tells which text model it belongs to. With None any width is
    accepted, and a tensor belongs to the first text model unless the file says otherwise.
    A word is the name in the file or else the name of the file, and never contains a folder.
    Raises DataError for the embedding of another model, a file without one, wrong shapes, NaN and Inf.
    """
    path = Path(path)
    try:
        embeddings: dict[str, Rows] = {}
        for name, tensors in _read(path).items():
            word = clean_word(name) or clean_word(path.stem) or "embedding"
            if word in embeddings:
                raise DataError(f"holds the word {word!r} twice")
            embeddings[word] = _assign(tensors, widths, word)
        return embeddings
    except DataError as error:
        raise DataError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None


def save_embedding(
    path: str | os.PathLike,
    word: str,
    rows: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes one word in the form of diffusers, which A1111 and ComfyUI also read.

    rows: text model -> vectors [n, D]. The file holds one tensor with the word as its name, or for SDXL's two text
    models the tensors `clip_l` and `clip_g`. metadata: more entries beside the word.
    """
    records = {**(metadata or {}), "format": "pt", "name": word}
    save_safetensors(path, _tensors(word, rows, word), records, dtype=dtype)


def bundle(embeddings: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors of words bundled in a LoRA file of kohya's style, where A1111 and ComfyUI find them."""
    tensors = {}
    for word, rows in embeddings.items():
        if "." in word:
            raise DataError(f"the word {word!r}: the words of a bundle cannot hold a dot; save it as a separate file")
        for key, tensor in _tensors(word, rows, "string_to_param.*").items():
            tensors[f"{_BUNDLE}{word}.{key}"] = tensor
    return tensors


def file_name(word: str) -> str:
    """The file name of a word, of letters, digits, `.`, `_` and `-` only: `<plana>` -> `plana.safetensors`."""
    stem = re.sub(r"[^\w.-]+", "-", word).strip(".-") or "embedding"
    return f"{stem}.safetensors"


def clean_word(name: str) -> str:
    """The word of a name in a file, without folders and white space; empty if the name does not tell the word."""
    name = re.split(r"[/\\]", name)[-1].strip()
    return "" if name in _NAMELESS or not name.strip(".") else re.sub(r"[\s\x00-\x1f]+", "_", name)


def _tensors(word: str, rows: Mapping[str, np.ndarray], single: str) -> dict[str, np.ndarray]:
    """The tensors of a word by their names in a file. single: the name for a model with one text model."""
    names = {model: name for name, model in TEXT_MODELS.items()}
    if not rows or rows.keys() - names.keys():
        raise DataError(f"the word {word!r} has vectors for {listing(rows) or 'no text model'}")
    names = names if len(rows) > 1 else dict.fromkeys(rows, single)
    tensors = {names[model]: np.asarray(vectors, np.float32) for model, vectors in rows.items()}
    counts = {len(vectors) if vectors.ndim == 2 else 0 for vectors in tensors.values()}
    if len(counts) > 1 or 0 in counts:
        shapes = [list(vectors.shape) for vectors in tensors.values()]
        raise DataError(f"the word {word!r} has vectors of shape {shapes}; expected [n, D] with the same n")
    if not all(np.isfinite(vectors).all() for vectors in tensors.values()):
        raise DataError(f"the word {word!r} holds NaN or Inf")
    return tensors


def _read(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Word -> tensors of the two text models, `clip_l` and `clip_g`, or of a single one under "".

    The word is "" if the file does not tell it.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"not a kind of embedding file; known: {', '.join(SUFFIXES)}")
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        marked = [key for key in tensors if metadata.get(key) == "<embed>"]
        if marked:  # cloneofsimo's LoRA files with words
            return {key: {"": tensors[key]} for key in marked}
        if any(key.startswith(_BUNDLE) for key in tensors):
            return _read_bundle(tensors)
        return _split(tensors, metadata.get("name", ""))
    content = read_torch(path)
    if not isinstance(content, Mapping):
        raise DataError(f"holds a {type(content).__name__}, not a dict of tensors")
    if "string_to_param" in content:
        name = content.get("name")
        return _read_a1111(_unwrap(content["string_to_param"]), name if isinstance(name, str) else "")
    return _split(_unwrap(content), "")


def _unwrap(content: Any) -> dict[str, np.ndarray]:
    """The tensors of a dict. Early files hold a torch module, whose tensors are under `_parameters`."""
    content = content.get("_parameters", content) if isinstance(content, Mapping) else {}
    return {str(key): value for key, value in content.items() if isinstance(value, np.ndarray)}


def _read_a1111(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, dict[str, np.ndarray]]:
    if len(tensors) != 1:
        raise DataError(f"string_to_param holds {len(tensors)} tensors where one is expected")
    ((key, tensor),) = tensors.items()
    return {name or key: {"": tensor}}


def _split(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, dict[str, np.ndarray]]:
    """See `_read`. name: the word in the metadata."""
    for both in _BOTH:
        if tensors.keys() & set(both):
            if tensors.keys() != set(both):
                raise DataError(f"holds {listing(sorted(tensors))} where {' and '.join(both)} are expected")
            return {name: {ours: tensors[key] for ours, key in zip(TEXT_MODELS, both, strict=True)}}
    if not tensors:
        raise DataError("holds no tensors")
    foreign = lambda key: key.startswith(("unet:", "text_encoder:")) or ".lora_" in key
    if wrong := [key for key, tensor in tensors.items() if tensor.ndim not in (1, 2) or foreign(key)]:
        raise DataError(f"not an embedding file: it holds {listing(wrong)}")
    if len(tensors) == 1:
        ((key, tensor),) = tensors.items()
        return {key if clean_word(key) else name: {"": tensor}}
    return {key: {"": tensor} for key, tensor in tensors.items()}  # cloneofsimo: one tensor for each word


def _read_bundle(tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    words: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if key.startswith(_BUNDLE):
            word, _, name = key.removeprefix(_BUNDLE).partition(".")
            words[word]["*" if name.startswith("string_to_param.") else name] = tensor
    for word, group in words.items():
        if len(group) != 1 and "clip_l" not in group:
            raise DataError(f"bundle_emb.{word} holds {listing(sorted(group))}: one tensor, or clip_l and clip_g")
    return {word: next(iter(_split(group, "").values())) for word, group in words.items()}


def _assign(tensors: Mapping[str, np.ndarray], widths: Mapping[str, int] | None, word: str) -> Rows:
    """The vectors of a word by text model. tensors: see `_read`. widths: see `load_embedding`."""
    rows: Rows = {}
    for key, tensor in tensors.items():
        if tensor.ndim not in (1, 2) or not tensor.size:
            raise DataError(f"the word {word!r} is a tensor of shape {list(tensor.shape)}; expected [n, D] or [D]")
        vectors = np.atleast_2d(to_float32(tensor, f"the word {word!r}"))
        width = vectors.shape[1]
        if widths is None:
            rows[TEXT_MODELS.get(key, "text_encoder")] = vectors
            continue
        model = TEXT_MODELS.get(key) or next((name for name, size in widths.items() if size == width), None)
        if model is None or widths.get(model) != width:
            kind = "SDXL" if key else FAMILIES.get(width, "another model")
            expected = ", ".join(map(str, widths.values()))
            raise DataError(f"the word {word!r} was made for {kind} (width {width}); the model's width is {expected}")
        rows[model] = vectors
    counts = [len(vectors) for vectors in rows.values()]
    if len(set(counts)) > 1:
        raise DataError(f"the word {word!r} has {counts} vectors in its two text models")
    return rows
