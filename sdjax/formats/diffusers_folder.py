"""A model folder in diffusers' layout: read from the disk or the hub, written whole or not at all."""

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
from sdjax.formats.parameter_names import listing, to_state_dict
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.weights_file import read_tensors
from sdjax.runtime.whole_file import sync_folder

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": _TEXT_CLASSES,
    "text_encoder_2": _TEXT_CLASSES,
}
# Latents alone, or latents with a mask and the masked image; others feed the U-Net what this library does not make.
INPUT_CHANNELS = (4, 9)
READABLE = "sdjax reads Stable Diffusion 1.x, 2.x and XL (base)"
_ABSENT = ("feature_extractor", "image_encoder", "safety_checker")  # never kept; diffusers wants them named


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds: everything small is read and checked, the weights are found and left for `tensors`."""

    path: Path
    model_index: dict[str, Any]
    configs: dict[str, dict[str, Any]]  # model -> config.json
    scheduler: dict[str, Any]  # scheduler_config.json
    tokenizers: dict[str, Path]  # "tokenizer" and, for SDXL, "tokenizer_2" -> folder
    weights: dict[str, tuple[Path, ...]]  # model -> its file, or its shards
    state: Mapping[str, Mapping[str, np.ndarray]] | None = None  # of a checkpoint file that holds all models

    def tensors(self, model: str) -> dict[str, np.ndarray]:
        """The state dict of one model, PyTorch names -> views read when touched."""
        if self.state is not None:
            return dict(self.state[model])
        tensors: dict[str, np.ndarray] = {}
        for file in self.weights[model]:
            part = read_tensors(file).tensors
            if twice := part.keys() & tensors.keys():
                raise DataError(f"{file}: tensors another shard holds too: {listing(sorted(twice))}")
            tensors |= part
        return tensors


def read_folder(source: str | os.PathLike, *, variant: str | None = None, revision: str | None = None) -> ModelFolder:
    """Reads a model folder, or a hub id, which is downloaded first (only what is needed) or found in the cache.

    variant: as in `diffusion_pytorch_model.fp16.safetensors`; a model without such a file gives its plain one, and a
    folder with nothing plain gives its fp16.
    Raises DataError for a folder that is missing, incomplete, or of another kind of model, which it names.
    """
    path = Path(source)
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{source}: a file where a model folder is expected")
        path = _download(str(source), variant, revision)
    index = _read_index(path)
    _check_kind(path, index)
    present = [name for name in MODELS if _class_of(index, name)]
    configs = {name: _read_json(path / name / "config.json") for name in present}
    channels = configs["unet"].get("in_channels", 4)
    if channels not in INPUT_CHANNELS:
        kind = f"a {index.get('_class_name')} whose U-Net takes {channels} channels"
        raise DataError(f"{path}: {kind}; {READABLE} with {' or '.join(map(str, INPUT_CHANNELS))}")
    tokenizers = {name: path / name for name in _TOKENIZERS if _class_of(index, name)}
    for name, folder in tokenizers.items():
        if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
            raise DataError(f"{path}: {name}/ has neither tokenizer.json nor vocab.json and merges.txt")
    return ModelFolder(
        path=path,
        model_index=index,
        configs=configs,
        scheduler=_read_json(path / "scheduler" / "scheduler_config.json"),
        tokenizers=tokenizers,
        weights={name: _find_weights(path / name, variant) for name in present},
    )


def save_folder(
    path: str | os.PathLike,
    *,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Mapping[str, Any]],
    tokenizers: Mapping[str, str | os.PathLike],
    scheduler: Mapping[str, Any],
    model_index: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> None:
    """Writes a folder diffusers loads: built beside `path`, put in its place once whole.

    configs, params: by model ("unet", "vae", "text_encoder", ...); tokenizers: name -> folder to copy; scheduler: its
    config, with `_class_name`; model_index: of the folder the model came from, for the pipeline's class and settings;
    dtype: of the weights written, None keeps theirs.
    An earlier model folder at `path` is replaced; anything else there is a DataError.
    """
    path = Path(path)
    if path.exists() and not (path / "model_index.json").exists() and (not path.is_dir() or any(path.iterdir())):
        raise DataError(f"{path}: exists and is not a model folder; it is left alone")
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.partial"):
        shutil.rmtree(leftover)  # of a save that was killed
    building = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        building.mkdir()
        for name, tree in params.items():
            _save_model(building / name, configs[name], name, tree, dtype)
        for name, folder in tokenizers.items():
            shutil.copytree(folder, building / name)
        _write_json(building / "scheduler" / "scheduler_config.json", _portable(scheduler))
        _write_json(building / "model_index.json", make_index(configs, tokenizers, scheduler, model_index or {}))
        _replace_folder(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _save_model(folder: Path, config: Mapping[str, Any], name: str, params: Mapping[str, Any], dtype: Any) -> None:
    default = {"_class_name": _CLASSES[name][0]} if name in ("unet", "vae") else {}
    config = default | _portable(config)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = np.dtype(dtype).name
    _write_json(folder / "config.json", config)
    text = name.startswith("text_encoder")
    tensors = to_state_dict(params, prefix="text_model." if text else "")
    save_safetensors(folder / f"{_stem(name, '.safetensors')}.safetensors", tensors, {"format": "pt"}, dtype=dtype)


def make_index(
    configs: Mapping[str, Any], tokenizers: Mapping[str, Any], scheduler: Mapping[str, Any], old: Mapping[str, Any]
) -> dict[str, Any]:
    """model_index.json of these parts; `old`: of the folder they came from, for its settings."""
    kind = "StableDiffusionXL" if "text_encoder_2" in configs else "StableDiffusion"
    kind += "InpaintPipeline" if configs["unet"].get("in_channels", 4) == 9 else "Pipeline"
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
            own = [item for item in _portable(configs[name]).get("architectures", []) if item in _TEXT_CLASSES]
            default = _TEXT_CLASSES[name == "text_encoder_2"]
            index[name] = ["transformers", own[0] if own else default]
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    index["scheduler"] = ["diffusers", _portable(scheduler)["_class_name"]]
    return dict(sorted(index.items()))


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under PyTorch's class names (nothing resolves the Flax ones any more), without where it came from."""
    config = {key: value for key, value in config.items() if key != "_name_or_path"}
    if "_class_name" in config:
        config["_class_name"] = config["_class_name"].removeprefix("Flax")
    if "architectures" in config:
        config["architectures"] = [name.removeprefix("Flax") for name in config["architectures"] or []]
    return config


