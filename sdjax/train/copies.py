"""What the copies of a run differ in and how each ended, side by side: a table and a grid of pictures."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.draw import grids
from sdjax.formats.png_parameters import save_png
from sdjax.runtime.whole_file import replacing
from sdjax.train.config import NUMBERS, RunConfig, Stage
from sdjax.train.validation import Validator

log = logging.getLogger(__name__)

LONGEST_LABEL = 32  # characters


def compare(config: RunConfig, validators: Sequence[Validator]) -> None:
    """Writes OUTPUT/copies.md and logs it, and OUTPUT/copies.png if there are pictures.

    The table has the losses of the last stage. validators: of each copy that of the last stage, which is done.
    """
    members, last = config.members(), config.stages[-1].name
    names = [copy.name for copy in config.copies]
    differing = differences(config)
    rows = []
    for i, member in enumerate(members):
        lines = [json.loads(line) for line in Path(member.output, "metrics.jsonl").read_text().splitlines()]
        settings = {name: _shown(values[i]) for name, values in differing.items()}
        rows.append({"copy": names[i]} | settings | _losses([line for line in lines if line["stage"] == last]))
    table = _table(rows)
    with replacing(Path(config.output) / "copies.md") as file:
        file.write(f"# {Path(config.output).name}: stage {last} of {len(names)} copies\n\n{table}".encode())
    log.info("%s", table.rstrip())
    prompts = config.validation.prompts  # without the words of a copy
    prompts = [*prompts, *validators[0].captions[len(prompts) :]]
    if prompts:
        pictures = [picture for row in zip(*(each.pictures for each in validators), strict=True) for picture in row]
        grid = grids.labelled(pictures, [_short(name) for name in names], [_short(prompt) for prompt in prompts])
        save_png(grid, Path(config.output) / "copies.png")


def differences(config: RunConfig) -> dict[str, list[Any]]:
    """Returns name -> the value of each copy, for the settings in which copies differ.

    The name of a setting of a stage has that of the stage in front, unless there is only one stage.
    """
    members = config.members()
    columns: dict[str, list[Any]] = {
        "seed": [member.seed for member in members],
        "path": [member.data.path for member in members],
    }
    for number, stage in enumerate(config.stages):
        before = f"{stage.name}." if len(config.stages) > 1 else ""
        for name in ("placeholder_tokens", "init_tokens", *NUMBERS):
            columns[before + name] = [_value(member.stages[number], name) for member in members]
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def _value(stage: Stage, name: str) -> Any:
    value = getattr(stage, name)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    return float(stage.lora_rank) if name == "lora_alpha" and value is None else value


def _losses(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    skipped = sum("loss" in line and None in (line["loss"], line["grad_norm"]) for line in lines)
    known = [loss for loss in losses[-max(1, len(losses) // 10) :] if loss is not None]
    return {
        **({"held-out loss before": _shown(held_out[0]), "and after": _shown(held_out[-1])} if held_out else {}),
        "training loss, last tenth": _shown(sum(known) / len(known)) if known else "-",
        **({"steps not finite": str(skipped)} if skipped else {}),
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 3]}..."


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a table in Markdown whose columns are aligned as plain text, too."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([row.get(name, "-").replace("|", "\\|") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells]
    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"
