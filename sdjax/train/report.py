"""The report of a run: one HTML file with its curves, pictures, files and settings, from the folder of the run alone.

The file loads nothing else. Every text that comes from the run is escaped.
"""

import base64
import io
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sdjax.errors import DataError
from sdjax.runtime.whole_file import replacing
from sdjax.train import snapshots
from sdjax.train.config import Data, RunConfig, Stage
from sdjax.train.config_file import flatten, load_run
from sdjax.train.curves import CLASSES, read_metrics, smoothed, stage_curves, svg

NAME = "report.html"
"""The file in the folder of the run."""

_WIDEST, _LARGEST = 1600, 400_000
"""A picture that is wider (pixels) or larger (bytes) is embedded as WebP of this width."""
_WHAT = {
    "lora": "a LoRA",
    "textual_inversion": "new words",
    "unet": "the whole U-Net",
    "text_encoder": "the whole text encoder",
    "text_encoder_2": "the whole second text encoder",
    "vae": "the autoencoder",
}


def write(run: Path) -> Path:
    """Writes the report into the folder of a run and returns its path.

    Raises DataError for a folder that is not a run's, or that cannot be written.
    """
    text = html(run)
    try:
        with replacing(run / NAME) as file:
            file.write(text.encode())
    except OSError as e:
        raise DataError(f"{run / NAME} cannot be written: {e.strerror or e}") from e
    return run / NAME


def html(run: Path) -> str:
    """Returns the report of a run as HTML. Raises DataError for a folder that is not a run's."""
    config = load_run(run, None)
    lines = read_metrics(run / "metrics.jsonl")
    title = escape(run.resolve().name)
    parts = list(_head(config, lines, title))
    for stage in config.stages:
        parts += _stage(run, config, stage, lines)
    parts += ["<section>", *_settings("Settings of the run", _of_run(config)), "</section>"]
    return _PAGE.format(title=title, style=_STYLE + CURVES, body="\n".join(parts))


def _head(config: RunConfig, lines: Sequence[Mapping[str, Any]], title: str) -> Iterator[str]:
    total = sum(stage.steps for stage in config.stages)
    done = sum(_steps_done(lines, stage.name) for stage in config.stages)
    yield f"<header><h1>{title}</h1>"
    yield _facts({"Base model": config.model, "Steps": f"{done} of {total}", "Number type": config.dtype})
    if beneath := [*(each.path for each in config.base.loras), *config.base.embeddings]:
        yield f"<p>On top of {escape(', '.join(beneath))}</p>"
    yield "</header>"


