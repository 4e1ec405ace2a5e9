"""What a run tells while it runs: a line of metrics.jsonl for each step, and the progress bar.

Numbers are read from the device one step late, so that the step under way is never waited for.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from sdjax.errors import DataError, TrainingStopped
from sdjax.runtime.whole_file import replacing
from sdjax.train.stages import Run, StagePlan

log = logging.getLogger(__name__)

MOST_SKIPPED = 20
"""Steps in a row that on_nan = 'skip' passes over before the run stops after all."""


class Metrics:
    """metrics.jsonl: `{"stage", "step", "loss", ...}` a step, `{"stage", "step", "held_out_loss"}` a validation.

    step: optimizer steps done in the stage, so the first line of training is step 1 and a stage's first validation 0.
    """

    def __init__(self, path: Path, run: Run, *, stage: int, step: int) -> None:
        """Goes on at a position of the run: lines of what will be done again are dropped first."""
        self._path = path
        self._name = path.parent.name  # tells copies apart
        self._on_nan = run.config.on_nan
        self._skipped = 0
        self._waiting: tuple[int, Mapping[str, Array]] | None = None
        self._since = time.perf_counter()
        _drop_later_lines(path, [plan.stage.name for plan in run.stages], stage, step)

    @contextlib.contextmanager
    def of_stage(self, plan: StagePlan, step: int, *, shown: bool = True) -> Iterator[None]:
        """While entered, what is recorded belongs to this stage, whose bar starts at `step`."""
        from tqdm.auto import tqdm

        self._plan = plan
        with tqdm(
            total=plan.stage.steps,
            initial=step,
            desc=plan.stage.name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
            disable=not shown,
        ) as self._bar:
            yield

    def measured(self, step: int, values: Mapping[str, Array]) -> None:
        """Keep the numbers of a step just begun, to be read when `read` is called next."""
        self._waiting = step, values

    def read(self) -> None:
        """Write the step that is waiting, if there is one. Raises TrainingStopped if it was not finite."""
        if self._waiting is None:
            self._since = time.perf_counter()
            return
        (step, values), self._waiting = self._waiting, None
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        now = time.perf_counter()
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # elsewhere it would queue behind the step
            rates = self._plan.recipe.optimizer.learning_rates(step - 1)
        different = len(set(rates.values())) > 1
        line = {
            "stage": self._plan.stage.name,
            "step": step,
            # JSON has no NaN and no infinity.
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": rates if different else next(iter(rates.values())),
            "grad_norm": norm if math.isfinite(norm) else None,
            **({"row_norm": float(values["row_norm"])} if "row_norm" in values else {}),
            "examples_per_second": round(self._plan.examples / max(now - self._since, 1e-9), 3),
        }
        self._since = now
        self.write(line)
        self._bar.set_postfix(loss=f"{loss:.4g}", lr=f"{max(rates.values()):.3g}", refresh=False)
        self._bar.update(1)
        self._check_finite(step, bool(values["finite"]), loss, norm)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:
            raise DataError(f"{self._path} cannot be written: {e.strerror or e}") from e

    def held_out(self, step: int, loss: float) -> None:
        """Record the held-out loss."""
        self.write({"stage": self._plan.stage.name, "step": step, "held_out_loss": loss})
        log.info("%s, %s, step %d: held-out loss %.5f", self._name, self._plan.stage.name, step, loss)

    def _check_finite(self, step: int, finite: bool, loss: float, norm: float) -> None:
        self._skipped = 0 if finite else self._skipped + 1
        if finite:
            return
        what = f"{self._name}, stage {self._plan.stage.name}, step {step}: loss {loss:g}, gradient norm {norm:g}"
        if self._on_nan == "skip" and self._skipped < MOST_SKIPPED:
            log.warning("%s: step skipped", what)
            return
        times = f" for {self._skipped} steps in a row" if self._skipped > 1 else ""
        raise TrainingStopped(
            f"{what}{times}. The weights are those of the step before; the last checkpoint is untouched.\n"
            "Try a lower learning_rate, warmup_steps, or dtype = 'float32'; on_nan = 'skip' passes over single steps."
        )


def _drop_later_lines(path: Path, stages: list[str], stage: int, step: int) -> None:
    """Leave the lines of what was done before (stage, step), which the run is about to go on from.

    A validation at exactly that step is dropped too: it is done again. So is a last line cut off by a crash.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            place = stages.index(entry["stage"]), entry["step"] + ("held_out_loss" in entry)
        except (ValueError, KeyError, TypeError):
            continue
        if place <= (stage, step):
            kept.append(line + "\n")
    with replacing(path) as file:
        file.write("".join(kept).encode())
