"""A whole model in one file with CompVis' names (LDM), as A1111 and ComfyUI keep models: reads and writes it.

Such a file holds no tokenizers and no configs. sdjax writes the configs into the metadata; for files of other programs
`ldm_config` infers them.
"""

import atexit
import functools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import ConfigError, DataError
from sdjax.formats.diffusers_folder import READABLE, ModelFolder, check_input_channels, has_tokenizer, make_index
from sdjax.formats.families import ARCHITECTURES, CONTEXT_WIDTHS, REFINER, SD1, SD2, SDXL
from sdjax.formats.hub import snapshot
from sdjax.formats.ldm_config import infer_configs, scheduler_config
from sdjax.formats.ldm_names import ldm_name, ldm_prefixes, ldm_vae_name, unet_structure, vae_name
from sdjax.formats.openclip import from_openclip, to_openclip
from sdjax.formats.parameter_names import listing, to_state_dict
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.torch_file import read_torch
from sdjax.formats.weights_file import SUFFIXES as SUFFIXES
from sdjax.formats.weights_file import is_safetensors, read_tensors
from sdjax.runtime import strict_json

log = logging.getLogger(__name__)

TOKENIZER = "openai/clip-vit-large-patch14"
"""The repository on the hub whose tokenizer every Stable Diffusion uses."""
VOCABULARY = 49408
"""Number of words of that tokenizer."""
_GIVE_TOKENIZER = "give its folder with --tokenizer DIR, or tokenizer= in Python"
_TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
_CONFIGS = "sdjax.configs"
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_UNET = "model.diffusion_model."
_VAE = ("first_stage_model.", "vae.")
_TEXT = {
    SD1: {"text_encoder": ("cond_stage_model.transformer.", False)},
    SD2: {"text_encoder": ("cond_stage_model.model.", True)},
    SDXL: {
        "text_encoder": ("conditioner.embedders.0.transformer.", False),
        "text_encoder_2": ("conditioner.embedders.1.model.", True),
    },
    REFINER: {"text_encoder_2": ("conditioner.embedders.0.model.", True)},
}
"""Family -> text model -> prefix of its names, and whether the names are OpenCLIP's."""
_PADDING = {
    SD1: {"tokenizer": None},
    SD2: {"tokenizer": "!"},
    SDXL: {"tokenizer": None, "tokenizer_2": "!"},
    REFINER: {"tokenizer_2": "!"},
}
"""Family -> tokenizer -> the word it pads with; None for the one that the tokenizer names itself."""
# Beginning of a tensor's name -> the kind of file that holds it. The second kinds are looked for in files without a
# whole U-Net.
_FOREIGN = {
    r"model\.diffusion_model\.joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"edm_mean|edm_vpred\.": "a model of the EDM formulation (Playground 2.5, CosXL)",
    r"control_model\.|input_hint_block\.|controlnet_": "a ControlNet",
}
_PARTIAL = {
    r"lora_(unet|te\d?)_|.*\.lora_[AB]\.|.*[._]lora\.(down|up)\.|unet:": "a LoRA, which goes on top of a model",
    r"string_to_param|em[bp]_params$|clip_[lg]$|<.*>$": "an embedding, which goes on top of a model",
    r"(unet\.)?(down|mid|up)_blocks?\.": "a U-Net alone by diffusers' names: give the model's folder",
    r"(encoder|decoder)\.(conv_in|mid)|first_stage_model\.": "a VAE alone",
    r"(text_model\.)?(encoder\.layers|embeddings)\.|cond_stage_model\.": "a text model alone",
}


