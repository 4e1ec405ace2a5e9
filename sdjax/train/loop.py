"""A training run from its settings to its export; read it from `train` down.

The folder of a run: config.toml, metrics.jsonl, samples/, checkpoints/, cache/, export/STAGE/. A run that is stopped,
killed or cut off goes on from its newest intact checkpoint and ends with the same bits as if nothing had happened.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from sdjax import config_file
from sdjax.config import RunConfig
from sdjax.data.dataset import make_batch, prefetch
from sdjax.errors import ConfigError, TrainingStopped
from sdjax.formats.safetensors_file import replacing
from sdjax.train import checkpoint
from sdjax.train.autoencoder import normalised
from sdjax.train.encoding import encode
from sdjax.train.export import export
from sdjax.train.made import NOTHING, Made, result
from sdjax.train.metrics import Metrics
from sdjax.train.stages import Run, StagePlan, plan_run, prepare
from sdjax.train.step import State
from sdjax.train.validation import Validator

log = logging.getLogger(__name__)


class Position(NamedTuple):
    """Where a run begins or goes on."""

    stage: int
    step: int
    """Optimizer steps done in that stage."""
    before: int
    """Optimizer steps of all earlier stages."""
    state: State | None
    """Of that stage, on the host; None: the stage has not begun."""
    earlier: Made
    """What the stages before have made."""


def train(config: RunConfig, *, resume: bool = False, resume_step: int | None = None) -> int:
    """Run all stages; 0, or 128 + the signal that stopped it after saving.

    resume: go on from the newest intact checkpoint, or from that of `resume_step` (counted over all stages).
    Raises ConfigError and DataError, before any weight is read wherever that is possible, and TrainingStopped.
    """
    output = Path(config.output)
    with checkpoint.locked(output), _memory_advice():
        if not resume and checkpoint.steps(output / "checkpoints"):
            raise ConfigError(
                f"output = {config.output!r} holds checkpoints: --resume goes on from them, or choose another output"
            )
        run = plan_run(config)
        position = _find_position(run, resume, resume_step)
        with replacing(output / "config.toml") as file:
            file.write(config_file.to_toml(config).encode())
        metrics = Metrics(output / "metrics.jsonl", run, stage=position.stage, step=position.step)
        for plan in run.stages[position.stage :]:
            position, code = _train_stage(run, plan, position, metrics)
            if code:
                log.warning("stopped; --resume goes on from here")
                return code
    return 0


def _find_position(run: Run, resume: bool, step: int | None) -> Position:
    folder = Path(run.config.output) / "checkpoints"

    def expect(metadata: dict[str, Any]) -> PyTree:
        saved, current = metadata["run"], run.identity
        if run.config.checkpoint.allow_changed_data:
            saved, current = (
                {key: value for key, value in record.items() if not key.startswith("fingerprint.data.")}
                for record in (saved, current)
            )
        checkpoint.compare_runs(saved, current)
        number = metadata["stage"]
        return {"earlier": run.stages[number - 1].result if number else NOTHING, "state": run.stages[number].state}

    found = checkpoint.restore(folder, expect, step=step) if resume else None
    if found is None:
        if resume:
            log.warning("nothing saved in %s: starting fresh", folder)
        return Position(0, 0, 0, None, NOTHING)
    number, done = found.metadata["stage"], found.metadata["step"]
    log.info("going on from stage %s, step %d", run.config.stages[number].name, done)
    return Position(number, done, found.step - done, found.state["state"], found.state["earlier"])


def _train_stage(run: Run, plan: StagePlan, start: Position, metrics: Metrics) -> tuple[Position, int]:
    """Train one stage from where it stands to its export: what comes next, and the exit code of a signal or 0."""
    config, stage, parallel = run.config, plan.stage, plan.parallel
    dataset, held_out = encode(run, plan, start.earlier)
    ready = prepare(run, plan, start.earlier)
    validate = Validator(run, plan, held_out, ready, start.earlier, metrics)
    frozen = parallel.place_frozen(ready.frozen)
    state = parallel.place_state(ready.state if start.state is None else start.state)
    _, key = plan.keys(config.seed)
    order = plan.batches(dataset.repeats, config.seed)
    batches = prefetch(
        lambda number: parallel.place_batch(make_batch(dataset, order, number)), range(start.step, stage.steps)
    )

    saved = start.step if start.state is not None else None

    def save(step: int) -> None:
        nonlocal saved
        metrics.read()  # raises if the last step was not finite
        if saved == step:
            return
        checkpoint.save(
            Path(config.output) / "checkpoints",
            start.before + step,
            {"earlier": start.earlier, "state": parallel.fetch(state)},
            {"run": run.identity, "stage": plan.number, "step": step},
            keep=config.checkpoint.keep,
        )
        saved = step

    with checkpoint.StopSignal() as stop, contextlib.closing(batches), metrics.of_stage(plan, start.step):
        for step in range(start.step, stage.steps + 1):  # step: how many are done
            if stop.requested:
                save(step)
                return start, stop.exit_code
            if step in (0, stage.steps) or _due(step, config.validation.every):
                metrics.read()
                validate(step, parallel.fetch(state))
            if step == stage.steps:
                break
            state, measured = parallel.step(state, frozen, next(batches), key)
            metrics.read()  # of the step before, while this one runs
            metrics.measured(step + 1, measured)
            if step + 1 == stage.steps or _due(step + 1, config.checkpoint.every):
                save(step + 1)
        final = parallel.fetch(state)
        made = result(plan.recipe, start.earlier, final, ready.frozen)
        if stage.vae_normalise:
            weights = normalised(run.model.vae, made.weights["vae"], dataset.buckets[0].arrays["pixels"])
            made = made._replace(weights=made.weights | {"vae": weights})
        made = jax.tree.map(np.asarray, made)
        place = Path(config.output) / "export" / stage.name
        export(place, config, plan, made, validate.before_and_after())
    log.info("stage %s is done: %s", stage.name, place)
    return Position(plan.number + 1, 0, start.before + stage.steps, None, made), stop.exit_code


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _memory_advice() -> Iterator[None]:
    """Turns running out of memory into what to do about it."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise TrainingStopped(
            "out of memory. Try a smaller data.batch_size with data.accumulation to make up for it, remat = true,\n"
            "dtype = 'bfloat16', or a smaller data.resolution; the last checkpoint is untouched."
        ) from e
