"""The reports of a run: a line of metrics.jsonl for each step, the same for its trackers, the curves, and the bar.

The numbers of a step are read from the device while the next step runs, so that the device never waits.
"""

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from sdjax.errors import DataError, TrainingStopped
from sdjax.runtime import processes
from sdjax.runtime.whole_file import replacing
from sdjax.train.curves import loss_curves, read_metrics
from sdjax.train.progress import Progress
from sdjax.train.stages import Run, StagePlan
from sdjax.train.trackers import Course, Place, Trackers

log = logging.getLogger(__name__)

MOST_SKIPPED = 20
"""Even with on_nan = 'skip' a run stops after this many steps in a row whose loss or gradient is not finite."""


class Metrics:
    """Writes `{"stage", "step", "loss", ...}` for each step, `{"stage", "step", "held_out_loss"}` for each validation.

    A validation that draws held-out captions also has `held_out_distance`, see `likeness.distance`.

    `step` counts the optimizer steps done in the stage: 1 after the first step, 0 in the validation before it. With
    float16 a line also has `loss_scale`, the scale of the step, and `skipped_steps`, the steps skipped so far.
    The trackers of the run get the numbers of each line, and pictures.
    """

    def __init__(self, path: Path, run: Run, *, stage: int, step: int) -> None:
        """Goes on after `step` steps of stage number `stage`, and removes the lines after that position."""
        self._path = path
        self._name = path.parent.name  # names the copy in messages
        self._on_nan = run.config.on_nan
        self._skipped = 0
        self._waiting: tuple[int, Mapping[str, Array]] | None = None
        self._since = time.perf_counter()
        names = [plan.stage.name for plan in run.stages]
        ends = itertools.accumulate(plan.stage.steps for plan in run.stages)
        self._before = dict(zip(names, (0, *ends), strict=False))
        """Stage -> the steps of the stages before it."""
        written = _drop_later_lines(path, names, stage, step) if processes.is_first() else []
        last = max(map(self._place, written), default=Place(-1))
        course = Course(self._before[names[stage]] + step, names[stage], last)
        self._trackers = Trackers(run.config, course)

    @contextlib.contextmanager
    def of_stage(self, plan: StagePlan, step: int, *, shown: bool = True) -> Iterator[None]:
        """Within the block, lines belong to this stage. Its progress bar starts at `step`; shown: show the bar."""
        self._plan = plan
        shown = shown and processes.is_first()
        self.progress = Progress(plan.stage.name, steps=plan.stage.steps, done=step, shown=shown)
        with contextlib.closing(self.progress):
            yield

    def measured(self, step: int, values: Mapping[str, Array]) -> None:
        """Keeps the numbers of a step that has just begun. The next call of `read` reads them."""
        self._waiting = step, values

    def read(self) -> None:
        """Writes the line of the step that `measured` keeps, if any. Raises TrainingStopped if it was not finite."""
        if self._waiting is None:
            self._since = time.perf_counter()
            return
        (step, values), self._waiting = self._waiting, None
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        scaling = {}
        if "loss_scale" in values:
            scaling = {"loss_scale": float(values["loss_scale"]), "skipped_steps": int(values["skipped_steps"])}
        now = time.perf_counter()
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # another device is busy with the next step
            rates = self._plan.recipe.optimizer.learning_rates(int(values["updates"]))
        rate, different = next(iter(rates.values())), len(set(rates.values())) > 1
        line = {
            "stage": self._plan.stage.name,
            "step": step,
            "loss": _finite(loss),
            "learning_rate": {part: _finite(rate) for part, rate in rates.items()} if different else _finite(rate),
            "grad_norm": _finite(norm),
            **({"row_norm": _finite(values["row_norm"])} if "row_norm" in values else {}),
            **scaling,
            "examples_per_second": round(self._plan.examples / max(now - self._since, 1e-9), 3),
        }
        self._since = now
        self.write(line)
        self.progress.show(loss=loss, lr=max(rates.values()))
        self.progress.step()
        self._check_finite(step, bool(values["finite"]), loss, norm)

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line to metrics.jsonl. Raises DataError if the file cannot be written."""
        if not processes.is_first():
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as e:
            raise DataError(f"{self._path} cannot be written: {e.strerror or e}") from e
        self._trackers.numbers(self._place(line), dict(_numbers(line["stage"], line)))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Gives the trackers a PNG file of the validation after `step` steps of the present stage."""
        stage = self._plan.stage.name
        self._trackers.picture(Place(self._before[stage] + step, validation=True), f"{stage}/{name}", path)

    def draw_losses(self) -> Path | None:
        """Draws the losses so far beside metrics.jsonl. Returns the path of the picture, or None before a step."""
        picture = loss_curves(read_metrics(self._path))
        if picture is None:
            return None
        path = self._path.with_name("loss.png")
        with replacing(path) as file:
            picture.save(file, "PNG")
        return path

    def close(self) -> None:
        """Closes the trackers."""
        self._trackers.close()

    def held_out(self, step: int, loss: float, distance: float | None = None) -> None:
        """Writes and logs the held-out loss, and the distance of pictures from the held-out images if there is one."""
        measured = {} if distance is None else {"held_out_distance": _finite(distance)}
        self.write({"stage": self._plan.stage.name, "step": step, "held_out_loss": _finite(loss), **measured})
        self.progress.show(held_out=loss)
        shown = "" if distance is None else f", pictures {distance:.4f} from the held-out images"
        log.info("%s, %s, step %d: held-out loss %.5f%s", self._name, self._plan.stage.name, step, loss, shown)

    def _place(self, line: Mapping[str, Any]) -> Place:
        return Place(self._before[line["stage"]] + line["step"], "held_out_loss" in line)

    def _check_finite(self, step: int, finite: bool, loss: float, norm: float) -> None:
        event = f"{self._name}, stage {self._plan.stage.name}, step {step}: loss {loss:g}, gradient norm {norm:g}"
        self._skipped = 0 if finite else self._skipped + 1
        if finite:
            if not math.isfinite(norm):
                log.info("%s: step skipped, and the loss scale lowered", event)
            return
        if self._on_nan == "skip" and self._skipped < MOST_SKIPPED:
            log.warning("%s: step skipped", event)
            return
        times = f" for {self._skipped} steps in a row" if self._skipped > 1 else ""
        raise TrainingStopped(
            f"{event}{times}. The weights are those of the step before; the last checkpoint is untouched.\n"
            "Try a lower learning_rate, warmup_steps, or dtype = 'float32'; on_nan = 'skip' skips single steps."
        )


def _finite(value: Any) -> float | None:
    """The number for JSON, which has no NaN and no infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def _numbers(stage: str, line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a line with their names for trackers, such as `style/learning_rate/unet`."""
    for name, value in line.items():
        if name in ("stage", "step") or value is None:
            continue
        inner = {f"/{part}": number for part, number in value.items()} if isinstance(value, dict) else {"": value}
        yield from ((f"{stage}/{name}{part}", float(number)) for part, number in inner.items() if number is not None)


def _drop_later_lines(path: Path, stages: list[str], stage: int, step: int) -> list[dict[str, Any]]:
    """Removes the lines after a position of the run: `step` steps of stage number `stage`. Returns all there were.

    A validation at this very position is also removed, since it is done again, and so is a line cut off by a crash.
    """
    if not path.exists():
        return []
    kept, entries = [], []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entry = json.loads(line)
            place = stages.index(entry["stage"]), entry["step"] + ("held_out_loss" in entry)
        except (ValueError, KeyError, TypeError):
            continue
        entries.append(entry)
        if place <= (stage, step):
            kept.append(line + "\n")
    with replacing(path) as file:
        file.write("".join(kept).encode())
    return entries