def read_single_file(
    path: str | os.PathLike, *, tokenizer: str | os.PathLike | None = None, prediction_type: str = ""
) -> ModelFolder:
    """Reads a single file as if it were a model folder. The weights are read from the disk when they are used.

    tokenizer: the folder of a tokenizer, or of a model that has one (`tokenizer/`, `tokenizer_2/`). By default the
    tokenizer of Stable Diffusion, from the hub or its cache.
    prediction_type: "epsilon" or "v_prediction", by default that of the file. The shapes of SD2 do not show it, so SD2
    counts as "v_prediction" unless it is for inpainting, or the metadata or a training step of 875000 (SD2-base's) tell
    otherwise.
    Averages over the training (`model_ema.*`) and buffers are left out.
    Raises DataError for a file that is damaged or of another kind, which the error names. Raises ConfigError for a
    wrong prediction_type.
    """
    path = Path(path)
    if prediction_type and prediction_type not in _PREDICTIONS.values():
        raise ConfigError(f"prediction_type = {prediction_type!r}: choices are epsilon, v_prediction")
    tensors, metadata = read_tensors(path)
    try:
        family = family_of(tensors)
        parts = split_parts(tensors, family)
        if recorded := _recorded_configs(metadata):
            configs, scheduler = recorded
        else:
            prediction = prediction_type or _prediction_type(path, family, tensors, metadata)
            configs = infer_configs(family, parts, prediction)
            scheduler = scheduler_config(family, prediction, zero_terminal_snr="ztsnr" in tensors)
        if prediction_type:
            scheduler = {**scheduler, "prediction_type": prediction_type}
        check_input_channels(configs["unet"], f"a {family} model")
        prefixes = {ldm: ours for ours, ldm in ldm_prefixes(unet_structure(configs["unet"])).items()}
        levels = _levels(configs)
        parts["unet"] = renamed(parts["unet"], lambda module: ldm_name(module, prefixes) or module)
        parts["vae"] = renamed(parts["vae"], lambda module: vae_name(module, levels))
        tokenizers = _tokenizers(family, tokenizer, configs)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    index = make_index(configs, tokenizers, scheduler, {})
    if family == REFINER:
        index |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return ModelFolder(path, index, configs, scheduler, tokenizers, dict.fromkeys(configs, (path,)), parts)


