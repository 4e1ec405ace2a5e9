"""Model folders in diffusers' layout: reads them from the disk or the hub, and writes them."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.hub import snapshot
from sdjax.formats.parameter_names import listing, to_state_dict
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.weights_file import read_tensors
from sdjax.runtime import strict_json
from sdjax.runtime.whole_file import replacing_folder

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": _TEXT_CLASSES,
    "text_encoder_2": _TEXT_CLASSES,
}
# Latents alone, or latents with a mask and the masked image. sdjax makes no other input for a U-Net.
_INPUT_CHANNELS = (4, 9)
READABLE = "sdjax reads Stable Diffusion 1.x, 2.x and XL (base)"
# sdjax never keeps these parts, but diffusers expects their names in model_index.json.
_ABSENT = ("feature_extractor", "image_encoder", "safety_checker")


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds. Its small files are read and checked; `tensors` reads the weights later."""

    path: Path
    model_index: dict[str, Any]
    configs: dict[str, dict[str, Any]]  # part ("unet", "vae", "text_encoder", "text_encoder_2") -> config.json
    scheduler: dict[str, Any]  # scheduler_config.json
    tokenizers: dict[str, Path]  # "tokenizer" and, for SDXL, "tokenizer_2" -> folder
    weights: dict[str, tuple[Path, ...]]  # part -> the file of its weights, or the files of its shards
    # part -> tensors, of the parts whose file has other names than diffusers', or holds more than the part
    state: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the file that holds the U-Net, such as title and author in the form of ModelSpec."""
        return read_tensors(self.weights["unet"][0]).metadata

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """The state dict of a part: PyTorch's names -> arrays. An array is read from the disk when it is used."""
        if part in self.state:
            return dict(self.state[part])
        tensors: dict[str, np.ndarray] = {}
        for file in self.weights[part]:
            shard = read_tensors(file).tensors
            if repeated := shard.keys() & tensors.keys():
                raise DataError(f"{file}: holds tensors that another shard holds too: {listing(sorted(repeated))}")
            tensors |= shard
        return tensors


def read_folder(
    source: str | os.PathLike, *, variant: str | None = None, revision: str | None = None, weights: bool = True
) -> ModelFolder:
    """Reads a model folder, or a model on the hub, whose needed files are downloaded unless they are in the cache.

    source: a folder or a hub id. variant: of the weight files, such as "fp16" for
    `diffusion_pytorch_model.fp16.safetensors`. For a part without files of this variant the plain files are used.
    Without a variant the plain files are used, or fp16 where there are no plain ones.
    weights: whether the files of the weights must be there. If not, none is downloaded, and `weights` is empty.
    Raises DataError for a folder that is missing, incomplete, or of another kind of model, which the error names.
    """
    path = _local(source) or _download(str(source), variant, revision, weights)
    index = _read_index(path)
    _check_kind(path, index)
    present = [name for name in _PARTS if _class_of(index, name)]
    configs = {name: _read_json(path / name / "config.json") for name in present}
    check_input_channels(configs["unet"], f"{path}: a {index.get('_class_name')}")
    tokenizers = {name: path / name for name in _TOKENIZERS if _class_of(index, name)}
    for name, folder in tokenizers.items():
        if not has_tokenizer(folder):
            raise DataError(f"{path}: {name}/ has neither tokenizer.json nor vocab.json and merges.txt")
    return ModelFolder(
        path=path,
        model_index=index,
        configs=configs,
        scheduler=_read_json(path / "scheduler" / "scheduler_config.json"),
        tokenizers=tokenizers,
        weights={name: _find_weights(path / name, name, variant) for name in present} if weights else {},
    )


