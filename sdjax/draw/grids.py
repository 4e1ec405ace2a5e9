"""Several pictures in one image: plain sheets, sheets with captions, and labelled grids (A1111's X/Y plot)."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from sdjax.draw.settings import declarations, from_text
from sdjax.errors import ConfigError

_FONT, _LINE, _GAP, _BORDER = 14, 22, 4, 6  # pixels


class Axis(NamedTuple):
    """A setting and its values, such as `--grid-x steps=10,20` gives."""

    name: str
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """A label for each value. Files are labelled by the part of their path that differs."""
        values = _distinct_parts([file for (file,) in self.values]) if self.name == "lora" else self.values
        return [f"{self.name}: {value}" for value in values]


def _distinct_parts(files: Sequence[str]) -> list[str]:
    """The files without the path components that all begin or end with: a and b for runs/a/x.pt and runs/b/x.pt."""
    parts = [file.split("/") for file in files if file != "none"]
    shortest = min(map(len, parts), default=0)

    def shared(places: Sequence[int]) -> int:
        return next((n for n, place in enumerate(places) if len({p[place] for p in parts}) > 1), len(places))

    head = shared(range(shortest - 1))
    tail = shared([-1 - n for n in range(shortest - 1 - head)])
    return [file if file == "none" else "/".join(file.split("/")[head:][: -tail or None]) for file in files]


def parse_axis(text: str) -> Axis:
    r"""Reads an axis from `NAME=VALUE,VALUE`, where `\,` is a comma in a value. Raises ConfigError."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    names = [name for name, (_, declared) in declarations().items() if declared.axis]
    if not equals or name not in names:
        raise ConfigError(f"grid {text!r}: give NAME=VALUE,VALUE with a name of {', '.join(names)}")
    parts = [part.replace("\\,", ",").strip() for part in re.split(r"(?<!\\),", values)]
    return Axis(name, tuple(from_text(name, part, f"grid {text!r}: {name}") for part in parts))


def sheets(pictures: Sequence[Image.Image], axes: Sequence[Axis], columns: int) -> Iterator[tuple[str, Image.Image]]:
    """Yields (file name, sheet): a sheet of all pictures if they have one size or, with axes, a grid for each job."""
    if not axes:
        if len(pictures) > 1 and len({picture.size for picture in pictures}) == 1:
            yield "grid.png", sheet(pictures, columns=columns if columns > 1 else None)
        return
    x, y = (*(axis.labels for axis in axes), [])[:2]
    size = len(x) * max(len(y), 1)
    for i in range(0, len(pictures), size):
        name = "grid.png" if len(pictures) == size else f"grid-{i // size}.png"
        yield name, labelled(pictures[i : i + size], x, y)


def sheet(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Puts pictures of one size in rows. By default the number of columns makes the sheet as square as possible."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    whole = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * width, i // columns * height))
    return whole


def labelled(pictures: Sequence[Image.Image], columns: Sequence[str], rows: Sequence[str]) -> Image.Image:
    """Puts pictures in rows, with a label above each column and to the left of each row.

    All cells have the size of the largest picture.
    """
    font = ImageFont.load_default(_FONT)
    margin = max((math.ceil(font.getlength(label)) for label in rows), default=0) + 2 * _GAP
    widest = max(math.ceil(font.getlength(label)) for label in columns) + 2 * _GAP
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures), strict=True))
    width = max(width, widest)
    size = (margin + len(columns) * (width + _GAP), _LINE + max(len(rows), 1) * (height + _GAP))
    whole = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(whole)
    for x, label in enumerate(columns):
        pen.text((margin + x * (width + _GAP) + width / 2, _LINE / 2), label, "black", font, anchor="mm")
    for y, label in enumerate(rows):
        pen.text((_GAP, _LINE + y * (height + _GAP) + height / 2), label, "black", font, anchor="lm")
    for i, picture in enumerate(pictures):
        y, x = divmod(i, len(columns))
        left = margin + x * (width + _GAP) + (width - picture.width) // 2
        whole.paste(picture, (left, _LINE + y * (height + _GAP)))
    return whole


def captioned(pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int) -> Image.Image:
    """Puts pictures of one size in rows, each above its caption. Small pictures are enlarged, for longer captions."""
    factor = -(-192 // pictures[0].width)
    width, height = (side * factor for side in pictures[0].size)
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (_BORDER + columns * (width + _BORDER), _BORDER + rows * (height + _LINE + _BORDER))
    whole = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(_FONT)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _corner(i, columns, width, height)
        whole.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + height + 2), _shortened(caption, font, width), fill="black", font=font)
    return whole


def uncaptioned(sheet: Image.Image, count: int, *, columns: int) -> list[Image.Image]:
    """Returns the pictures of a sheet that `captioned` made of so many, as large as they are there."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = (sheet.width - _BORDER) // columns - _BORDER
    height = (sheet.height - _BORDER) // rows - _LINE - _BORDER
    corners = [_corner(i, columns, width, height) for i in range(count)]
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def _corner(i: int, columns: int, width: int, height: int) -> tuple[int, int]:
    y, x = divmod(i, columns)
    return _BORDER + x * (width + _BORDER), _BORDER + y * (height + _LINE + _BORDER)


def _shortened(text: str, font: Any, width: int) -> str:
    """Cuts a text so that it fits into a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