def save_single_file(
    path: str | os.PathLike,
    *,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    dtype: Any = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a single file that A1111, ComfyUI and diffusers' `from_single_file` load.

    configs, params: part -> config and parameter tree. scheduler: the config of the scheduler. dtype: of the weights
    written; None keeps each array's dtype. metadata: entries beside those that every single file has.
    Raises ConfigError unless the name ends in .safetensors or .sft, DataError for a U-Net that LDM has no names for.
    """
    path = Path(path)
    if not is_safetensors(path):
        raise ConfigError(f"{path}: a single file is written as .safetensors, never as a pickle")
    family = (SDXL if "text_encoder" in params else REFINER) if "text_encoder_2" in params else SD1
    if family == SD1 and configs["text_encoder"].get("hidden_act") == "gelu":
        family = SD2
    prefixes = ldm_prefixes(params["unet"])
    tensors = {}
    for key, tensor in to_state_dict(params["unet"]).items():
        module, _, leaf = key.rpartition(".")
        if (name := ldm_name(module, prefixes)) is None:
            raise DataError(f"{path}: the U-Net's {module} has no name in a single file: keep this model as a folder")
        tensors[f"{_UNET}{name}.{leaf}"] = tensor
    levels = _levels(configs)
    for key, tensor in to_state_dict(params["vae"]).items():
        module, _, leaf = key.rpartition(".")
        if ".attentions." in key and tensor.ndim == 2:  # a convolution of 1 x 1 in LDM
            tensor = tensor[:, :, None, None]
        tensors[f"{_VAE[0]}{ldm_vae_name(module, levels)}.{leaf}"] = tensor
    for name, (prefix, openclip) in _TEXT[family].items():
        if openclip:
            text = to_openclip(to_state_dict(params[name]), sd2=family == SD2)
        else:
            text = to_state_dict(params[name], prefix="text_model.")
        tensors |= {prefix + key: tensor for key, tensor in text.items()}
    v = scheduler.get("prediction_type") == "v_prediction"
    if family == SDXL and v:  # A1111 and ComfyUI look for this tensor
        tensors["v_pred"] = np.zeros(0, np.float32)
    if scheduler.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = np.zeros(0, np.float32)
    architecture = "stable-diffusion-v2-768-v" if family == SD2 and v else ARCHITECTURES[family]
    records = dict(metadata or {}) | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": "v" if v else "epsilon",
        _CONFIGS: json.dumps({"configs": dict(configs), "scheduler": dict(scheduler)}, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors, records, dtype=dtype)


# The kind of a file.


def is_whole_model(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a single file with a U-Net in it."""
    return any(name.startswith(_UNET) for name in names)


def family_of(tensors: Mapping[str, np.ndarray]) -> str:
    """The family of the model. Raises DataError for a file of another kind, which the error names."""
    whole = is_whole_model(tensors)
    for pattern, kind in (_FOREIGN if whole else _FOREIGN | _PARTIAL).items():
        if any(re.match(pattern, key) for key in tensors):
            raise DataError(f"{kind}; {READABLE}")
    if not whole:
        raise DataError(f"not a checkpoint of a model: it holds {listing(sorted(tensors)) or 'nothing'}; {READABLE}")
    for family, texts in reversed(_TEXT.items()):
        if all(any(key.startswith(prefix) for key in tensors) for prefix, _ in texts.values()):
            return family
    width = next((tensor.shape[1] for key, tensor in tensors.items() if key.endswith("attn2.to_k.weight")), 0)
    kind = CONTEXT_WIDTHS.get(width, f"(text width {width})")
    raise DataError(f"a {kind} checkpoint without its text models; {READABLE}")


def _prediction_type(path: Path, family: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    if "v_pred" in tensors:
        return "v_prediction"
    if known := _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower()):
        return known
    first = tensors.get(f"{_UNET}input_blocks.0.0.weight")
    if family != SD2 or (first is not None and first.shape[1:2] == (9,)):  # 9 input channels: for inpainting
        return "epsilon"
    content = {} if is_safetensors(path) else read_torch(path)
    if isinstance(content, Mapping) and content.get("global_step") == 875000:
        return "epsilon"
    log.warning("%s: Stable Diffusion 2, taken for v_prediction; give prediction_type if it is not", path)
    return "v_prediction"


def _recorded_configs(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The configs of the parts and of the scheduler that sdjax wrote into the metadata; None if there are none."""
    if _CONFIGS not in metadata:
        return None
    try:
        content = strict_json.parse(metadata[_CONFIGS])
        configs, scheduler = dict(content["configs"]), dict(content["scheduler"])
        if not {"unet", "vae"} < configs.keys() or not all(map(dict, configs.values())):
            raise ValueError("parts are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the metadata entry {_CONFIGS} is damaged: {error}") from None
    return configs, scheduler


def _levels(configs: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of resolutions of the VAE."""
    channels = configs["vae"].get("block_out_channels")
    if not isinstance(channels, (list, tuple)):
        raise DataError("the config of its VAE has no list block_out_channels")
    return len(channels)


def split_parts(tensors: Mapping[str, np.ndarray], family: str) -> dict[str, dict[str, np.ndarray]]:
    """Part -> tensors without prefix. Names in a text model are those of transformers, the others LDM's."""

    vae = vae_tensors(tensors)
    if not vae:
        raise DataError(f"a {family} checkpoint without its VAE ({' or '.join(prefix + '*' for prefix in _VAE)})")
    parts = {"unet": _under(_UNET, tensors), "vae": vae}
    for name, (prefix, openclip) in _TEXT[family].items():
        text = {key.removeprefix("text_model."): tensor for key, tensor in _under(prefix, tensors).items()}
        parts[name] = from_openclip(text, sd2=family == SD2) if openclip else text
    return parts


def vae_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the autoencoder in a file of a whole model, without prefix; empty if there is none."""
    vae = next(filter(None, (_under(prefix, tensors) for prefix in _VAE)), {})
    return {key: tensor for key, tensor in vae.items() if not key.startswith(("loss.", "model_ema"))}


def _under(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def renamed(tensors: Mapping[str, np.ndarray], rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The tensors of a part with other names for its modules."""
    parts = ((key.rpartition("."), tensor) for key, tensor in tensors.items())
    return {f"{rename(module)}.{leaf}": tensor for (module, _, leaf), tensor in parts}


# Tokenizers.


def _tokenizers(
    family: str, source: str | os.PathLike | None, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path]:
    """Name -> folder. The tokenizers pad as the family does, except those of a model's folder, which stay as they are.

    source: see `tokenizer` in `read_single_file`.
    """
    if source is not None:
        folder = Path(source)
        if all((folder / name).is_dir() for name in _PADDING[family]):
            return {name: folder / name for name in _PADDING[family]}
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        if not has_tokenizer(folder):
            raise DataError(
                f"tokenizer = {str(source)!r} is no folder with tokenizer.json, or vocab.json and merges.txt"
            )
    else:
        words = next(configs[name] for name in _TEXT[family]).get("vocab_size", VOCABULARY)
        if words != VOCABULARY:
            raise DataError(f"its tokenizer has {words} words, Stable Diffusion's {VOCABULARY}: {_GIVE_TOKENIZER}")
        try:
            folder = snapshot(TOKENIZER, _TOKENIZER_FILES)
        except DataError as error:
            raise DataError(f"the tokenizer is not in the file; {_GIVE_TOKENIZER}. {error}") from None
    return {name: folder if pad is None else _padded(folder, pad) for name, pad in _PADDING[family].items()}


@functools.cache
def _padded(folder: Path, pad: str) -> Path:
    """A copy of a tokenizer that pads with another word. The copy is removed when the program ends."""
    copy = Path(tempfile.mkdtemp(prefix="sdjax-tokenizer-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for name in _TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, copy / name)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = copy / name
        content = json.loads(file.read_text("utf-8")) if file.exists() else {}
        file.write_text(json.dumps({**content, "pad_token": pad}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return copy
