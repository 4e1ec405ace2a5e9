"""Trackers: TensorBoard and Weights & Biases get the numbers of metrics.jsonl and the pictures of samples/.

Only `train.metrics` calls them, with numbers that are on the host already. A tracker that fails is named in one
warning and left out from then on; training goes on without it. Steps count over all stages, and the names of numbers
and pictures begin with that of the stage: `style/loss`.
"""

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.errors import ConfigError
from sdjax.runtime import processes
from sdjax.runtime.whole_file import replacing
from sdjax.train.config import RunConfig
from sdjax.train.config_file import to_table

log = logging.getLogger(__name__)

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""Tracker -> the module it needs."""


class Place(NamedTuple):
    """A place in the course of a run. Places are in order: a step, and then the validation after it."""

    step: int
    """Optimizer steps done in all stages."""
    validation: bool = False


class Course(NamedTuple):
    """Where a tracker goes on."""

    step: int
    """Optimizer steps done in all stages. The validation after the last one is to come, or comes again."""
    stage: str
    """The name of the present stage."""
    written: Place
    """The last place that an earlier process has reached. After a kill or --resume-step it is later than `step`."""


class Tracker(NamedTuple):
    """An open tracker. Its functions may raise any error."""

    numbers: Callable[[Place, Mapping[str, float]], None]
    picture: Callable[[Place, str, Path], None]
    """Takes a PNG file under a name."""
    close: Callable[[], Any]


class Trackers:
    """The trackers of one run. Of several processes the first one has them."""

    def __init__(self, config: RunConfig, course: Course) -> None:
        self._open: dict[str, Tracker] = {}
        for name in config.trackers if processes.is_first() else ():
            with self._left_out_after_an_error(name):
                self._open[name] = TRACKERS[name](config, course)

    def numbers(self, place: Place, values: Mapping[str, float]) -> None:
        """Gives numbers to all trackers."""
        self._each(lambda tracker: tracker.numbers(place, values))

    def picture(self, place: Place, name: str, path: Path) -> None:
        """Gives a PNG file to all trackers."""
        self._each(lambda tracker: tracker.picture(place, name, path))

    def close(self) -> None:
        """Closes all trackers."""
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._left_out_after_an_error(name):
                call(tracker)

    @contextlib.contextmanager
    def _left_out_after_an_error(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:
            self._open.pop(name, None)
            first = next(iter(str(e).splitlines()), "")[:300]
            log.warning("tracker %s is left out from now on: %s: %s", name, type(e).__name__, first)


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError if the library of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ConfigError(f"trackers: {name} needs {MODULES[name]}, not installed: pip install 'sdjax[trackers]'")


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def _tensorboard(config: RunConfig, course: Course) -> Tracker:
    """Writes event files in OUTPUT/tensorboard. Events that will be written again are removed from earlier files.

    Events are written at once. The usual SummaryWriter has a thread of its own and waits for it for ever if the disk
    is full.
    """
    files_of, event_pb2, summary_pb2 = (
        importlib.import_module(f"tensorboardX.{name}")
        for name in ("event_file_writer", "proto.event_pb2", "proto.summary_pb2")
    )
    Event, Summary = event_pb2.Event, summary_pb2.Summary

    def stays(record: bytes) -> bool:
        event = Event.FromString(record)
        present = [value for value in event.summary.value if value.tag.startswith(f"{course.stage}/")]
        repeated = any(value.HasField("image") or value.tag.endswith("held_out_loss") for value in present)
        return event.step < course.step or (event.step == course.step and not repeated)

    folder = Path(config.output) / "tensorboard"
    folder.mkdir(exist_ok=True)
    files = sorted(folder.glob("events.out.tfevents.*"))
    for path in files:
        _keep(path, stays)
    # The name of an event file has the second in which it was made: the number keeps two of one second apart.
    writer = files_of.EventsWriter(str(folder / "events"), f".{len(files)}")

    def write(place: Place, *values: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=place.step, summary=Summary(value=values)))
        writer.flush()

    def numbers(place: Place, values: Mapping[str, float]) -> None:
        write(place, *(Summary.Value(tag=name, simple_value=value) for name, value in values.items()))

    def picture(place: Place, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as opened:
            width, height = opened.size
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=path.read_bytes())
        write(place, Summary.Value(tag=name, image=image))

    return Tracker(numbers, picture, writer.close)


def _keep(path: Path, stays: Callable[[bytes], bool]) -> None:
    """Rewrites an event file with the records that stay. A record that a crash has cut off is dropped."""
    kept, data, start = [], path.read_bytes(), 0
    while start + 12 <= len(data):  # 8 bytes of length, 4 of checksum, the record, 4 of checksum
        end = start + 16 + struct.unpack_from("<Q", data, start)[0]
        if end > len(data):
            break
        if stays(data[start + 12 : end - 4]):
            kept.append(data[start:end])
        start = end
    with replacing(path) as file:
        file.write(b"".join(kept))


# ----------------------------------------------------------------------------------------------------- Weights & Biases


def _wandb(config: RunConfig, course: Course) -> Tracker:
    """Writes to a run of W&B, online or, with WANDB_MODE=offline, in OUTPUT/wandb. OUTPUT/wandb/id holds its id.

    W&B cannot take back a step. So a resumed run does not repeat the steps that it has.
    """
    wandb: Any = importlib.import_module("wandb")
    record = Path(config.output) / "wandb" / "id"
    goes_on = course.step > 0 and record.exists()
    if not goes_on:
        record.parent.mkdir(exist_ok=True)
        with replacing(record) as file:
            file.write(secrets.token_hex(4).encode())
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "sdjax"),
        name=os.environ.get("WANDB_NAME", config.output),
        dir=config.output,
        id=record.read_text().strip(),
        resume="allow" if goes_on else None,
        config=to_table(config),
        reinit="create_new",  # each copy has a run of its own
        settings={"console": "off", "init_timeout": 60, "login_timeout": 60, "finish_timeout": 120},
    )

    def numbers(place: Place, values: Mapping[str, float]) -> None:
        if place > course.written or not goes_on:
            run.log(dict(values), step=place.step)

    def picture(place: Place, name: str, path: Path) -> None:
        if place >= course.written or not goes_on:  # the process may have ended between the numbers and the picture
            run.log({name: wandb.Image(str(path))}, step=place.step)

    return Tracker(numbers, picture, run.finish)


TRACKERS: dict[str, Callable[[RunConfig, Course], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb}
"""Name -> what opens the tracker."""
