"""LoRA in kohya's naming, which A1111, ComfyUI and diffusers read: `lora_unet_..._to_q.lora_down.weight`.

A module's name has its dots turned into underscores, so it cannot be split again: names are looked up in a table made
from the model's own layers.
"""

import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.ldm_names import ldm_name, ldm_prefixes
from sdjax.formats.lora_layer import TorchAdapter, scalar
from sdjax.formats.parameter_names import listing, module_name
from sdjax.formats.safetensors_file import encode
from sdjax.trees import Path, layers

_READ_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# What other networks call their tensors.
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon in Tucker form",
    "oft_": "OFT",
    "glora": "GLoRA",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
    "diff": "full difference",
    "w_norm": "norm difference",
    "b_norm": "norm difference",
}


def is_kohya(names: Mapping[str, Any]) -> bool:
    """Whether the file speaks kohya's naming."""
    return any(name.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for name in names)


def read_kohya(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[Path, TorchAdapter]:
    """(component, *layer path) -> adapter. Alpha missing or 0 means the rank; `bundle_emb.*` entries are left out.

    Raises DataError for keys that belong to no layer, half pairs, and kinds other than LoRA and DoRA, which it names.
    """
    parts: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if not key.startswith("bundle_emb."):
            module, _, part = key.partition(".")
            parts[module][part] = tensor
    table = _read_table(expected)
    known = {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}
    unknown = []
    adapters: dict[Path, TorchAdapter] = {}
    for module, held in parts.items():
        for part in held.keys() - known:
            if kind := next((kind for start, kind in _OTHER_KINDS.items() if part.startswith(start)), None):
                raise DataError(f"a {kind} network ({module}.{part}); only LoRA, LoCon and DoRA are supported")
        if module not in table or held.keys() - known:
            unknown += [f"{module}.{part}" for part in held if module not in table or part not in known]
            continue
        path = table[module]
        if not {"lora_down.weight", "lora_up.weight"} <= held.keys():
            raise DataError(f"{module} has {listing(sorted(held))} but needs lora_down.weight and lora_up.weight")
        if path in adapters:
            raise DataError(f"{module} and another name mean the same layer")
        down = held["lora_down.weight"]
        rank = down.shape[0] if down.ndim else 1
        alpha = scalar(held["alpha"], f"{module}.alpha") if "alpha" in held else 0.0
        scale = alpha / rank if alpha and rank else 1.0
        adapters[path] = TorchAdapter(down, held["lora_up.weight"], scale, held.get("dora_scale"))
    if unknown:
        raise DataError(f"{len(unknown)} keys of no layer of this model: {listing(unknown)}")
    return adapters


def write_kohya(
    adapters: Mapping[Path, TorchAdapter], expected: Mapping[str, Any], dtype: Any
) -> dict[str, np.ndarray]:
    """-> tensors by kohya's names: SDXL with the U-Net in LDM's naming and lora_te1_/lora_te2_, else lora_te_.

    All layers get the alpha most of them have, the difference going into `up`: diffusers overlooks an attention layer's
    own alpha where alphas differ, and an alpha of 0 (an adapter switched off) would be read as the rank.
    """
    alphas = Counter(_alpha(adapter) for adapter in adapters.values() if adapter.scale)
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
            name += _text_name(path[1:])
        up = adapter.up * np.float32(_alpha(adapter) / alpha)
        tensors[f"{name}.lora_down.weight"] = adapter.down.astype(dtype)
        tensors[f"{name}.lora_up.weight"] = up.astype(dtype)
        tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
        if adapter.magnitude is not None:
            shape = (-1,) + (1,) * (adapter.down.ndim - 1)  # LyCORIS's, one number an output
            tensors[f"{name}.dora_scale"] = adapter.magnitude.reshape(shape).astype(dtype)
    return tensors


def kohya_metadata(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any]) -> dict[str, str]:
    """The `ss_*` and `modelspec.*` entries other programs show and decide by, for tensors of `write_kohya`."""
    downs = [tensor for name, tensor in tensors.items() if name.endswith(".lora_down.weight")]
    alpha = next(f"{float(tensor):g}" for name, tensor in tensors.items() if name.endswith(".alpha"))
    ranks = {down.shape[0] for down in downs}
    dora = any(name.endswith(".dora_scale") for name in tensors)
    arguments = {"algo": "lora", "dora_wd": "True"} if dora else {}
    if len(ranks) == 1 and any(down.ndim == 4 and down.shape[2:] != (1, 1) for down in downs):
        arguments |= {"conv_dim": str(max(ranks)), "conv_alpha": alpha}
    metadata = {
        "ss_network_module": "lycoris.kohya" if dora else "networks.lora",
        "ss_network_dim": str(max(ranks)) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps(arguments),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
    }
    version, architecture = {
        768: ("sd_v1", "stable-diffusion-v1"),
        1024: ("sd_v2", "stable-diffusion-v2-512"),
        2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    }.get(context_width(expected) or 0, (None, None))
    if version:
        metadata |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
        metadata["modelspec.architecture"] = f"{architecture}/lora"
    return metadata


def kohya_hashes(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash`, over the tensors alone, and `sshs_legacy_hash`, A1111's old one, over 64 KiB of the file.

    Both as kohya's scripts define them; the file hashed holds the `ss_*` metadata only.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header, *data = encode(tensors, training)
    whole = io.BytesIO(b"".join([header, *data]))
    digest = hashlib.sha256(whole.getbuffer()[len(header) :]).hexdigest()
    whole.seek(0x100000)
    return {"sshs_model_hash": digest, "sshs_legacy_hash": hashlib.sha256(whole.read(0x10000)).hexdigest()[:8]}


def context_width(expected: Mapping[str, Any]) -> int | None:
    """The width of the text the U-Net attends to: 768 in SD 1, 1024 in SD 2, 2048 in SDXL."""
    kernels = (
        layer["kernel"] for path, layer in layers(expected.get("unet", {}), "kernel") if path[-2:] == ("attn2", "to_k")
    )
    return next((kernel.shape[0] for kernel in kernels), None)


def _read_table(expected: Mapping[str, Any]) -> dict[str, Path]:
    """Every kohya name, old and new, a layer of this model goes by -> (component, *layer path)."""
    table: dict[str, Path] = {}
    for component, tree in expected.items():
        names: dict[str, Path] = {}
        prefixes = ldm_prefixes(tree) if component == "unet" else {}
        for path, _ in layers(tree, "kernel"):
            name = module_name(path)
            other = ldm_name(name, prefixes) if component == "unet" else _text_name(path)
            names |= {spelling.replace(".", "_"): path for spelling in (name, other) if spelling}
        for prefix in _READ_PREFIXES.get(component, ()):
            table |= {prefix + name: (component, *path) for name, path in names.items()}
    return table


def _alpha(adapter: TorchAdapter) -> float:
    return float(np.float32(adapter.scale * adapter.down.shape[0]))


def _text_name(path: Path) -> str:
    name = module_name(path).replace(".", "_")
    return name if path[0] == "text_projection" else f"text_model_{name}"
