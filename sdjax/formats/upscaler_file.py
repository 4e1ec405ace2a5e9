"""Reads the files of upscalers of the ESRGAN family. Their structure is told by the names and shapes of the tensors.

An RRDBNet has one of three sets of names:

- BasicSR and Real-ESRGAN: `conv_first`, `body.0.rdb1.conv1`, `conv_body`, `conv_up1`, `conv_hr`, `conv_last`
- ESRGAN, BSRGAN and KAIR: `conv_first`, `RRDB_trunk.0.RDB1.conv1`, `trunk_conv`, `upconv1`, `HRconv`, `conv_last`
- ESRGAN at first: `model.0`, `model.1.sub.0.RDB1.conv1.0`, `model.1.sub.23`, and `model.N` for the layers after these

sdjax has the first. An SRVGGNetCompact is a list, `body.0`, `body.1` and so on, of convolutions and PReLUs in turn.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.errors import DataError
from sdjax.formats.parameter_names import listing, load_params
from sdjax.formats.weights_file import read_tensors
from sdjax.models.upscaler import COLOURS, CompactConfig, RRDBConfig, abstract_params

LARGEST_SCALE = 16
_ENTRIES = ("params_ema", "params", "state_dict")
"""Where a file may hold its tensors, the best first."""
_KAIR_NAMES = {"trunk_conv": "conv_body", "upconv1": "conv_up1", "upconv2": "conv_up2", "HRconv": "conv_hr"}


def read_upscaler(path: str | os.PathLike) -> tuple[RRDBConfig | CompactConfig, dict[str, Any]]:
    """The structure of an upscaler and its parameter tree in float32.

    Raises DataError for a file that is damaged, holds something else, or is for pictures of other channels than RGB.
    """
    tensors = read_tensors(path, _ENTRIES).tensors
    for prefix in (*(f"{entry}." for entry in _ENTRIES), "module."):
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    tensors = _todays_names(tensors)
    config = _structure(tensors, str(path))
    if not 1 <= config.scale <= LARGEST_SCALE:
        raise DataError(f"{path}: enlarges {config.scale} times; expected 1 to {LARGEST_SCALE}")
    return config, load_params(tensors, abstract_params(config), dtype=np.float32, what=str(path))


def _todays_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an RRDBNet under BasicSR's names. Other tensors keep theirs."""
    numbers = sorted({int(match[1]) for key in tensors if (match := re.fullmatch(r"model\.(\d+)\.weight", key))})
    doublings = [f"conv_up{n}" for n in range(1, len(numbers) - 2)]
    places = dict(zip(numbers, ["conv_first", *doublings, "conv_hr", "conv_last"], strict=False))

    def renamed(key: str) -> str:
        if match := re.fullmatch(r"(?:model\.1\.sub|RRDB_trunk)\.(\d+)\.RDB(\d)\.(conv\d)(?:\.0)?\.(\w+)", key):
            return f"body.{match[1]}.rdb{match[2]}.{match[3]}.{match[4]}"
        if match := re.fullmatch(r"model\.1\.sub\.\d+\.(weight|bias)", key):
            return f"conv_body.{match[1]}"
        if (match := re.fullmatch(r"model\.(\d+)\.(weight|bias)", key)) and int(match[1]) in places:
            return f"{places[int(match[1])]}.{match[2]}"
        module, _, leaf = key.partition(".")
        return f"{_KAIR_NAMES[module]}.{leaf}" if module in _KAIR_NAMES else key

    return {renamed(key): tensor for key, tensor in tensors.items()}


def _structure(tensors: Mapping[str, np.ndarray], what: str) -> RRDBConfig | CompactConfig:
    """The structure that the shapes tell. `load_params` checks all other shapes against it."""

    def shape(name: str) -> tuple[int, ...]:
        return tensors[name].shape if name in tensors else ()

    first, block = shape("conv_first.weight"), shape("body.0.rdb1.conv1.weight")
    if len(first) == len(block) == 4 and first[0] and block[0]:
        unshuffle = _side(first[1], f"{what}: its first layer takes")
        count = lambda pattern: len({match[1] for key in tensors if (match := re.match(pattern, key))})
        doublings = count(r"conv_up(\d+)\.weight$")
        if 2**doublings % unshuffle:
            raise DataError(f"{what}: divides sides by {unshuffle}, then doubles them {doublings} times")
        return RRDBConfig(first[0], block[0], count(r"body\.(\d+)\.rdb"), doublings, unshuffle)
    first, slope = shape("body.0.weight"), shape("body.1.weight")
    if len(first) == 4 and len(slope) == 1 and first[0]:
        if first[1] != COLOURS:
            raise DataError(f"{what}: its first layer takes {first[1]} channels, not {COLOURS}")
        layers = [key for key in tensors if re.fullmatch(r"body\.\d+\.weight", key) and tensors[key].ndim == 4]
        last = max(layers, key=lambda key: int(key.split(".")[1]))
        return CompactConfig(first[0], len(layers) - 2, _side(shape(last)[0], f"{what}: its last layer gives"))
    raise DataError(
        f"{what}: not an upscaler of the ESRGAN family (RRDBNet, or SRVGGNetCompact with PReLU); it holds "
        + listing(list(tensors)[:3])
    )


def _side(channels: int, what: str) -> int:
    """The side n of the squares of RGB pixels that n * n * 3 channels are."""
    side = math.isqrt(channels // COLOURS)
    if not side or side * side * COLOURS != channels:
        raise DataError(f"{what} {channels} channels, not {COLOURS} for each pixel of a square")
    return side
