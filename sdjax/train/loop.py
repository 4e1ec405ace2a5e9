"""A training run from its settings to its export; read it from `train` down.

The folder of a run: config.toml, metrics.jsonl, samples/, checkpoints/, cache/, export/STAGE/. A run that is stopped,
killed or cut off goes on from its newest intact checkpoint and ends with the same bits as if nothing had happened.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from sdjax.data.dataset import make_batch, prefetch
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.runtime.whole_file import replacing
from sdjax.train import checkpoint, config_file
from sdjax.train.autoencoder import normalised
from sdjax.train.config import RunConfig
from sdjax.train.encoding import encode
from sdjax.train.export import export
from sdjax.train.made import NOTHING, Made, result
from sdjax.train.metrics import Metrics
from sdjax.train.parallel import stack, stack_frozen, together, unstack
from sdjax.train.stages import Run, parallelize_stage, plan_runs, prepare
from sdjax.train.step import State, make_train_step
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

    Copies are trained in step, each as a run of its own with its own folder: `config.members()`.
    resume: go on from the newest intact checkpoint, or from that of `resume_step` (counted over all stages).
    Raises ConfigError and DataError, before any weight is read wherever that is possible, and TrainingStopped.
    """
    outputs = [Path(member.output) for member in config.members()]
    with contextlib.ExitStack() as held:
        for output in outputs:
            held.enter_context(checkpoint.locked(output))
            if not resume and checkpoint.steps(output / "checkpoints"):
                raise ConfigError(
                    f"output = '{output}' holds checkpoints: --resume goes on from them, or choose another output"
                )
        held.enter_context(_memory_advice())
        runs = plan_runs(config)
        positions = _find_positions(runs, resume, resume_step)
        metrics = []
        for run, output, position in zip(runs, outputs, positions, strict=True):
            with replacing(output / "config.toml") as file:
                file.write(config_file.to_toml(run.config).encode())
            metrics.append(Metrics(output / "metrics.jsonl", run, stage=position.stage, step=position.step))
        for number in range(positions[0].stage, len(config.stages)):
            trainings = [
                Training(run, number, position, own)
                for run, position, own in zip(runs, positions, metrics, strict=True)
            ]
            positions, code = _train_stage(trainings)
            if code:
                log.warning("stopped; --resume goes on from here")
                return code
    return 0


def _find_positions(runs: Sequence[Run], resume: bool, step: int | None) -> list[Position]:
    """Where each run begins or goes on: all at the same step."""
    positions = [_find_position(run, resume, step) for run in runs]
    reached = [position.before + position.step for position in positions]
    if len(set(reached)) > 1:  # killed while they were saving
        saved = [checkpoint.steps(Path(run.config.output) / "checkpoints") for run in runs]
        common = set.intersection(*map(set, saved)) & set(range(min(reached) + 1))
        if not common:
            raise DataError(f"the copies stand at steps {reached}, and no step has a checkpoint of every one")
        positions = [_find_position(run, resume, max(common)) for run in runs]
    return positions


def _find_position(run: Run, resume: bool, step: int | None) -> Position:
    folder = Path(run.config.output) / "checkpoints"

    def expect(metadata: dict[str, Any]) -> PyTree:
        saved, current = metadata["run"], run.identity
        if run.config.checkpoint.allow_changed_data:
            saved, current = (
                {key: value for key, value in record.items() if not key.startswith("fingerprint.data.")}
                for record in (saved, current)
            )
        checkpoint.compare_runs(saved, current, config_file.flat_defaults(len(run.stages)))
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


