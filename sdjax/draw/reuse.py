"""The settings of a picture again, from the text in its PNG file: sdjax's, A1111's or ComfyUI's."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from sdjax.draw import comfyui
from sdjax.draw.settings import SPACING_LABELS, declarations, from_text
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import parsed_parameters
from sdjax.settings import read_value

_FOR_INFORMATION = {"Model", "Model hash", "Version", "Size", "Seed", "Variation seed"}


def settings_of(image: Image.Image) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings of a picture by name, and the labels that were left out, as sdjax has no such setting.

    Raises DataError for a picture without such a text, and for a graph of ComfyUI that cannot be read.
    """
    text = image.info.get("parameters")
    if not text and any(name in image.info for name in ("prompt", "workflow")):
        return _of_comfyui({str(name): text for name, text in image.info.items()})
    if not isinstance(text, str) or not text.strip():
        raise DataError("this picture holds no settings: give a PNG file as sdjax, A1111 or ComfyUI wrote it")
    prompt, negative, fields = parsed_parameters(text)
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    left_out = []
    labels = _labels(two_passes="Hires upscale" in fields)
    fields = _split_sampler(fields)
    for label, value in fields.items():
        try:
            if label == "Size":
                settings["width"], settings["height"] = (from_text("width", side, label) for side in value.split("x"))
            elif label in labels:
                settings[labels[label]] = _value(labels[label], value)
            elif label not in _FOR_INFORMATION:
                left_out.append(label)
        except (ConfigError, ValueError):
            left_out.append(label)
    return settings, left_out


def _of_comfyui(info: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    given, left_out = comfyui.settings_of(info)
    settings = {}
    for name, value in given.items():
        try:
            settings[name] = read_value(declarations()[name][0], value, name)
        except ConfigError:
            left_out.append(name)
    return settings, left_out


def _labels(*, two_passes: bool) -> dict[str, str]:
    """Label -> name of a setting. A1111 has one label for the strength of a second pass and of redrawing."""
    strength = "hires_strength" if two_passes else "strength"
    names = {declared.label: name for name, (_, declared) in declarations().items() if declared.label}
    return names | {"Denoising strength": strength, "Seed": "seed", "Variation seed": "variation_seed"}


def _value(name: str, text: str) -> Any:
    names = {label.lower(): value for value, label in declarations()[name][1].names.items()}
    if text.lower() in names:
        return names[text.lower()]
    return from_text(name, text.strip("()"), name)


def _split_sampler(fields: dict[str, str]) -> dict[str, str]:
    """Early versions of A1111 write the spacing behind the sampler: `DPM++ 2M Karras`."""
    sampler, _, last = fields.get("Sampler", "").rpartition(" ")
    if sampler and last in SPACING_LABELS.values():
        return {**fields, "Sampler": sampler, "Schedule type": last}
    return fields
