"""LoRA in kohya's naming, which A1111, ComfyUI and diffusers read: `lora_unet_..._to_q.lora_down.weight`.

The name of a module has underscores in place of its dots, so it cannot be split again. It is looked up among the names
of the model's layers.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats import lora_lycoris
from sdjax.formats.families import ARCHITECTURES, CONTEXT_WIDTHS, SD1, SD2, SDXL
from sdjax.formats.ldm_names import ldm_name, ldm_prefixes
from sdjax.formats.lora_layer import TorchAdapter, alpha_of, check_complete, group_tensors, rank_of
from sdjax.formats.lora_lycoris import LycorisAdapter, dora_scale
from sdjax.formats.parameter_names import module_name, text_module_name
from sdjax.formats.safetensors_file import encode
from sdjax.lora import adaptable
from sdjax.trees import Path, layers

_READ_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_TENSORS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha", "dora_scale": "magnitude"}
# How the tensors of networks begin that are not supported.
_OTHER_KINDS = {"oft_": "OFT", "boft_": "BOFT", "on_input": "IA3"}
# A tensor of each of LyCORIS's other networks, and its name of the network.
_ALGORITHMS = {
    **{"hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr"},
    **{"a1.weight": "glora", "diff": "full", "w_norm": "full"},
}
# The tensors whose first axis is the rank.
_DOWNS = ("lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "b2.weight")
_BASE_MODELS = {SD1: "sd_v1", SD2: "sd_v2", SDXL: "sdxl_base_v1-0"}


def is_kohya(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA in kohya's naming."""
    return any(name.startswith(prefixes) for name in names for prefixes in _READ_PREFIXES.values())


def split_key(key: str) -> tuple[str, str, str] | None:
    """The part, the layer and the tensor that a key names, such as ("unet", "conv_in", "down"); None for other keys."""
    module, _, name = key.partition(".")
    for part, prefixes in _READ_PREFIXES.items():
        for prefix in prefixes:
            if module.startswith(prefix):
                return part, module.removeprefix(prefix), _TENSORS.get(name, name)
    return None


def recorded_family(metadata: Mapping[str, str]) -> str | None:
    """The family of the base model that a LoRA's metadata names; None if they name none that is known."""
    version = metadata.get("ss_base_model_version", "")
    return next((family for family, name in _BASE_MODELS.items() if version.startswith(name[:5])), None)


def read_kohya(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]
) -> dict[Path, TorchAdapter | LycorisAdapter]:
    """(part, *path of a layer) -> adapter. An alpha that is missing or 0 means the rank. `bundle_emb.*` is left out.

    Raises DataError for keys that belong to no layer, for a layer without `down` or `up`, and for networks of other
    kinds (OFT, IA3), which the error names.
    """
    paths = _paths(expected)
    names = {**_TENSORS, **{name: name for name in lora_lycoris.TENSORS}}

    def parse(key: str) -> tuple[Path, str] | None:
        module, _, name = key.partition(".")
        if kind := next((kind for start, kind in _OTHER_KINDS.items() if name.startswith(start)), None):
            known = "LoRA, LoCon, DoRA, LoHa, LoKr, GLoRA and full differences"
            raise DataError(f"a {kind} network ({key}); only {known} are supported")
        return (paths[module], names[name]) if module in paths and name in names else None

    adapters: dict[Path, TorchAdapter | LycorisAdapter] = {}
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("bundle_emb.")}
    for path, parts in group_tensors(tensors, parse).items():
        if "magnitude" in parts:
            parts["magnitude"] = _magnitude(parts["magnitude"])
        if parts.keys() & set(lora_lycoris.TENSORS):
            adapters[path] = LycorisAdapter(path, parts)
            continue
        check_complete(parts, {"down", "up"}, path)
        rank, alpha = rank_of(parts["down"]), alpha_of(parts, path)
        scale = alpha / rank if alpha and rank else 1.0
        adapters[path] = TorchAdapter(parts["down"], parts["up"], scale, parts.get("magnitude"))
    return adapters


def _magnitude(tensor: np.ndarray) -> np.ndarray:
    """The magnitude, [out] or [in, 1], of a `dora_scale`: [out, 1, ...], or [1, in, ...] without `wd_on_output`."""
    wide = [size for size in tensor.shape if size != 1]
    if len(wide) > 1:
        return tensor  # of no meaning; refused with the layer's shape
    return tensor.reshape(-1, 1) if tensor.shape[:1] == (1,) and wide else tensor.reshape(-1)


