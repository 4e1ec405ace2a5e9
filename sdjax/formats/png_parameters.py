"""PNG files with the settings of their picture as text, in the form that A1111 writes and ComfyUI and others read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.runtime.whole_file import replacing


def parameters_text(prompt: str, negative_prompt: str, fields: Mapping[str, Any]) -> str:
    """The text of one picture in A1111's form. fields: label -> value, in the order of the text."""
    lines = [prompt, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])]
    return "\n".join([*lines, _joined({**fields, "Version": "sdjax"})])


def with_fields(text: str, fields: Mapping[str, Any]) -> str:
    """The text of a picture with more fields at its end."""
    return f"{text}, {_joined(fields)}"


def _joined(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{label}: {_quoted(value)}" for label, value in fields.items())


def _quoted(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', "'") + '"' if any(mark in text for mark in ',:"\n') else text


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG file, with the text in `image.info["parameters"]` if there is one.

    An earlier file stays as it was if writing fails.
    """
    info = PngInfo()
    if "parameters" in image.info:
        info.add_text("parameters", image.info["parameters"])
    with replacing(Path(path)) as file:
        image.save(file, format="PNG", pnginfo=info)