def read_vae_folder(
    source: str | os.PathLike, *, variant: str | None = None, weights: bool = True
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Reads the config of an autoencoder and finds the files of its weights; without `weights` none are needed.

    source: the folder of an autoencoder or of a model that has one, or the hub id of either. variant: see
    `read_folder`. Raises DataError for a folder that is missing, incomplete, or of something else.
    """
    path = _local(source)
    if path is None:
        path = _snapshot(str(source), ["config.json", "vae/config.json"])
    place = "vae/" if (path / "vae" / "config.json").exists() else ""
    config = _read_json(path / place / "config.json")
    kind = str(config.get("_class_name")).removeprefix("Flax")
    if kind not in _CLASSES["vae"]:
        raise DataError(f"{source}: {place}config.json is that of a {kind}, not of an {_CLASSES['vae'][0]}")
    if not weights:
        return config, ()
    if not Path(source).is_dir():
        _download_weights(str(source), path, {"vae": place}, variant)
    return config, _find_weights(path / place, "vae", variant)


def _local(source: str | os.PathLike) -> Path | None:
    """The folder on the disk; None for a hub id."""
    path = Path(source)
    if path.exists() and not path.is_dir():
        raise DataError(f"{source}: a file where a model folder is expected")
    return path if path.is_dir() else None


def save_folder(
    path: str | os.PathLike,
    *,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Mapping[str, Any]],
    tokenizers: Mapping[str, str | os.PathLike],
    scheduler: Mapping[str, Any],
    model_index: Mapping[str, Any] | None = None,
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that diffusers loads. `path` is either complete or as it was before.

    configs, params: part ("unet", "vae", "text_encoder", ...) -> config and parameter tree. tokenizers: name -> folder
    to copy. scheduler: the config of the scheduler, with `_class_name`. model_index: of the folder that the model came
    from, for the class and the settings of the pipeline. dtype: of the weights written; None keeps each array's dtype.
    metadata: entries for the header of the U-Net's file; a folder has no other place for them.
    A model folder that is at `path` is replaced. Raises DataError if anything else is there, except an empty folder.
    """
    path = Path(path)
    if path.exists() and not (path / "model_index.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not a model folder; it is left alone")
    with replacing_folder(path) as folder:
        for name, tree in params.items():
            records = dict(metadata or {}) if name == "unet" else {}
            _save_part(folder / name, configs[name], name, tree, dtype, records | {"format": "pt"})
        for name, tokenizer in tokenizers.items():
            shutil.copytree(tokenizer, folder / name)
        _write_json(folder / "scheduler" / "scheduler_config.json", _portable(scheduler))
        _write_json(folder / "model_index.json", make_index(configs, tokenizers, scheduler, model_index or {}))


def _save_part(
    folder: Path,
    config: Mapping[str, Any],
    name: str,
    params: Mapping[str, Any],
    dtype: Any,
    metadata: Mapping[str, str],
) -> None:
    default = {"_class_name": _CLASSES[name][0]} if name in ("unet", "vae") else {}
    config = default | _portable(config)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = np.dtype(dtype).name
    _write_json(folder / "config.json", config)
    text = name.startswith("text_encoder")
    tensors = to_state_dict(params, prefix="text_model." if text else "")
    save_safetensors(folder / f"{_stem(name, '.safetensors')}.safetensors", tensors, metadata, dtype=dtype)


def make_index(
    configs: Mapping[str, Any], tokenizers: Mapping[str, Any], scheduler: Mapping[str, Any], old: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of model_index.json for these parts. old: that of the folder they came from, for its settings."""
    kind = "StableDiffusionXL" if "text_encoder_2" in configs else "StableDiffusion"
    kind += "InpaintPipeline" if configs["unet"].get("in_channels", 4) == 9 else ""
    kind = kind if kind.endswith("Pipeline") else f"{kind}{'' if 'text_encoder' in configs else 'Img2Img'}Pipeline"
    settings = {key: value for key, value in old.items() if not isinstance(value, list)}
    index = {"_class_name": kind, "_diffusers_version": "0.42.0"} | _portable(settings)
    index |= {name: [None, None] for name in _ABSENT}
    if kind.startswith("StableDiffusionXL"):
        index.setdefault("force_zeros_for_empty_prompt", True)
        del index["safety_checker"]
    else:
        index["requires_safety_checker"] = False
    index |= {name: ["diffusers", _CLASSES[name][0]] for name in ("unet", "vae")}
    for name in ("text_encoder", "text_encoder_2"):
        if name in configs:
            classes = [item for item in _portable(configs[name]).get("architectures", []) if item in _TEXT_CLASSES]
            default = _TEXT_CLASSES[name == "text_encoder_2"]
            index[name] = ["transformers", classes[0] if classes else default]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index["scheduler"] = ["diffusers", _portable(scheduler)["_class_name"]]
    return dict(sorted(index.items()))


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its origin, and with PyTorch's class names for Flax's, which nothing loads any more."""
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if "_class_name" in config:
        config["_class_name"] = config["_class_name"].removeprefix("Flax")
    if "architectures" in config:
        config["architectures"] = [name.removeprefix("Flax") for name in config["architectures"] or []]
    return config


def check_input_channels(unet: Mapping[str, Any], kind: str) -> None:
    """Raises DataError for the config of a U-Net with an unknown number of input channels. kind: what it belongs to."""
    channels = unet.get("in_channels", 4)
    if channels not in _INPUT_CHANNELS:
        choices = " or ".join(map(str, _INPUT_CHANNELS))
        raise DataError(f"{kind} whose U-Net takes {channels} channels; {READABLE} with {choices}")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    return (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()


def _read_index(path: Path) -> dict[str, Any]:
    if (path / "model_index.json").exists():
        return _read_json(path / "model_index.json")
    for name in ("config.json", "adapter_config.json"):
        if (path / name).exists():
            config = _read_json(path / name)
            kind = config.get("_class_name") or (config.get("architectures") or [config.get("peft_type")])[0]
            raise DataError(f"{path}: holds a single {kind or 'model'}, not a whole pipeline; {READABLE}")
    content = listing(sorted(item.name for item in path.iterdir())) or "nothing"
    raise DataError(f"{path}: no model_index.json, so not a diffusers model folder; it holds {content}")


def _check_kind(path: Path, index: Mapping[str, Any]) -> None:
    pipeline = index.get("_class_name", "pipeline of no name")
    if not _class_of(index, "unet"):
        raise DataError(f"{path}: a {pipeline}, which has no U-Net; {READABLE}")
    texts = [name for name in ("text_encoder", "text_encoder_2") if _class_of(index, name)]  # a refiner has the second
    for name in _PARTS:
        part = _class_of(index, name)
        if part is None and not (name.startswith("text_encoder") and texts):
            raise DataError(f"{path}: model_index.json names no {name}")
        if part is not None and part not in _CLASSES[name]:
            raise DataError(f"{path}: a {pipeline} whose {name} is a {part}, not {_CLASSES[name][0]}; {READABLE}")


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    """The class of a part in model_index.json; None for a part that the model does not have."""
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1].removeprefix("Flax")
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = strict_json.parse(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: missing") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


# The choice among weight files: safetensors before pickles, one file before shards.


def _stem(part: str, suffix: str) -> str:
    if part in ("unet", "vae"):
        return "diffusion_pytorch_model"
    return "model" if suffix == ".safetensors" else "pytorch_model"


def _choices(variant: str | None) -> Iterator[tuple[str, str]]:
    """Yields (suffix, "" or "." and the variant), the preferred ones first."""
    variants = ["" if variant is None else f".{variant}", ".fp16" if variant is None else ""]
    return ((suffix, name) for suffix in (".safetensors", ".bin") for name in variants)


def _find_weights(folder: Path, part: str, variant: str | None) -> tuple[Path, ...]:
    looked_for = []
    for suffix, name in _choices(variant):
        stem = _stem(part, suffix)
        single, index = folder / f"{stem}{name}{suffix}", folder / f"{stem}{suffix}.index{name}.json"
        if single.exists():
            return (single,)
        if index.exists():
            return _read_shards(index)
        looked_for += [single.name, index.name]
    raise DataError(f"{folder}: no weights; looked for {listing(looked_for)}")


def _read_shards(index: Path) -> tuple[Path, ...]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise DataError(f"{index}: no object weight_map of tensor names to files")
    files = tuple(index.parent / name for name in sorted(set(places.values())))
    for file in files:
        if file.parent != index.parent or file.name in ("", ".", ".."):
            raise DataError(f"{index}: names a file outside its folder: {file.name}")
    if missing := [file.name for file in files if not file.exists()]:
        raise DataError(f"{index}: shards missing: {listing(missing)}")
    return files


# Models on the hub.

_SMALL_FILES = [
    "model_index.json",
    *(f"{name}/config.json" for name in _PARTS),
    *(f"{name}/*.index*.json" for name in _PARTS),
    *(f"{name}/*" for name in _TOKENIZERS),
    "scheduler/scheduler_config.json",
]


def _download(repository: str, variant: str | None, revision: str | None, weights: bool) -> Path:
    """Downloads the needed files of a model on the hub. Returns their folder in the cache."""
    path = _snapshot(repository, _SMALL_FILES, revision)
    if not (path / "model_index.json").exists():
        raise DataError(f"{repository}: not a diffusers model on the hub: it has no model_index.json")
    index = _read_index(path)
    _check_kind(path, index)
    if weights:
        _download_weights(repository, path, {name: f"{name}/" for name in _PARTS if _class_of(index, name)}, variant)
    return path


def _snapshot(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise DataError(f"{repository}: no such folder, and not a hub id of the form owner/name")
    return snapshot(repository, patterns, revision)


def _download_weights(repository: str, path: Path, places: Mapping[str, str], variant: str | None) -> None:
    """Downloads the weights of parts. path: of the small files in the cache. places: part -> its folder with a `/`."""
    wanted = dict(places)
    for suffix, name in _choices(variant):
        # One kind of file at a time, because a repository often holds the same weights in four kinds.
        stems = [place + _stem(part, suffix) for part, place in wanted.items()]
        ends = (f"{name}{suffix}", f"{name}-*-of-*{suffix}", f"-*-of-*{name}{suffix}")
        snapshot(repository, [stem + end for stem in stems for end in ends], path.name)
        wanted = {part: place for part, place in wanted.items() if not _has_weights(path / place, part, suffix, name)}
        if not wanted:
            break


def _has_weights(folder: Path, part: str, suffix: str, variant: str) -> bool:
    stem = _stem(part, suffix)
    return any(folder.glob(f"{stem}{variant}{suffix}")) or (folder / f"{stem}{suffix}.index{variant}.json").exists()