def _replace_folder(new: Path, path: Path) -> None:
    """Puts `new` at `path`. A folder cannot be replaced in one rename: for a moment the old one stands beside it."""
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _read_index(path: Path) -> dict[str, Any]:
    if (path / "model_index.json").exists():
        return _read_json(path / "model_index.json")
    for name in ("config.json", "adapter_config.json"):
        if (path / name).exists():
            config = _read_json(path / name)
            kind = config.get("_class_name") or (config.get("architectures") or [config.get("peft_type")])[0]
            raise DataError(f"{path}: holds a single {kind or 'model'}, not a whole pipeline; {READABLE}")
    held = listing(sorted(item.name for item in path.iterdir())) or "nothing"
    raise DataError(f"{path}: no model_index.json, so not a diffusers model folder; it holds {held}")


def _check_kind(path: Path, index: Mapping[str, Any]) -> None:
    pipeline = index.get("_class_name", "pipeline of no name")
    if not _class_of(index, "unet"):
        raise DataError(f"{path}: a {pipeline}, which has no U-Net; {READABLE}")
    if not _class_of(index, "text_encoder") and _class_of(index, "text_encoder_2"):
        raise DataError(f"{path}: an SDXL refiner ({pipeline} without text_encoder); {READABLE}")
    for name in MODELS:
        own = _class_of(index, name)
        if own is None and name != "text_encoder_2":
            raise DataError(f"{path}: model_index.json names no {name}")
        if own is not None and own not in _CLASSES[name]:
            raise DataError(f"{path}: a {pipeline} whose {name} is a {own}, not {_CLASSES[name][0]}; {READABLE}")


