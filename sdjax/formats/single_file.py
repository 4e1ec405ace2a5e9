"""A whole model in one file with CompVis' (LDM's) names, as A1111 and ComfyUI keep them: read, told apart, written.

Tokenizers are not in such a file, nor are configs: files written here carry the latter in their metadata, those of
other programs have them inferred (`ldm_config`).
"""

import atexit
import functools
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import ConfigError, DataError
from sdjax.formats.diffusers_folder import INPUT_CHANNELS, READABLE, ModelFolder, make_index, snapshot
from sdjax.formats.ldm_config import SD1, SD2, SDXL, infer_configs, scheduler_config
from sdjax.formats.ldm_names import (
    ldm_name,
    ldm_prefixes,
    ldm_vae_name,
    openclip_name,
    unet_structure,
    vae_name,
)
from sdjax.formats.parameter_names import listing, to_state_dict
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.torch_pickle import read_torch
from sdjax.formats.weights_file import read_tensors

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
TOKENIZER = "openai/clip-vit-large-patch14"
"""Whose tokenizer every Stable Diffusion has."""
_TOKENIZER_FILES = ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"]
_VOCABULARY = 49408
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
}
"""Family -> text model -> its prefix, and whether it has OpenCLIP's names."""
_PADDING = {SD1: {"tokenizer": None}, SD2: {"tokenizer": "!"}, SDXL: {"tokenizer": None, "tokenizer_2": "!"}}
_FOREIGN = {
    r"model\.diffusion_model\.joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "Flux",
    r"conditioner\.embedders\.0\.model\.": "an SDXL refiner",
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
    """Reads a checkpoint as if it were a model folder: what is small is read, weights are views read when touched.

    tokenizer: folder of the tokenizer, or of a model that has one (`tokenizer/`, `tokenizer_2/`); default
    Stable Diffusion's own, from the hub or its cache. prediction_type: "epsilon" or "v_prediction"; no shape tells
    them apart, so SD2 counts as v unless the file says otherwise (metadata; a training step of 875000, as
    SD2-base's has). Training averages (`model_ema.*`) and buffers are left out.
    Raises DataError for a file that is damaged or of another kind, which it names.
    """
    path = Path(path)
    if prediction_type and prediction_type not in _PREDICTIONS.values():
        raise ConfigError(f"prediction_type = {prediction_type!r}: choices are epsilon, v_prediction")
    tensors, metadata = read_tensors(path)
    try:
        family = _family(tensors)
        parts = _split(tensors, family)
        own = _own_configs(metadata)
        if own:
            configs, scheduler = own
        else:
            prediction = prediction_type or _prediction_type(path, family, tensors, metadata)
            configs = infer_configs(family, parts, prediction)
            scheduler = scheduler_config(family, prediction, zero_terminal_snr="ztsnr" in tensors)
        if prediction_type:
            scheduler = {**scheduler, "prediction_type": prediction_type}
        channels = configs["unet"].get("in_channels", 4)
        if channels not in INPUT_CHANNELS:
            what = f"a {family} model whose U-Net takes {channels} channels"
            raise DataError(f"{what}; {READABLE} with {' or '.join(map(str, INPUT_CHANNELS))}")
        prefixes = {ldm: ours for ours, ldm in ldm_prefixes(unet_structure(configs["unet"])).items()}
        levels = len(configs["vae"]["block_out_channels"])
        rename = {
            "unet": lambda module: ldm_name(module, prefixes) or module,
            "vae": lambda module: vae_name(module, levels),
        }
        state = {
            name: {_renamed(key, rename[name]): tensor for key, tensor in own.items()} if name in rename else own
            for name, own in parts.items()
        }
        tokenizers = _tokenizers(family, tokenizer, configs)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    index = make_index(configs, tokenizers, scheduler, {})
    return ModelFolder(path, index, configs, scheduler, tokenizers, dict.fromkeys(configs, (path,)), state)


def save_single_file(
    path: str | os.PathLike,
    *,
    configs: Mapping[str, Mapping[str, Any]],
    params: Mapping[str, Mapping[str, Any]],
    scheduler: Mapping[str, Any],
    dtype: Any = None,
) -> None:
    """Writes a checkpoint that A1111, ComfyUI and diffusers' `from_single_file` load.

    configs, params: by model; scheduler: its config. dtype: of the weights written, None keeps theirs.
    """
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ConfigError(f"{path}: a single file is written as .safetensors, never as a pickle")
    family = SDXL if "text_encoder_2" in params else SD1
    if family == SD1 and configs["text_encoder"].get("hidden_act") == "gelu":
        family = SD2
    prefixes = ldm_prefixes(params["unet"])
    tensors = {}
    for key, tensor in to_state_dict(params["unet"]).items():
        module, _, leaf = key.rpartition(".")
        if (name := ldm_name(module, prefixes)) is None:
            raise DataError(f"{path}: the U-Net's {module} has no name in a single file: keep this model as a folder")
        tensors[f"{_UNET}{name}.{leaf}"] = tensor
    levels = len(configs["vae"]["block_out_channels"])
    for key, tensor in to_state_dict(params["vae"]).items():
        module, _, leaf = key.rpartition(".")
        square = ".attentions." in key and tensor.ndim == 2  # 1x1 convolutions in LDM
        tensors[f"{_VAE[0]}{ldm_vae_name(module, levels)}.{leaf}"] = tensor[:, :, None, None] if square else tensor
    for name, (prefix, openclip) in _TEXT[family].items():
        if openclip:
            own = _to_openclip(to_state_dict(params[name]), spare=family == SD2)
        else:
            own = to_state_dict(params[name], prefix="text_model.")
        tensors |= {prefix + key: tensor for key, tensor in own.items()}
    v = scheduler.get("prediction_type") == "v_prediction"
    if family == SDXL and v:  # how A1111 and ComfyUI are told
        tensors["v_pred"] = np.zeros(0, np.float32)
    if scheduler.get("rescale_betas_zero_snr"):
        tensors["ztsnr"] = np.zeros(0, np.float32)
    architecture = {
        SD1: "stable-diffusion-v1",
        SD2: "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512",
        SDXL: "stable-diffusion-xl-v1-base",
    }[family]
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.prediction_type": "v" if v else "epsilon",
        _CONFIGS: json.dumps({"configs": dict(configs), "scheduler": dict(scheduler)}, sort_keys=True),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_safetensors(path, tensors, metadata, dtype=dtype)


# Telling what a file is.


def _family(tensors: Mapping[str, np.ndarray]) -> str:
    whole = any(key.startswith(_UNET) for key in tensors)
    for pattern, kind in (_FOREIGN if whole else _FOREIGN | _PARTIAL).items():
        if any(re.match(pattern, key) for key in tensors):
            raise DataError(f"{kind}; {READABLE}")
    if not whole:
        raise DataError(f"no checkpoint of a model: it holds {listing(sorted(tensors)) or 'nothing'}; {READABLE}")
    for family, texts in reversed(_TEXT.items()):
        if all(any(key.startswith(prefix) for key in tensors) for prefix, _ in texts.values()):
            return family
    width = next((tensor.shape[1] for key, tensor in tensors.items() if key.endswith("attn2.to_k.weight")), 0)
    kind = {768: SD1, 1024: SD2, 2048: SDXL, 1280: "SDXL refiner"}.get(width, f"(text width {width})")
    raise DataError(f"a {kind} checkpoint without its text models; {READABLE}")


def _prediction_type(path: Path, family: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    if "v_pred" in tensors:
        return "v_prediction"
    if known := _PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower()):
        return known
    inpainting = tensors[f"{_UNET}input_blocks.0.0.weight"].shape[1:2] == (9,)
    if family != SD2 or inpainting:
        return "epsilon"
    content = read_torch(path) if path.suffix.lower() not in (".safetensors", ".sft") else {}
    if isinstance(content, Mapping) and content.get("global_step") == 875000:
        return "epsilon"
    log.warning("%s: Stable Diffusion 2, taken for v_prediction; if it is not, give prediction_type", path)
    return "v_prediction"


def _own_configs(metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    if _CONFIGS not in metadata:
        return None
    try:
        content = json.loads(metadata[_CONFIGS])
        configs, scheduler = dict(content["configs"]), dict(content["scheduler"])
        if not {"unet", "vae", "text_encoder"} <= configs.keys() or not all(map(dict, configs.values())):
            raise ValueError("parts are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the metadata entry {_CONFIGS} is damaged: {error}") from None
    return configs, scheduler


# Taking it apart.


def _split(tensors: Mapping[str, np.ndarray], family: str) -> dict[str, dict[str, np.ndarray]]:
    """Part -> its tensors without prefix: text models by transformers' names, the others by LDM's."""
    under = lambda prefix: {key.removeprefix(prefix): own for key, own in tensors.items() if key.startswith(prefix)}
    vae = next((own for prefix in _VAE if (own := under(prefix))), {})
    parts = {
        "unet": under(_UNET),
        "vae": {k: own for k, own in vae.items() if not k.startswith(("loss.", "model_ema"))},
    }
    if not parts["vae"]:
        raise DataError(f"a {family} checkpoint without its VAE ({' or '.join(prefix + '*' for prefix in _VAE)})")
    for name, (prefix, openclip) in _TEXT[family].items():
        own = {key.removeprefix("text_model."): tensor for key, tensor in under(prefix).items()}
        parts[name] = _from_openclip(own, spare=family == SD2) if openclip else own
    return parts


def _renamed(key: str, rename: Callable[[str], str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{rename(module)}.{leaf}"


def _from_openclip(tensors: Mapping[str, np.ndarray], *, spare: bool) -> dict[str, np.ndarray]:
    """OpenCLIP's text model by transformers' names. spare: without its last block and projection, which SD2 skips."""
    blocks = {int(match[1]) for key in tensors if (match := re.match(r"transformer\.resblocks\.(\d+)\.", key))}
    width = tensors["positional_embedding"].shape[-1] if "positional_embedding" in tensors else 0
    # Of SD2's 24 blocks some files keep 23.
    kept = 23 if spare and width == 1024 else len(blocks) - spare
    names = {openclip_name(module): module for module in _openclip_modules(kept)}
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        block = re.match(r"transformer\.resblocks\.(\d+)\.", key)
        unused = key == "text_projection" or (block is not None and int(block[1]) >= kept)
        if key in ("logit_scale", "attn_mask") or (spare and unused):
            continue
        if key in ("positional_embedding", "text_projection"):
            found[f"{names[key]}.weight"] = tensor.T if key == "text_projection" else tensor
        elif key.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")):
            module, _, leaf = key.rpartition("in_proj_")
            for own, third in zip("qkv", np.split(tensor, 3), strict=True):
                found[f"{names[module + 'in_proj'].removesuffix('in_proj')}{own}_proj.{leaf}"] = third
        else:
            found[_renamed(key, lambda module: names.get(module, module))] = tensor
    return found


def _to_openclip(tensors: Mapping[str, np.ndarray], *, spare: bool) -> dict[str, np.ndarray]:
    """The inverse. spare: with the last block and the projection that SD2's loaders expect and never use."""
    found: dict[str, np.ndarray] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        if module.endswith((".k_proj", ".v_proj")):
            continue
        if module.endswith(".q_proj"):
            attention = module.removesuffix("q_proj")
            thirds = [tensors[f"{attention}{own}_proj.{leaf}"] for own in "qkv"]
            found[f"{openclip_name(f'{attention}in_proj')}_{leaf}"] = np.concatenate(thirds)
        elif module in ("embeddings.position_embedding", "text_projection"):
            found[openclip_name(module)] = tensor.T if module == "text_projection" else tensor
        else:
            found[f"{openclip_name(module)}.{leaf}"] = tensor
    found["logit_scale"] = np.array(np.log(100.0), np.float32)
    if spare:
        width = tensors["embeddings.token_embedding.weight"].shape[1]
        found["text_projection"] = np.eye(width, dtype=np.float32)
        layers = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers."))
        last, new = f"transformer.resblocks.{layers - 1}.", f"transformer.resblocks.{layers}."
        found |= {new + key.removeprefix(last): tensor for key, tensor in found.items() if key.startswith(last)}
    return found


def _openclip_modules(layers: int) -> list[str]:
    inside = ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.out_proj", "self_attn.in_proj")
    outside = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm", "text_projection")
    return [*outside, *(f"encoder.layers.{i}.{module}" for i in range(layers) for module in inside)]


# Tokenizers.


def _tokenizers(
    family: str, given: str | os.PathLike | None, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Path]:
    """Name -> folder, with the padding token of the family where the folder is not the model's own."""
    if given is not None:
        folder = Path(given)
        if all((folder / name).is_dir() for name in _PADDING[family]):
            return {name: folder / name for name in _PADDING[family]}
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        if not (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists():
            raise DataError(
                f"tokenizer = {str(given)!r} is no folder with tokenizer.json, or vocab.json and merges.txt"
            )
    else:
        words = configs["text_encoder"].get("vocab_size", _VOCABULARY)
        if words != _VOCABULARY:
            raise DataError(f"its {words} words are not Stable Diffusion's {_VOCABULARY}: give its tokenizer's folder")
        try:
            folder = snapshot(TOKENIZER, _TOKENIZER_FILES)
        except DataError as error:
            raise DataError(f"the tokenizer is not in the file; give its folder as tokenizer. {error}") from None
    return {name: folder if pad is None else _padded(folder, pad) for name, pad in _PADDING[family].items()}


@functools.cache
def _padded(folder: Path, pad: str) -> Path:
    """A copy of a tokenizer that pads with another word, kept until the program ends."""
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
