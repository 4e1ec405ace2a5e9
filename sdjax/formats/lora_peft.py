"""LoRA in the naming of diffusers and PEFT: `unet.down_blocks.0....to_q.lora_A.weight`, and its older spellings."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.lora_layer import TorchAdapter, alpha_of, check_complete, group_tensors, rank_of
from sdjax.formats.lora_lycoris import LycorisAdapter
from sdjax.formats.parameter_names import module_name, text_module_name
from sdjax.runtime import strict_json
from sdjax.trees import Path, layers

_ADAPTER = r"(?:\.(?!weight$)\w+)?"  # PEFT's adapter name, as in lora_A.default.weight
_SPELLINGS = (  # (pattern of a key, whether the name of the module is old)
    (re.compile(rf"(?P<module>.+)\.lora_(?P<tensor>A|B){_ADAPTER}\.weight"), False),
    (re.compile(rf"(?P<module>.+)\.lora_(?P<tensor>magnitude_vector){_ADAPTER}(?:\.weight)?"), False),
    (re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<tensor>down|up)\.weight"), False),
    (re.compile(r"(?P<module>.+)\.lora_(?P<tensor>down|up)\.weight"), False),
    # Before diffusers 0.22: the U-Net's adapters were in attention processors, and a text model's had similar names.
    (re.compile(r"(?P<module>.+?(?:\.processor)?\.to_(?:q|k|v|out))_lora\.(?P<tensor>down|up)\.weight"), True),
    (re.compile(r"(?P<module>.+?)(?:\.lora)?\.(?P<tensor>alpha)"), False),
)
_TENSORS = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
_METADATA = "lora_adapter_metadata"


def read_peft(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], expected: Mapping[str, Any]
) -> dict[Path, TorchAdapter]:
    """(part, *path of a layer) -> adapter.

    The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA. Alpha comes from a tensor or else from the metadata;
    without either it is the rank.
    Raises DataError for keys that belong to no layer, and for a layer without `down` or `up`.
    """
    paths = {(path[0], module_name(path[1:])): path for path, _ in layers(expected, "kernel")}

    def parse(key: str) -> tuple[Path, str] | None:
        place = split_key(key)
        return (paths[place[:2]], place[2]) if place and place[:2] in paths else None

    settings = read_settings(metadata)
    adapters = {}
    for path, parts in group_tensors(tensors, parse).items():
        check_complete(parts, {"down", "up"}, path)
        scale = scale_of(settings, path, rank_of(parts["down"]), alpha_of(parts, path))
        magnitude = parts.get("magnitude")
        if magnitude is not None and magnitude.size == max(magnitude.shape, default=1):
            magnitude = magnitude.reshape(-1)  # [out], in a convolution [1, out, 1, 1]
        adapters[path] = TorchAdapter(parts["down"], parts["up"], scale, magnitude)
    return adapters


def write_peft(adapters: Mapping[Path, TorchAdapter | LycorisAdapter], dtype: Any) -> dict[str, np.ndarray]:
    """The tensors of a LoRA by PEFT's names.

    The file holds no alpha: the scale is multiplied into B, which every version of diffusers reads alike.
    """
    tensors = {}
    for (part, *path), adapter in adapters.items():
        if not isinstance(adapter, TorchAdapter):
            where = "/".join((part, *path))
            raise DataError(f"{where}: PEFT's naming holds LoRA and DoRA alone; --rank makes a LoRA of other kinds")
        module = module_name(tuple(path)) if part == "unet" else text_module_name(tuple(path))
        tensors[f"{part}.{module}.lora_A.weight"] = adapter.down.astype(dtype)
        tensors[f"{part}.{module}.lora_B.weight"] = (adapter.up * np.float32(adapter.scale)).astype(dtype)
        if adapter.magnitude is not None:
            if adapter.magnitude.ndim == 2:
                raise DataError(f"{part}.{module}: PEFT has no DoRA with a magnitude for each input; merge it")
            magnitude = adapter.magnitude if adapter.down.ndim == 2 else adapter.magnitude[None, :, None, None]
            tensors[f"{part}.{module}.lora_magnitude_vector.weight"] = magnitude.astype(dtype)
    return tensors


def split_key(key: str) -> tuple[str, str, str] | None:
    """The part, the module and the tensor ("down", "up", "alpha", "magnitude") of a key; None if it has none."""
    match, old = next(((match, old) for pattern, old in _SPELLINGS if (match := pattern.fullmatch(key))), (None, False))
    if match is None:
        return None
    part, module = _split_part(match["module"].removeprefix("base_model.model."))
    module = module.removeprefix("text_model.")
    if old:
        module = _modern_name(part, module)
    return part, module, _TENSORS.get(match["tensor"], match["tensor"])


def _split_part(module: str) -> tuple[str, str]:
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if module.startswith(f"{part}."):
            return part, module.removeprefix(f"{part}.")
    return "unet", module  # diffusers' `save_attn_procs` writes the U-Net without its name


def _modern_name(part: str, module: str) -> str:
    """`attn1.processor.to_out` -> `attn1.to_out.0`; in a text encoder `self_attn.to_q` -> `self_attn.q_proj`."""
    attention, _, projection = module.rpartition(".")
    attention = attention.removesuffix(".processor")
    if part != "unet":
        return f"{attention}.{projection.removeprefix('to_')}_proj"
    return f"{attention}.{projection}" + (".0" if projection == "to_out" else "")


def read_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's configuration, with keys such as `unet.lora_alpha`."""
    try:
        settings = strict_json.parse(metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise DataError(f"the metadata entry {_METADATA} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DataError(f"the metadata entry {_METADATA} is not a JSON object")
    return settings


def scale_of(settings: Mapping[str, Any], path: Path, rank: int, alpha: float | None) -> float:
    """The scale of an adapter whose tensors hold this alpha, or none."""
    part, module = path[0], module_name(path[1:])
    setting = _pattern_value(settings.get(f"{part}.alpha_pattern"), module)
    setting = settings.get(f"{part}.lora_alpha") if setting is None else setting
    alpha = setting if alpha is None else alpha
    if alpha is None:
        return 1.0
    if not isinstance(alpha, (int, float)):
        raise DataError(f"the metadata gives {part}.{module} an alpha of {alpha!r}")
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") else rank) if rank else 1.0


def _pattern_value(patterns: Any, module: str) -> Any:
    """The value of the first pattern that is the module's name or the end of it after a dot: PEFT's rule for names."""
    if not isinstance(patterns, dict):
        return None
    for name, value in patterns.items():
        if not re.fullmatch(r"[\w.]+", name):
            raise DataError(f"the metadata gives an alpha by the regular expression {name!r}, which is not supported")
        if f".{module}".endswith("." + name.removeprefix("text_model.")):
            return value
    return None
