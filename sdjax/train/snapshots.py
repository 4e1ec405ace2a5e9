"""The files that a stage writes during training, in export/STAGE/steps/: finding, choosing and removing them.

`lora-000100.safetensors`, `WORD-000100.safetensors`, `README-000100.md` and `samples-000100.png` are the export as it
would be after 100 steps. `steps.md` is a table of them that marks the best by held-out loss. See `export.export`, which
writes them.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from sdjax.runtime.whole_file import replacing
from sdjax.train.curves import read_metrics

CARD, GRID = "README.md", "samples.png"
_NAME = re.compile(r"(?P<stem>.+)-(?P<step>\d{6,})(?P<suffix>\.\w+)")


def numbered(name: str, step: int) -> str:
    """Returns the name of a file of the export with a step: `lora.safetensors` -> `lora-000100.safetensors`."""
    path = Path(name)
    return f"{path.stem}-{step:06d}{path.suffix}"


def found(folder: Path) -> dict[int, dict[str, Path]]:
    """Returns step -> name in the export -> file, of the steps that are complete, in ascending order.

    The card of a step is written last, and removed first.
    """
    steps: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := _NAME.fullmatch(path.name):
            steps.setdefault(int(match["step"]), {})[match["stem"] + match["suffix"]] = path
    return {step: files for step, files in sorted(steps.items()) if CARD in files}


def losses(metrics: Path, stage: str) -> dict[int, float]:
    """Returns step -> held-out loss of a stage, from metrics.jsonl."""
    return {
        line["step"]: line["held_out_loss"]
        for line in read_metrics(metrics)
        if line["stage"] == stage and line.get("held_out_loss") is not None
    }


def best(steps: Mapping[int, object], measured: Mapping[int, float]) -> int | None:
    """Returns the step with the lowest held-out loss, the first of several; None if none was measured."""
    return min((step for step in steps if step in measured), key=lambda step: (measured[step], step), default=None)


def tidy(folder: Path, measured: Mapping[int, float], *, keep: int) -> None:
    """Removes all steps but the newest `keep` (0: none) and the best, and writes the table of the others."""
    steps = found(folder)
    chosen = best(steps, measured)
    for step in list(steps)[:-keep] if keep else []:
        if step != chosen:
            _remove(steps.pop(step))
    rows = [f"| {step} | {_shown(measured.get(step))} | {'best' if step == chosen else ''} |" for step in steps]
    with replacing(folder / "steps.md") as file:
        file.write("\n".join(["| step | held-out loss | |", "|---|---|---|", *rows, ""]).encode())


def remove_later(folder: Path, step: int) -> None:
    """Removes the steps after `step`, which a run that goes on from there will write again."""
    for later, files in found(folder).items():
        if later > step:
            _remove(files)


def pick(export: Path, files: Mapping[str, Path]) -> None:
    """Copies the files of a step (see `found`) to the export of its stage. The card is written last."""
    if GRID not in files:
        (export / GRID).unlink(missing_ok=True)  # it shows another step
    for name in sorted(files, key=lambda name: name == CARD):
        with replacing(export / name) as file, files[name].open("rb") as source:
            shutil.copyfileobj(source, file)


def _remove(files: Mapping[str, Path]) -> None:
    for name in sorted(files, key=lambda name: name != CARD):
        files[name].unlink()


def _shown(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.5f}"