def _stage(run: Path, config: RunConfig, stage: Stage, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    name = stage.name
    yield f'<section><h2>{escape(name)}</h2><p class="what">{escape(_summary(stage, config.data_of(stage)))}</p>'
    curves = stage_curves(lines, name)
    yield _facts(_measured(run, stage, lines))
    if curves:
        keys = "".join(f'<li class="{CLASSES[curve.name]}">{escape(curve.name)}</li>' for curve in curves)
        yield f'<ul class="legend">{keys}</ul><div class="scroll" tabindex="0">{svg(name, curves)}</div>'
    else:
        yield "<p>No step has been taken yet.</p>"
    samples = run / "samples"
    yield from _picture(samples / f"{name}-before-after.png", "Before and after")
    yield from sheets(run, name)
    files = [path for path in sorted((run / "export" / name).glob("*")) if path.is_file()]
    if files:
        rows = "".join(f"<tr><td>{escape(path.name)}</td><td>{_size(path)}</td></tr>" for path in files)
        yield f"<h3>Files in export/{escape(name)}</h3><table>{rows}</table>"
    yield from _settings("Settings", _of_stage(stage))
    yield "</section>"


def _summary(stage: Stage, data: Data) -> str:
    """One line on what a stage trains, and how."""
    more = {"lora": f" of rank {stage.lora_rank}", "textual_inversion": f" {', '.join(stage.placeholder_tokens)}"}
    what = " and ".join(_WHAT[kind] + more.get(kind, "") for kind in stage.train)
    batch = data.batch_size * data.accumulation
    return f"Trains {what}: {stage.steps} steps of {batch} pictures, {data.resolution} pixels"


def _measured(run: Path, stage: Stage, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The numbers of a stage: name -> value."""
    own = [line for line in lines if line["stage"] == stage.name and line.get("loss") is not None]
    held_out = snapshots.losses(run / "metrics.jsonl", stage.name)
    facts = {"Steps": f"{_steps_done(lines, stage.name)} of {stage.steps}"}
    if own:
        facts["Loss, smoothed"] = f"{smoothed([(line['step'], line['loss']) for line in own])[-1][1]:.4f}"
    if held_out:
        step = snapshots.best(held_out, held_out)
        assert step is not None
        facts["Held-out loss"] = f"{list(held_out.values())[-1]:.4f}"
        facts["Best held-out loss"] = f"{held_out[step]:.4f} at step {step}"
    if rates := [line["examples_per_second"] for line in own if line.get("examples_per_second")]:
        facts["Pictures a second"] = f"{statistics.median(rates):.3g}"
    return facts


def _steps_done(lines: Sequence[Mapping[str, Any]], stage: str) -> int:
    return max((line["step"] for line in lines if line["stage"] == stage), default=0)


def sheets(run: Path, stage: str, most: int = 12) -> Iterator[str]:
    """Yields HTML of the pictures of a stage over time: sheets of at most so many steps, the last among them."""
    pattern = re.compile(re.escape(stage) + r"-(\d+)\.png")
    files = (run / "samples").glob("*.png")
    found = {int(match[1]): path for path in files if (match := pattern.fullmatch(path.name))}
    steps = sorted(found)
    if len(steps) > most:
        steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
    if steps:
        figures = "".join(_figure(found[step], f"step {step}") for step in steps)
        yield f'<h3>Pictures over time</h3><div class="strip" tabindex="0">{figures}</div>'


def _of_run(config: RunConfig) -> dict[str, Any]:
    values = flatten(config)
    return {key: value for key, value in values.items() if not key.startswith("stages.")}


def _of_stage(stage: Stage) -> dict[str, Any]:
    """The settings of a stage that differ from their defaults."""
    usual = flatten(Stage("", (), 0, 0.0))  # type: ignore[arg-type]
    return {key: value for key, value in flatten(stage).items() if usual.get(key) != value}  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ pieces of HTML


def _facts(facts: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in facts.items())}</dl>"


def _settings(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(_shown(value))}</td></tr>" for key, value in values.items())
    yield f"<details><summary>{escape(title)}</summary><table>{rows}</table></details>"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _picture(path: Path, title: str) -> Iterator[str]:
    if path.exists():
        yield f"<h3>{escape(title)}</h3>{_figure(path)}"


def _figure(path: Path, caption: str = "") -> str:
    """A picture in the page itself, or a line that says why it cannot be shown."""
    try:
        kind, data = _embedded(path)
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        return f"<p>{escape(path.name)} cannot be read: {escape(str(e))}</p>"
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<figure><img src="{source}" alt="{escape(path.stem)}">{text}</figure>'


def _embedded(path: Path) -> tuple[str, bytes]:
    """Returns the format and the bytes of a picture for the page, as WebP if the file is large."""
    with Image.open(path) as image:
        image.load()
        if image.format == "PNG" and image.width <= _WIDEST and path.stat().st_size <= _LARGEST:
            return "png", path.read_bytes()
        image.thumbnail((_WIDEST, 16 * _WIDEST))
        file = io.BytesIO()
        image.save(file, "WEBP", quality=85)
    return "webp", file.getvalue()


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


CURVES = """
:root { --line: #dfe3e8; --soft: #5b6675; --each: #9fb3cc; --smoothed: #2563a8; --held-out: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --line: #323b47; --soft: #9aa5b4; --each: #54698a; --smoothed: #6aa9ee;
  --held-out: #f59352; } }
.scroll { overflow-x: auto; } .curves { display: block; width: 100%; min-width: 560px; height: auto; margin-top: 4px; }
.curves text { fill: var(--soft); font-size: 12px; }
.curves polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } .curves .each { stroke-width: 1; }
.tick { stroke: var(--line); }
polyline.each { stroke: var(--each); } polyline.smoothed { stroke: var(--smoothed); }
polyline.held-out { stroke: var(--held-out); }
circle.each { fill: var(--each); } circle.smoothed { fill: var(--smoothed); } circle.held-out { fill: var(--held-out); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 18px 0 0; padding: 0; list-style: none;
  font-size: 13px; }
.legend li { list-style: none; }
.legend li::before { content: ""; display: inline-block; width: 18px; height: 3px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.legend .each::before { background: var(--each); } .legend .smoothed::before { background: var(--smoothed); }
.legend .held-out::before { background: var(--held-out); }
.strip { display: flex; gap: 12px; overflow-x: auto; padding-bottom: 8px; } .strip figure { flex: 0 0 min(430px, 82%);
  margin: 0; }
.strip img { width: 100%; } .strip figcaption { color: var(--soft); font-size: 13px; }
"""
"""The style of curves and sheets, which the page of `sdjax app` shows too."""

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5b6675; --page: #f6f7f9; --card: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e9ee; --soft: #9aa5b4; --page: #12161c; --card: #1b212a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1000px; padding: 24px 16px 64px; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 8px; font-size: 28px; } h2 { margin: 0; font-size: 21px; } h3 { margin: 28px 0 8px; font-size: 16px; }
section, header { margin-bottom: 20px; padding: 20px; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.what { margin: 2px 0 14px; color: var(--soft); }
dl { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 0; } dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; } img { max-width: 100%; max-height: 900px; border-radius: 6px; border: 1px solid var(--line); }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
td, th { padding: 4px 8px 4px 0; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400;
  vertical-align: top; }
th { width: 40%; color: var(--soft); }
details { margin-top: 22px; } section > details:only-child { margin: 0; } summary { cursor: pointer; font-weight: 600; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}: training report</title><style>{style}</style></head>
<body>
{body}
</body>
</html>
"""