def _class_of(index: Mapping[str, Any], name: str) -> str | None:
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
        return entry[1].removeprefix("Flax")
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
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


# Which weight file: safetensors before pickles, one file before shards.


def _stem(model: str, suffix: str) -> str:
    if model in ("unet", "vae"):
        return "diffusion_pytorch_model"
    return "model" if suffix == ".safetensors" else "pytorch_model"


def _choices(variant: str | None) -> Iterator[tuple[str, str]]:
    """(suffix, variant with its dot or "") in order of preference."""
    variants = ["" if variant is None else f".{variant}", ".fp16" if variant is None else ""]
    return ((suffix, name) for suffix in (".safetensors", ".bin") for name in variants)


def _find_weights(folder: Path, variant: str | None) -> tuple[Path, ...]:
    looked_for = []
    for suffix, name in _choices(variant):
        stem = _stem(folder.name, suffix)
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
        raise DataError(f"{index}: no table weight_map of tensor names to files")
    files = tuple(index.parent / name for name in sorted(set(places.values())))
    for file in files:
        if file.parent != index.parent or file.name in ("", ".", ".."):
            raise DataError(f"{index}: names a file outside its folder: {file.name}")
    if missing := [file.name for file in files if not file.exists()]:
        raise DataError(f"{index}: shards missing: {listing(missing)}")
    return files


# The hub.

_SMALL_FILES = [
    "model_index.json",
    *(f"{name}/config.json" for name in MODELS),
    *(f"{name}/*.index*.json" for name in MODELS),
    *(f"{name}/*" for name in _TOKENIZERS),
    "scheduler/scheduler_config.json",
]


def _download(repository: str, variant: str | None, revision: str | None) -> Path:
    """The snapshot's folder in huggingface_hub's cache; a broken download goes on where it stopped."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise DataError(f"{repository}: no such folder, and not a hub id of the form owner/name")
    path = snapshot(repository, _SMALL_FILES, revision)
    if not (path / "model_index.json").exists():
        raise DataError(f"{repository}: not a diffusers model on the hub: it has no model_index.json")
    index = _read_index(path)
    _check_kind(path, index)
    wanted = [name for name in MODELS if _class_of(index, name)]
    for suffix, name in _choices(variant):
        # One kind of file at a time: a repository often holds the same weights four times over.
        patterns = [f"{model}/{_stem(model, suffix)}{name}{suffix}" for model in wanted]
        patterns += [f"{model}/{_stem(model, suffix)}{name}-*-of-*{suffix}" for model in wanted]
        patterns += [f"{model}/{_stem(model, suffix)}-*-of-*{name}{suffix}" for model in wanted]
        snapshot(repository, patterns, path.name)
        wanted = [model for model in wanted if not _has_weights(path / model, suffix, name)]
        if not wanted:
            break
    return path


def _has_weights(folder: Path, suffix: str, variant: str) -> bool:
    stem = _stem(folder.name, suffix)
    return any(folder.glob(f"{stem}{variant}{suffix}")) or (folder / f"{stem}{suffix}.index{variant}.json").exists()


def snapshot(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    """Files of a hub repository in its cache's folder, downloaded where missing; DataError says why it cannot be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The bases of its HTTP error are those of the transport library, which changes from version to version.
    transport: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # pyright: ignore[reportAssignmentType]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        cause = "a gated model: accept its terms on its hub page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        cause = "no such folder, and no such model on the hub: check the name, or `hf auth login` if it is private"
    except RevisionNotFoundError:
        cause = f"the model has no revision {revision!r}: leave it out for the newest"
    except LocalEntryNotFoundError:
        cause = "no such folder, not in the cache, and the hub cannot be reached: go online once, or give a folder"
    except HFValidationError as error:
        cause = f"no such folder, and not a hub id: {_first_line(error)}"
    except (OSError, EntryNotFoundError, *transport) as error:
        cause = f"the download failed ({_first_line(error)}): run it again, it goes on where it stopped"
    raise DataError(f"{repository}: {cause}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
