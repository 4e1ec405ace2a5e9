"""The curves of a run's losses, as a picture or as SVG, from the lines of metrics.jsonl."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 720, 240, 64, 28, 24, 12  # pixels of a panel
_SCALE = 2
"""The panels are drawn so much larger and then shrunk, since ImageDraw's lines have rough edges."""
_COLOURS = {"loss of a step": "#c8d4e3", "loss, smoothed": "#2563a8", "held-out loss": "#c2410c"}

CLASSES = {"loss of a step": "each", "loss, smoothed": "smoothed", "held-out loss": "held-out"}
"""Name of a curve -> its class in SVG. The axes have `tick`."""

Point = tuple[float, float]


class Curve(NamedTuple):
    """A line through points (step, value). name: one of _COLOURS. marked: show each point."""

    name: str
    points: Sequence[Point]
    marked: bool = False


class Frame(NamedTuple):
    """What an axis of steps and one of values show. Values outside are drawn at the edge."""

    first: float
    last: float
    low: float
    high: float

    def place(self, point: Point) -> Point:
        """The pixels (x, y) of a point (step, value) in a panel."""
        step, value = point
        right, bottom = _WIDTH - _GAP, _HEIGHT - _BOTTOM
        x = _LEFT + (step - self.first) / (self.last - self.first) * (right - _LEFT)
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return x, bottom - share * (bottom - _TOP)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl that have a stage and a step; none if there is no file.

    A line that a running or killed run has not finished is left out.
    """
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("stage"), str) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def loss_curves(lines: Sequence[Mapping[str, Any]]) -> Image.Image | None:
    """Returns a panel for each stage, one below the other, or None if no step has a loss."""
    stages = dict.fromkeys(line["stage"] for line in lines)
    panels = [_panel(stage, curves) for stage in stages if (curves := stage_curves(lines, stage))]
    if not panels:
        return None
    whole = Image.new("RGB", (_WIDTH, sum(panel.height for panel in panels)), "white")
    for i, panel in enumerate(panels):
        whole.paste(panel, (0, i * _HEIGHT))
    return whole


def stage_curves(lines: Sequence[Mapping[str, Any]], stage: str) -> list[Curve]:
    """Returns the loss of a stage, the same smoothed and, if it was measured, the held-out loss. Empty before a step.

    The loss of single steps comes first.
    """
    own = [line for line in lines if line["stage"] == stage]
    each = [(line["step"], line["loss"]) for line in own if line.get("loss") is not None]
    held_out = [(line["step"], line["held_out_loss"]) for line in own if line.get("held_out_loss") is not None]
    if not each:
        return []
    curves = [Curve("loss of a step", each), Curve("loss, smoothed", smoothed(each))]
    return [*curves, *([Curve("held-out loss", held_out, True)] if held_out else [])]


def svg(title: str, curves: Sequence[Curve]) -> str:
    """Returns a panel of `stage_curves` as an SVG element, whose CSS classes say what is what; see `CLASSES`."""
    frame = _frame(curves)
    right, bottom = _WIDTH - _GAP, _HEIGHT - _BOTTOM
    parts = []
    for value in _ticks(frame.low, frame.high):
        _, y = frame.place((frame.first, value))
        parts.append(f'<line class="tick" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step in _ticks(frame.first, frame.last):
        x, _ = frame.place((step, frame.low))
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{step:g}</text>')
    for curve in curves:
        kind = CLASSES[curve.name]
        points = [frame.place(point) for point in _thinned(curve.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        for (x, y), (step, value) in zip(points, _thinned(curve.points), strict=True):
            if curve.marked or len(points) == 1:
                parts.append(
                    f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                    f"<title>step {step:g}: {value:.5g}</title></circle>"
                )
    label = escape(f"{title}: {', '.join(curve.name for curve in curves)} over {frame.last:g} steps")
    view = f"0 0 {_WIDTH} {_HEIGHT}"
    return f'<svg class="curves" viewBox="{view}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean that a step enters with weight 1 / 20, without a bias towards zero at the beginning."""
    total = weight = 0.0
    out = []
    for step, value in points:
        total, weight = 0.95 * total + value, 0.95 * weight + 1
        out.append((step, total / weight))
    return out


def _frame(curves: Sequence[Curve]) -> Frame:
    """Returns the frame of curves. The first curve, that of single steps, is cut off at its outer twentieths."""
    steps = [step for curve in curves for step, _ in curve.points]
    each = sorted(value for _, value in curves[0].points)
    usual = each[len(each) // 20 : len(each) - len(each) // 20]
    values = usual + [value for curve in curves[1:] for _, value in curve.points]
    margin = 0.1 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return Frame(min(steps), max(max(steps), min(steps) + 1), min(values) - margin, max(values) + margin)


def _panel(title: str, curves: Sequence[Curve]) -> Image.Image:
    """Draws curves with axes."""
    image = Image.new("RGB", (_SCALE * _WIDTH, _SCALE * _HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _SCALE)
    frame = _frame(curves)
    right, bottom = _WIDTH - _GAP, _HEIGHT - _BOTTOM

    def place(point: Point) -> Point:
        x, y = frame.place(point)
        return _SCALE * x, _SCALE * y

    for value in _ticks(frame.low, frame.high):
        _, y = place((frame.first, value))
        pen.line([(_SCALE * _LEFT, y), (_SCALE * right, y)], "#e5e7eb", _SCALE)
        pen.text((_SCALE * (_LEFT - 6), y), f"{value:.4g}", "black", font, anchor="rm")
    for step in _ticks(frame.first, frame.last):
        x, _ = place((step, frame.low))
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


def _thinned(points: Sequence[Point], most: int = 1000) -> Sequence[Point]:
    """Returns at most so many of the points, evenly chosen, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two values, four to ten of them: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
