"""LoRA in diffusers' and PEFT's naming: `unet.down_blocks.0....to_q.lora_A.weight`, and its older spellings."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.lora_layer import TorchAdapter, scalar
from sdjax.formats.parameter_names import listing, module_name
from sdjax.trees import Path, layers

_ADAPTER = r"(?:\.(?!weight$)\w+)?"  # PEFT's adapter name, as in lora_A.default.weight
_SPELLINGS = (
    (re.compile(rf"(?P<module>.+)\.lora_(?P<part>A|B){_ADAPTER}\.weight"), False),
    (re.compile(rf"(?P<module>.+)\.lora_(?P<part>magnitude_vector){_ADAPTER}(?:\.weight)?"), False),
    (re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<part>down|up)\.weight"), False),
    (re.compile(r"(?P<module>.+)\.lora_(?P<part>down|up)\.weight"), False),
    # Before diffusers 0.22 the U-Net's adapters lived in attention processors, the text encoder's had like names.
    (re.compile(r"(?P<module>.+?(?:\.processor)?\.to_(?:q|k|v|out))_lora\.(?P<part>down|up)\.weight"), True),
    (re.compile(r"(?P<module>.+?)(?:\.lora)?\.(?P<part>alpha)"), False),
)
_PARTS = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
_METADATA = "lora_adapter_metadata"


def read_peft(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], expected: Mapping[str, Any]
) -> dict[Path, TorchAdapter]:
    """(component, *layer path) -> adapter.

    The scale is alpha / rank (alpha / sqrt(rank) for rsLoRA), alpha being a tensor, the metadata's, or the rank.
    Raises DataError for keys that belong to no layer, and half pairs.
    """
    table = {
        (component, module_name(path)): (component, *path)
        for component, tree in expected.items()
        for path, _ in layers(tree, "kernel")
    }
    settings = _read_settings(metadata)
    found: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        place = _parse(key)
        if place is None or place[:2] not in table:
            unknown.append(key)
        elif place[2] in found[place[:2]]:
            raise DataError(f"{key} is there twice, under two spellings")
        else:
            found[place[:2]][place[2]] = tensor
    if unknown:
        raise DataError(f"{len(unknown)} keys of no layer of this model: {listing(unknown)}")
    adapters = {}
    for (component, module), parts in found.items():
        if not {"down", "up"} <= parts.keys():
            raise DataError(f"{component}.{module} has {listing(sorted(parts))} but needs both halves, down and up")
        down = parts["down"]
        rank = down.shape[0] if down.ndim else 0
        scale = _scale(settings, component, module, rank, parts.get("alpha"))
        adapters[table[component, module]] = TorchAdapter(down, parts["up"], scale, parts.get("magnitude"))
    return adapters


def write_peft(adapters: Mapping[Path, TorchAdapter], dtype: Any) -> dict[str, np.ndarray]:
    """-> tensors under `lora_A`/`lora_B` alone, the scale folded into B: read alike by every version of diffusers."""
    tensors = {}
    for path, adapter in adapters.items():
        component, *rest = path
        name = module_name(tuple(rest))
        if component.startswith("text_encoder") and rest[0] != "text_projection":
            name = f"text_model.{name}"
        tensors[f"{component}.{name}.lora_A.weight"] = adapter.down.astype(dtype)
        tensors[f"{component}.{name}.lora_B.weight"] = (adapter.up * np.float32(adapter.scale)).astype(dtype)
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude if adapter.down.ndim == 2 else adapter.magnitude[None, :, None, None]
            tensors[f"{component}.{name}.lora_magnitude_vector.weight"] = magnitude.astype(dtype)
    return tensors


def _parse(key: str) -> tuple[str, str, str] | None:
    """-> (component, module, "down" | "up" | "alpha" | "magnitude")."""
    match, old = next(((match, old) for pattern, old in _SPELLINGS if (match := pattern.fullmatch(key))), (None, False))
    if match is None:
        return None
    component, module = _split_component(match["module"].removeprefix("base_model.model."))
    module = module.removeprefix("text_model.")
    if old:
        module = _modern_name(component, module)
    return component, module, _PARTS.get(match["part"], match["part"])


def _split_component(module: str) -> tuple[str, str]:
    for component in ("unet", "text_encoder", "text_encoder_2"):
        if module.startswith(f"{component}."):
            return component, module.removeprefix(f"{component}.")
    return "unet", module  # files of `save_attn_procs` hold nothing else


def _modern_name(component: str, module: str) -> str:
    """`attn1.processor.to_out` -> `attn1.to_out.0`; in a text encoder `self_attn.to_q` -> `self_attn.q_proj`."""
    attention, _, projection = module.rpartition(".")
    attention = attention.removesuffix(".processor")
    if component != "unet":
        return f"{attention}.{projection.removeprefix('to_')}_proj"
    return f"{attention}.{projection}" + (".0" if projection == "to_out" else "")


def _read_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration, keys like `unet.lora_alpha`."""
    try:
        settings = json.loads(metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise DataError(f"the metadata entry {_METADATA} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"the metadata entry {_METADATA} is not a JSON object")
    return settings


def _scale(settings: Mapping[str, Any], component: str, module: str, rank: int, tensor: np.ndarray | None) -> float:
    alpha = _pattern_value(settings.get(f"{component}.alpha_pattern"), module)
    alpha = settings.get(f"{component}.lora_alpha") if alpha is None else alpha
    if tensor is not None:
        alpha = scalar(tensor, f"{component}.{module}.alpha")
    if alpha is None:
        return 1.0
    if not isinstance(alpha, (int, float)):
        raise DataError(f"the metadata gives {component}.{module} an alpha of {alpha!r}")
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank) if rank else 1.0


def _pattern_value(patterns: Any, module: str) -> Any:
    """PEFT's rule for plain names: the first that is the module's name or its end after a dot."""
    if not isinstance(patterns, dict):
        return None
    for name, value in patterns.items():
        if not re.fullmatch(r"[\w.]+", name):
            raise DataError(f"the metadata gives an alpha by the regular expression {name!r}, which is not supported")
        if f".{module}".endswith("." + name.removeprefix("text_model.")):
            return value
    return None