class Training:
    """One run in one stage: everything but the step itself, which several may share."""

    def __init__(self, run: Run, number: int, start: Position, metrics: Metrics) -> None:
        self.run, self.plan, self.start, self.metrics = run, run.stages[number], start, metrics
        self._saved = start.step if start.state is not None else None

    def prepare(self, first: "Training | None" = None) -> None:
        """Encode the data and load what is needed; what it has in common with the first of several is that one's."""
        self.dataset, held_out = encode(self.run, self.plan, self.start.earlier)
        params = first.ready.frozen["params"] if first else None
        self.ready = prepare(self.run, self.plan, self.start.earlier, params)
        errors = first.validate.errors if first else None
        self.validate = Validator(self.run, self.plan, held_out, self.ready, self.start.earlier, self.metrics, errors)
        self._order = self.plan.batches(self.dataset.repeats, self.run.config.seed)

    @property
    def state(self) -> State:
        """What the steps begin with."""
        return self.ready.state if self.start.state is None else self.start.state

    @property
    def key(self) -> PRNGKeyArray:
        """The key of the steps."""
        return self.plan.keys(self.run.config.seed)[1]

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """What step `number` (from 0) trains on."""
        return make_batch(self.dataset, self._order, number)

    def save(self, step: int, state: State) -> None:
        """Save the state (on the host) after `step` steps, unless that is done already."""
        if self._saved == step:
            return
        config = self.run.config
        checkpoint.save(
            Path(config.output) / "checkpoints",
            self.start.before + step,
            {"earlier": self.start.earlier, "state": state},
            {"run": self.run.identity, "stage": self.plan.number, "step": step},
            keep=config.checkpoint.keep,
        )
        self._saved = step

    def finish(self, state: State) -> Position:
        """Export what the finished stage has made; what comes next."""
        stage, config = self.plan.stage, self.run.config
        made = result(self.plan.recipe, self.start.earlier, state, self.ready.frozen)
        if stage.vae_normalise:
            weights = normalised(
                self.run.outline.vae,
                made.weights["vae"],
                [bucket.arrays["pixels"] for bucket in self.dataset.buckets],
            )
            made = made._replace(weights=made.weights | {"vae": weights})
        made = jax.tree.map(np.asarray, made)
        place = Path(config.output) / "export" / stage.name
        export(place, config, self.plan, made, self.validate.before_and_after())
        log.info("stage %s is done: %s", stage.name, place)
        return Position(self.plan.number + 1, 0, self.start.before + stage.steps, None, made)


def _train_stage(trainings: Sequence[Training]) -> tuple[list[Position], int]:
    """Train one stage from where it stands to its export: what comes next, and the exit code of a signal or 0.

    Several trainings, alike in all shapes, take each step in one program.
    """
    first, *others = trainings
    first.prepare()
    for training in others:
        training.prepare(first)
    config, stage, begin = first.run.config, first.plan.stage, first.start.step
    if others:
        train_step = together(make_train_step(first.plan.recipe))
        parallel = parallelize_stage(config, first.plan.data, train_step, first.plan.recipe)
        frozen, state = stack_frozen([t.ready.frozen for t in trainings]), stack([t.state for t in trainings])
        key = stack([t.key for t in trainings])
    else:
        parallel, frozen, state, key = first.plan.parallel, first.ready.frozen, first.state, first.key
    frozen, state = parallel.place_frozen(frozen), parallel.place_state(state)

    def batch(number: int) -> PyTree:
        each = [training.batch(number) for training in trainings]
        return parallel.place_batch(stack(each, axis=1) if others else each[0])

    def current() -> list[State]:
        """The state of each training, on the host. Raises TrainingStopped if the last step was not finite."""
        for training in trainings:
            training.metrics.read()
        fetched = parallel.fetch(state)
        return unstack(fetched, len(trainings)) if others else [fetched]

    with contextlib.ExitStack() as entered:
        stop = entered.enter_context(checkpoint.StopSignal())
        batches = entered.enter_context(contextlib.closing(prefetch(batch, range(begin, stage.steps))))
        for training in trainings:
            entered.enter_context(training.metrics.of_stage(training.plan, begin, shown=training is first))
        for step in range(begin, stage.steps + 1):  # step: how many are done
            if stop.requested:
                for training, own in zip(trainings, current(), strict=True):
                    training.save(step, own)
                return [training.start for training in trainings], stop.exit_code
            if step in (0, stage.steps) or _due(step, config.validation.every):
                for training, own in zip(trainings, current(), strict=True):
                    training.validate(step, own)
            if step == stage.steps:
                break
            state, measured = parallel.step(state, frozen, next(batches), key)
            for i, training in enumerate(trainings):
                training.metrics.read()  # of the step before, while this one runs
                training.metrics.measured(step + 1, {k: v[i] for k, v in measured.items()} if others else measured)
            if step + 1 == stage.steps or _due(step + 1, config.checkpoint.every):
                for training, own in zip(trainings, current(), strict=True):
                    training.save(step + 1, own)
        after = [training.finish(own) for training, own in zip(trainings, current(), strict=True)]
    return after, stop.exit_code


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
