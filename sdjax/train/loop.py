"""A training run from its settings to its export. Read it from `train` down.

The folder of a run holds config.toml, metrics.jsonl, samples/, checkpoints/, cache/ and export/STAGE/. A run that was
stopped or killed goes on from its newest intact checkpoint, and ends with the same bits as if nothing had happened.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from sdjax.data.dataset import make_batch, prefetch
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.formats import hub
from sdjax.runtime import out_of_memory, processes
from sdjax.runtime.background import background
from sdjax.runtime.whole_file import replacing
from sdjax.train import checkpoint, config_file, loss_scaling, snapshots, trackers
from sdjax.train.autoencoder import normalised
from sdjax.train.config import RunConfig
from sdjax.train.copies import compare
from sdjax.train.encoding import encode
from sdjax.train.export import export
from sdjax.train.file_metadata import today
from sdjax.train.metrics import Metrics
from sdjax.train.parallel import stack, stack_frozen, together, unstack
from sdjax.train.progress import COMPILING
from sdjax.train.results import Results, after
from sdjax.train.sharing import push
from sdjax.train.stages import Run, StagePlan, parallelize_stage, plan_runs, prepare
from sdjax.train.step import State, make_train_step
from sdjax.train.validation import Validator

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    "try a smaller data.batch_size with data.accumulation to make up for it, remat = true,\n"
    "dtype = 'bfloat16' ('float16' where that is missing), or a smaller data.resolution;\n"
    "the last checkpoint is untouched."
)


def train(config: RunConfig, *, resume: bool = False, resume_step: int | None = None) -> int:
    """Runs all stages. Returns 0, or 128 + the signal that stopped the run after it had saved.

    resume: go on from the newest intact checkpoint, or from that of `resume_step` (counted over all stages).
    Copies step together in one program; each is a run with its own folder (`config.members()`).
    Raises ConfigError and DataError, before any weight is read wherever that is possible, and TrainingStopped.
    """
    trackers.check_installed(config.trackers)
    with contextlib.ExitStack() as entered:
        for member in config.members():
            if processes.is_first():
                entered.enter_context(checkpoint.locked(member.output))
            if not resume and checkpoint.steps(Path(member.output) / "checkpoints"):
                raise ConfigError(
                    f"output = '{member.output}' holds checkpoints: --resume goes on from them, "
                    "or choose another output"
                )
        if config.push_to_hub and processes.is_first():
            for member in config.members():
                hub.check_upload(member.push_to_hub)
        entered.enter_context(out_of_memory.advice(OUT_OF_MEMORY))
        trainings = [Training(run) for run in plan_runs(config)]
        if resume:
            restore_all(trainings, resume_step)
        for training in trainings:
            training.open()
            entered.callback(training.metrics.close)
        while trainings[0].number < len(config.stages):
            code = _train_stage(trainings)
            if code:
                log.warning("stopped; --resume goes on from here")
                return code
        if processes.is_first() and len(trainings) > 1 and not trainings[0].run.stages[-1].shared:
            compare(config, [training.validate for training in trainings])
        if config.push_to_hub and processes.is_first():
            for member in config.members():
                address = push(member.output, member.stages[-1].name, member.push_to_hub, member.license)
                log.info("pushed to %s", address)
        processes.wait("the end")
    return 0


def _train_stage(trainings: Sequence["Training"]) -> int:
    """Trains the present stage of each run to its export. Returns 0, or the exit code of a signal.

    Several runs, whose shapes are all the same, take each step in one program. If they do the same in this stage, the
    first trains and validates for all of them.
    """
    first = trainings[0]
    copies = len(trainings) > 1 and not first.plan.shared
    working = trainings if copies else trainings[:1]
    states = [training.load(first) for training in trainings]
    config, plan, begin = first.run.config, first.plan, first.step
    if copies:
        parallel = parallelize_stage(config, plan.data, together(make_train_step(plan.recipe)), plan.recipe)
        frozen, key = stack_frozen([t.frozen for t in trainings]), stack([t.key for t in trainings])
    else:
        parallel, frozen, key = plan.parallel, first.frozen, first.key
    frozen, state = parallel.place_frozen(frozen), parallel.place_state(stack(states) if copies else states[0])
    del states  # a second copy of everything that is trained
    for training in working:
        training.prepare_validation(first, frozen["params"])

    def batch(number: int) -> PyTree:
        each = [training.batch(number) for training in working]
        return parallel.place_batch(stack(each, axis=1) if copies else each[0])

    def current() -> list[tuple[Training, State]]:
        """Returns each run with its state on the host. Raises TrainingStopped if the last step was not finite."""
        _read(trainings)
        fetched = parallel.fetch(state)
        each = unstack(fetched, len(trainings)) if copies else [fetched] * len(trainings)
        return list(zip(trainings, each, strict=True))

    validated, written = config.validation_steps(plan.number), config.file_steps(plan.number)
    every = config.checkpoint.every

    def save(step: int, *, beside: bool) -> None:
        saves.wait()
        if beside and not processes.are_several():  # several wait for each other while they save, by a program
            saves.start(_saving(step, _own(current())))
        else:
            _saving(step, current())()

    with contextlib.ExitStack() as entered:
        stop, agreed = entered.enter_context(checkpoint.StopSignal()), processes.Agreed()
        saves = entered.enter_context(background())
        batches = entered.enter_context(contextlib.closing(prefetch(batch, range(begin, plan.stage.steps))))
        for training in trainings:
            entered.enter_context(training.metrics.of_stage(training.plan, begin, shown=training is first))
        progress = first.metrics.progress
        for step in range(begin, plan.stage.steps + 1):  # the number of steps done
            saves.check()
            if code := agreed(stop.exit_code):
                save(step, beside=False)
                return code
            if step in validated:
                grid, writes = None, step in written
                with progress.waiting("validating"):
                    for training, reached in current():
                        if training in working and processes.is_first():
                            grid = training.validate(step, reached)
                            training.metrics.draw_losses()
                        if writes and processes.is_first():
                            training.write(step, reached, grid)
            if step == plan.stage.steps:
                break
            with progress.waiting(COMPILING) if step == begin else contextlib.nullcontext():
                state, measured = parallel.step(state, frozen, next(batches), key)
            _read(trainings)  # of the step before, while this one runs
            for i, training in enumerate(trainings):
                values = {name: value[i] for name, value in measured.items()} if copies else measured
                training.metrics.measured(step + 1, values)
            last = step + 1 == plan.stage.steps
            if last or (every and (step + 1) % every == 0):
                save(step + 1, beside=config.checkpoint.background and not last)
        grid = None
        for training, reached in current():
            shown: dict[str, Path | None] = {}
            if training in working and processes.is_first():
                grid = training.validate.before_and_after(reached)
                over_time, losses = training.validate.over_time(), training.metrics.draw_losses()
                shown = {"before and after": grid, "pictures over time": over_time, "losses": losses}
            training.finish(reached, grid)
            for what, path in shown.items():
                if path is not None:
                    log.info("  %s: %s", what, path)
        return int(processes.largest(stop.exit_code))


def _read(trainings: Sequence["Training"]) -> None:
    """Writes the numbers of the last step of each run. Raises TrainingStopped if it was finite in none of them.

    A copy whose step was not finite keeps its weights, and the others go on.
    """
    stopped: dict[Training, TrainingStopped] = {}
    for training in trainings:
        try:
            training.metrics.read()
        except TrainingStopped as e:
            stopped[training] = e
    if len(stopped) == len(trainings):
        raise next(iter(stopped.values()))
    for training, e in stopped.items():
        if not training.warned:
            log.warning("%s\nThe other copies go on.", e)
        training.warned = True


def _saving(step: int, current: Sequence[tuple["Training", State]]) -> Callable[[], None]:
    """Returns a function that saves each run after `step` steps, and keeps earlier checkpoints until all have saved."""
    steps = [work for training, reached in current for work in training.saving(step, reached)]
    if processes.is_first():
        steps += [training.pruning() for training, _ in current]

    def save() -> None:
        for work in steps:
            work()

    return save


def _own(current: Sequence[tuple["Training", State]]) -> Sequence[tuple["Training", State]]:
    """Returns the states in memory of their own. On the CPU they share that of arrays that the next step overwrites."""
    if jax.default_backend() != "cpu":
        return current
    copy = lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    return [(training, jax.tree.map(copy, reached)) for training, reached in current]


class Training:
    """One run while it is trained: where it stands, and what its present stage needs."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.number = 0
        """The present stage."""
        self.step = 0
        """Optimizer steps done in the present stage."""
        self.earlier: Results = run.beneath.results
        """The results of the stages before the present one."""
        self.has_first_only = False
        """Whether the run stands at its first checkpoint, or has none."""
        self.date = today()
        """The day on which the run began, which the metadata of its files name."""
        self.warned = False
        """Whether a warning has told that a step of this copy was not finite."""
        self._restored: State | None = None
        self._saved: int | None = None

    @property
    def plan(self) -> StagePlan:
        """The plan of the present stage."""
        return self.run.stages[self.number]

    @property
    def key(self) -> PRNGKeyArray:
        """The key of the steps."""
        return self.plan.keys(self.run.config.seed)[1]

    @property
    def _folder(self) -> Path:
        return Path(self.run.config.output)

    @property
    def _metrics(self) -> Path:
        return self._folder / "metrics.jsonl"

    def _export(self, plan: StagePlan) -> Path:
        return self._folder / "export" / plan.stage.name

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self._folder / "checkpoints"

    @property
    def reached(self) -> int:
        """Optimizer steps done in all stages."""
        return sum(plan.stage.steps for plan in self.run.stages[: self.number]) + self.step

    def restore(self, step: int | None) -> None:
        """Goes to the newest intact checkpoint, or to that of `step`. Without any checkpoint the run starts fresh."""
        found = checkpoint.restore(self.checkpoints, self._expected, step=step)
        if found is None:
            log.warning("nothing saved in %s: starting fresh", self.checkpoints)
            return
        self.number, self.step = found.metadata["stage"], found.metadata["step"]
        self.has_first_only = found.metadata.get("first", False)
        self.date = found.metadata.get("date", self.date)
        self.earlier, state, self._saved = found.state["earlier"], found.state["state"], self.step
        used = self.plan.recipe.scales_loss
        self._restored = state._replace(scaler=loss_scaling.resumed(state.scaler, used=used))
        log.info("going on from stage %s, step %d", self.plan.stage.name, self.step)

    def restart(self) -> None:
        """Goes back to the beginning."""
        self.number, self.step, self.earlier = 0, 0, self.run.beneath.results
        self._restored, self._saved = None, None

    def _expected(self, metadata: dict[str, Any]) -> PyTree:
        """Returns a tree like the one in a checkpoint. Raises DataError if the checkpoint is of another run."""
        config_file.compare_runs(metadata["run"], self.run.identity, self.run.config)
        number, done = metadata["stage"], metadata["step"]
        if done > (steps := self.run.config.stages[number].steps):
            raise ConfigError(
                f"stages.{number}.steps = {steps} is less than the {done} steps that are done: "
                "give that number or more, or resume from an earlier checkpoint with --resume-step"
            )
        earlier, plan = self.run.before(number), self.run.stages[number]
        scaled = loss_scaling.is_needed(metadata["run"]["dtype"], plan.stage)
        scaler = jax.eval_shape(loss_scaling.first) if scaled else None
        return {"earlier": earlier, "state": plan.state._replace(scaler=scaler)}

    def open(self) -> None:
        """Writes config.toml, and opens metrics.jsonl at the place the run has reached."""
        if processes.is_first():
            with replacing(self._folder / "config.toml") as file:
                file.write(config_file.to_toml(self.run.config).encode())
        self.metrics = Metrics(self._metrics, self.run, stage=self.number, step=self.step)
        if processes.is_first():
            for plan in self.run.stages[self.number :]:
                here = plan.number == self.number
                snapshots.remove_later(self._export(plan) / "steps", self.step if here else -1)

    def load(self, first: "Training") -> State:
        """Encodes the data of the present stage and loads its weights. Returns the state that its steps begin with.

        Copies take what they share from the first.
        """
        shared = None if self is first else first
        self._dataset, self._held_out = encode(self.run, self.plan, self.earlier)
        with self.plan.parallel.loading():
            begun, self.frozen = prepare(self.run, self.plan, self.earlier, shared and shared.frozen["params"])
        self._order = self.plan.order(self._dataset.repeats, self.run.config.seed)
        state, self._restored = begun if self._restored is None else self._restored, None
        return state

    def prepare_validation(self, first: "Training", placed: PyTree) -> None:
        """Prepares the validation of the present stage. placed: its frozen weights as they lie on the devices.

        On a mesh they take the place of those that were loaded.
        """
        if self.plan.parallel.mesh is not None:
            self.frozen["params"] = self.plan.parallel.held(placed)
        errors = None if self is first else first.validate.errors
        self.validate = Validator(self.run, self.plan, self._held_out, self.frozen, self.earlier, self.metrics, errors)

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Returns the batch of step `number` (0 is the first)."""
        return make_batch(self._dataset, self._order, number)

    def saving(self, step: int, state: State) -> list[Callable[[], None]]:
        """Returns what saves the state (on the host) after `step` steps of the stage: nothing if that is done."""
        if self._saved == step:
            return []
        self.step = self._saved = step
        metadata = {
            "run": self.run.identity,
            "stage": self.number,
            "step": step,
            "first": not checkpoint.steps(self.checkpoints),
            "date": self.date,
        }
        tree = {"earlier": self.earlier, "state": state}
        return [functools.partial(checkpoint.save, self.checkpoints, self.reached, tree, metadata)]

    def pruning(self) -> Callable[[], None]:
        """Returns what removes the checkpoints that are not to be kept beside that of the present step."""
        keep = self.run.config.checkpoint.keep
        return functools.partial(checkpoint.prune, self.checkpoints, self.reached, keep=keep)

    def write(self, step: int, state: State, grid: Path | None) -> None:
        """Writes the LoRA and words of a state (on the host) after `step` steps. grid: pictures by it."""
        results = jax.tree.map(np.asarray, after(self.plan.recipe, self.earlier, state, self.frozen))
        folder, stage = self._export(self.plan) / "steps", self.plan.stage.name
        export(folder, self.run, self.plan, results, grid, date=self.date, step=step)
        snapshots.tidy(folder, snapshots.losses(self._metrics, stage), keep=self.run.config.export.keep)

    def finish(self, state: State, grid: Path | None) -> None:
        """Exports the results of the present stage, and goes on to the next. grid: pictures before and after it."""
        results = after(self.plan.recipe, self.earlier, state, self.frozen)
        if self.plan.stage.vae_normalise:
            pixels = [bucket.arrays["pixels"] for bucket in self._dataset.buckets]
            vae = normalised(self.run.outline.vae, results.weights["vae"], pixels)
            results = results._replace(weights=results.weights | {"vae": vae})
        results = jax.tree.map(np.asarray, results)
        folder = self._export(self.plan)
        if processes.is_first():
            export(folder, self.run, self.plan, results, grid, date=self.date)
        log.info("stage %s is done: %s", self.plan.stage.name, folder)
        self.number, self.step, self.earlier = self.number + 1, 0, results
        self._saved = None


def restore_all(trainings: Sequence[Training], step: int | None) -> None:
    """Brings all runs to the same checkpoint: the newest one, or that of `step`."""
    for training in trainings:
        training.restore(step)
    reached = [training.reached for training in trainings]
    if len(set(reached)) == 1:
        return
    # The copies were killed while they were saving, or a checkpoint of one of them is damaged.
    saved = [set(checkpoint.steps(training.checkpoints)) for training in trainings]
    for common in sorted(set.intersection(*saved) & set(range(min(reached) + 1)), reverse=True):
        try:
            for training in trainings:
                training.restore(common)
        except DataError as e:
            log.warning("%s", e)
        else:
            return
    if all(training.has_first_only or not steps for training, steps in zip(trainings, saved, strict=True)):
        log.warning("the copies were stopped while they saved for the first time: starting fresh")
        for training in trainings:
            training.restart()
        return
    raise DataError(f"the copies stand at steps {reached}, and no step has an intact checkpoint of every one")
