"""The curves of a run's losses as a picture, from the lines of metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 720, 240, 64, 28, 24, 12  # pixels of a panel
_SCALE = 2
"""The panels are drawn so much larger and then shrunk, since ImageDraw's lines have rough edges."""
_COLOURS = {"loss of a step": "#c8d4e3", "loss, smoothed": "#2563a8", "held-out loss": "#c2410c"}

Point = tuple[float, float]


class Curve(NamedTuple):
    """A line through points (step, value). name: one of _COLOURS. marked: show each point."""

    name: str
    points: Sequence[Point]
    marked: bool = False


def loss_curves(lines: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Returns a panel for each stage, one below the other, or None if no step has a loss."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    panels = []
    for stage in stages:
        own = [line for line in lines if line["stage"] == stage]
        each = [(line["step"], line["loss"]) for line in own if line.get("loss") is not None]
        held_out = [(line["step"], line["held_out_loss"]) for line in own if line.get("held_out_loss") is not None]
        if each:
            curves = Curve("loss of a step", each), Curve("loss, smoothed", smoothed(each))
            panels.append(_panel(stage, [*curves, *([Curve("held-out loss", held_out, True)] if held_out else [])]))
    if not panels:
        return None
    whole = Image.new("RGB", (_WIDTH, sum(panel.height for panel in panels)), "white")
    for i, panel in enumerate(panels):
        whole.paste(panel, (0, i * _HEIGHT))
    return whole


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean that a step enters with weight 1 / 20, without a bias towards zero at the beginning."""
    total = weight = 0.0
    out = []
    for step, value in points:
        total, weight = 0.95 * total + value, 0.95 * weight + 1
        out.append((step, total / weight))
    return out


def _panel(title: str, curves: Sequence[Curve]) -> Image.Image:
    """Draws curves with axes. The first curve, that of single steps, is cut off at its outer twentieths."""
    image = Image.new("RGB", (_SCALE * _WIDTH, _SCALE * _HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _SCALE)
    steps = [step for curve in curves for step, _ in curve.points]
    each = sorted(value for _, value in curves[0].points)
    usual = each[len(each) // 20 : len(each) - len(each) // 20]
    values = usual + [value for curve in curves[1:] for _, value in curve.points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    margin = 0.1 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    low, high = min(values) - margin, max(values) + margin
    right, bottom = _WIDTH - _GAP, _HEIGHT - _BOTTOM

    def place(point: Point) -> Point:
        step, value = point
        x = _LEFT + (step - first) / (last - first) * (right - _LEFT)
        y = bottom - (min(max(value, low), high) - low) / (high - low) * (bottom - _TOP)
        return _SCALE * x, _SCALE * y

    for value in _ticks(low, high):
        _, y = place((first, value))
        pen.line([(_SCALE * _LEFT, y), (_SCALE * right, y)], "#e5e7eb", _SCALE)
        pen.text((_SCALE * (_LEFT - 6), y), f"{value:.4g}", "black", font, anchor="rm")
    for step in _ticks(first, last):
        x, _ = place((step, low))
        pen.text((x, _SCALE * (bottom + 5)), f"{step:g}", "black", font, anchor="mt")
    for curve in curves:
        points = [place(point) for point in curve.points]
        if len(points) > 1:
            pen.line(points, _COLOURS[curve.name], _SCALE if curve is curves[0] else 2 * _SCALE, joint="curve")
        for x, y in points if curve.marked or len(points) == 1 else ():
            pen.ellipse([x - 3 * _SCALE, y - 3 * _SCALE, x + 3 * _SCALE, y + 3 * _SCALE], _COLOURS[curve.name])
    x = _SCALE * _LEFT
    for text, colour in [(title, "black"), *((curve.name, _COLOURS[curve.name]) for curve in curves)]:
        pen.text((x, _SCALE * _TOP / 2), text, colour, font, anchor="lm")
        x += font.getlength(text) + 16 * _SCALE
    return image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two values, four to ten of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
