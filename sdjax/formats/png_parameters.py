"""PNG files with the settings of their picture as text, in the form that A1111 writes and ComfyUI and others read."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdjax.runtime.whole_file import replacing

_FIELD = re.compile(r'\s*(\w[\w \-/.]*): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"


class Parameters(NamedTuple):
    """The text of a picture, read. fields: label -> value, as text."""

    prompt: str
    negative_prompt: str
    fields: dict[str, str]


def parsed_parameters(text: str) -> Parameters:
    """Reads the text of a picture, in A1111's form: prompt, negative prompt, and a last line that begins with Steps."""
    *lines, last = text.strip().split("\n")
    fields = {match[1]: match[2].strip().strip('"') for match in _FIELD.finditer(last)}
    if not last.startswith("Steps:"):
        lines, fields = [*lines, last], {}
    begin = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[begin:]).removeprefix(_NEGATIVE).strip()
    return Parameters("\n".join(lines[:begin]).strip(), negative, fields)


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