def write_kohya(
    adapters: Mapping[Path, TorchAdapter | LycorisAdapter], expected: Mapping[str, Any], dtype: Any
) -> dict[str, np.ndarray]:
    """The tensors of a LoRA by kohya's names. For SDXL the U-Net's names are LDM's, and text models are te1 and te2.

    All layers get the alpha that most of them have, and `up` takes the difference. There are two reasons: diffusers
    ignores the alpha of an attention layer in a file with several alphas, and it takes an alpha of 0 (an adapter
    switched off) for the rank.
    """
    plain = [adapter for adapter in adapters.values() if isinstance(adapter, TorchAdapter)]
    alphas = Counter(_alpha(adapter) for adapter in plain if adapter.scale)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0
    sdxl = "text_encoder_2" in expected
    prefixes = ldm_prefixes(expected["unet"]) if sdxl else {}
    tensors = {}
    for path, adapter in adapters.items():
        if path[0] == "unet":
            name = module_name(path[1:])
            name = "lora_unet_" + (ldm_name(name, prefixes) or name).replace(".", "_")
        else:
            name = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[path[0]] if sdxl else "lora_te_"
            name += text_module_name(path[1:]).replace(".", "_")
        if isinstance(adapter, LycorisAdapter):
            wide = lambda key: np.float32 if key == "alpha" else dtype
            tensors |= {f"{name}.{key}": tensor.astype(wide(key)) for key, tensor in adapter.tensors.items()}
            continue
        up = adapter.up * np.float32(_alpha(adapter) / alpha)
        tensors[f"{name}.lora_down.weight"] = adapter.down.astype(dtype)
        tensors[f"{name}.lora_up.weight"] = up.astype(dtype)
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
        if adapter.magnitude is not None:
            tensors[f"{name}.dora_scale"] = dora_scale(adapter.magnitude, adapter.down.ndim).astype(dtype)
    return tensors


def kohya_metadata(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, str]:
    """The metadata by which other programs describe and classify a LoRA: `ss_*` and `modelspec.*`.

    tensors: those of `write_kohya`.
    """
    downs = [tensor for name, tensor in tensors.items() if name.partition(".")[2] in _DOWNS]
    alpha = next((f"{float(tensor):g}" for name, tensor in tensors.items() if name.endswith(".alpha")), "1")
    ranks = {down.shape[0] for down in downs}
    dora = any(name.endswith(".dora_scale") for name in tensors)
    names = {name.partition(".")[2] for name in tensors if not name.startswith("bundle_emb.")}
    others = [algorithm for name, algorithm in _ALGORITHMS.items() if name in names]
    arguments = {"algo": others[0] if others else "lora"} if dora or others else {}
    arguments |= {"dora_wd": "True"} if dora else {}
    if len(ranks) == 1 and any(down.ndim == 4 and down.shape[2:] != (1, 1) for down in downs):
        arguments |= {"conv_dim": str(max(ranks)), "conv_alpha": alpha}
    metadata = {
        "ss_network_module": "lycoris.kohya" if dora or others else "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
    }
    if (family := CONTEXT_WIDTHS.get(context_width(expected) or 0)) in _BASE_MODELS:
        metadata |= {"ss_base_model_version": _BASE_MODELS[family], "ss_v2": str(family == SD2)}
        metadata["modelspec.architecture"] = f"{ARCHITECTURES[family]}/lora"
    return metadata


def kohya_hashes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes that kohya's scripts record, of the file without metadata other than `ss_*`, and that of ModelSpec.

    `sshs_model_hash` and `modelspec.hash_sha256` cover the tensors. `sshs_legacy_hash`, once A1111's, covers 64 KiB of
    the file.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header, *data = encode(tensors, training)
    whole = io.BytesIO(b"".join([header, *data]))
    digest = hashlib.sha256(whole.getbuffer()[len(header) :]).hexdigest()
    whole.seek(0x100000)
    legacy = hashlib.sha256(whole.read(0x10000)).hexdigest()[:8]
    return {"sshs_model_hash": digest, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{digest}"}


def context_width(expected: Mapping[str, Any]) -> int | None:
    """The width of the text that the U-Net attends to (see `families.CONTEXT_WIDTHS`); None without a U-Net."""
    kernels = (
        layer["kernel"] for path, layer in layers(expected.get("unet", {}), "kernel") if path[-2:] == ("attn2", "to_k")
    )
    return next((kernel.shape[0] for kernel in kernels), None)


def _paths(expected: Mapping[str, Any]) -> dict[str, Path]:
    """Every name that kohya's scripts, old or new, give to a layer of this model -> (part, *path of the layer)."""
    paths: dict[str, Path] = {}
    prefixes = ldm_prefixes(expected.get("unet", {}))
    for path in adaptable(expected):
        name = module_name(path[1:])
        other = ldm_name(name, prefixes) if path[0] == "unet" else text_module_name(path[1:])
        for start in _READ_PREFIXES.get(path[0], ()):
            paths |= {start + spelling.replace(".", "_"): path for spelling in (name, other) if spelling}
    return paths


def _alpha(adapter: TorchAdapter) -> float:
    return float(np.float32(adapter.scale * adapter.down.shape[0]))
