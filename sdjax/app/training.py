"""Runs for the page: what they are taught, how they are started, stopped and resumed, and where they stand.

A run is a process of its own, `python -m sdjax.train`, and its folder is all that is known of it. So a run that was
started in a terminal is shown and stopped like any other, and a run goes on when the page is closed.
"""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.app.folders import Folders
from sdjax.errors import ConfigError, DataError
from sdjax.runtime.whole_file import replacing
from sdjax.train.config import RunConfig
from sdjax.train.config_file import from_table, load_run, to_toml
from sdjax.train.curves import read_metrics

WAYS = {
    "A style, as a LoRA": ("style",),
    "A thing, as a new word": ("thing",),
    "A style, then a thing on top": ("style", "thing"),
    "A thing, then a style on top": ("thing", "style"),
}
"""What can be taught -> the stages."""

_OUTPUT = "log.txt"
_started: dict[int, subprocess.Popen] = {}
"""Processes that this one started, which it must wait for when they end."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a run is to learn, as the page asks for it. None: the usual value for the model."""

    way: str
    model: str
    style_data: Path | None = None
    thing_data: Path | None = None
    word: str = "<thing>"
    begins_as: str = ""
    steps: int | None = None
    rank: int | None = None
    batch_size: int | None = None
    resolution: int | None = None
    held_out: int = 0
    every: int | None = None
    prompts: tuple[str, ...] = ()
    seed: int = 0


class State(NamedTuple):
    """Where a run stands. process: that which trains it, or None."""

    config: RunConfig
    done: int
    total: int
    process: int | None

    @property
    def says(self) -> str:
        """The state in a word or two."""
        if self.process is not None:
            return "training"
        return "finished" if self.done >= self.total else "stopped"


def lesson_config(lesson: Lesson, dtype: str, output: Path) -> RunConfig:
    """Returns the settings of a run. Raises ConfigError, which names the setting."""
    from sdjax.outline import Outline

    side = Outline.load(lesson.model, weights=False).native_size
    small = side <= 128  # such as the embedded model
    batch = lesson.batch_size or (8 if small else 1)
    stages = []
    for kind in WAYS[lesson.way]:
        data = lesson.style_data if kind == "style" else lesson.thing_data
        if data is None:
            raise ConfigError(f"choose the pictures of the {kind}")
        stage: dict[str, Any] = {"name": kind, "schedule": "cosine", "data": {"path": str(data)}}
        if kind == "style":
            stage |= {
                **{"train": "lora", "steps": lesson.steps or (100 if small else 1000)},
                **{"learning_rate": 4e-4 if small else 1e-4, "lora_rank": lesson.rank or (8 if small else 16)},
                **{"lora_targets": "all" if small else "attention+ff"},
            }
            stage["data"] |= {"caption_dropout": 0.1, "validation_count": lesson.held_out}
        else:
            stage |= {
                **{"train": "textual_inversion", "steps": lesson.steps or (150 if small else 1500)},
                **{"learning_rate": 2e-2 if small else 5e-3, "placeholder_tokens": lesson.word},
                **{"vectors_per_token": 2, "weight_decay": 0.0, "clip_ti_decay": True, "template": "object"},
                **({"init_tokens": lesson.begins_as} if lesson.begins_as.strip() else {}),
            }
            stage["data"] |= {"missing_caption": "empty"}
        stages.append(stage)
    steps = stages[0]["steps"]
    table = {
        **{"model": lesson.model, "output": str(output), "dtype": dtype, "seed": lesson.seed, "stages": stages},
        "data": {
            **{"path": stages[0]["data"]["path"], "batch_size": batch, "missing_caption": "empty"},
            "resolution": lesson.resolution or side,
        },
        "validation": {"prompts": lesson.prompts, "every": lesson.every or max(1, steps // 5), "steps": 20},
        "checkpoint": {"every": max(1, min(100, steps // 2))},
    }
    return from_table(table)


def write(config: RunConfig) -> Path:
    """Makes the folder of a run with its settings, and returns it."""
    run = Path(config.output)
    run.mkdir(parents=True)
    with replacing(run / "config.toml") as file:
        file.write(to_toml(config).encode())
    return run


def start(run: Path, *, resume: bool = False) -> int:
    """Starts or resumes a run as a process that outlives this one, and returns the number of the process."""
    command = [sys.executable, "-m", "sdjax.train", str(run / "config.toml"), "--output", str(run)]
    with (run / _OUTPUT).open("ab") as output:
        process = subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            **{"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT},
            start_new_session=True,
        )
    _started[process.pid] = process
    return process.pid


def stop(run: Path) -> None:
    """Asks the process that trains a run to save and stop. Raises DataError if none does."""
    process = _process(run)
    if process is None:
        raise DataError(f"{run.name} is not training")
    os.kill(process, signal.SIGTERM)


def ended(process: int) -> int | None:
    """The exit code of a process that `start` started, or None while it runs."""
    return _started[process].poll() if process in _started else None


def last_words(run: Path, most: int = 1500) -> str:
    """The end of what the process of a run said."""
    path = run / _OUTPUT
    if not path.exists() or path.is_symlink():
        return ""
    text = path.read_bytes()[-20 * most :].decode(errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if line.strip())[-most:]


def state(run: Path) -> State:
    """Returns where a run stands. Raises ConfigError and DataError if its settings cannot be read."""
    config = load_run(run, None)
    last = {line["stage"]: line["step"] for line in read_metrics(run / "metrics.jsonl")}
    done = sum(last.get(stage.name, 0) for stage in config.stages)
    return State(config, done, sum(stage.steps for stage in config.stages), _process(run))


def running(folders: Folders) -> list[str]:
    """The names of the runs that train now."""
    return [name for name, run in folders.runs_by_name().items() if _process(run) is not None]


def _process(run: Path) -> int | None:
    """The process that holds the lock of a run; see `train.checkpoint.locked`.

    The lock is tried only if the process that it names exists, since a run that starts just then would find it taken.
    """
    import fcntl

    for process in list(_started.values()):
        process.poll()
    try:
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        number = int(os.read(descriptor, 32).decode(errors="replace"))
        os.kill(number, 0)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return number
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)
