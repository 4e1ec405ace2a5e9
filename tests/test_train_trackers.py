"""Trackers hold what metrics.jsonl and samples/ hold, go on when a run is resumed, and never stop it."""

import io
import logging
import shutil
import struct
import sys
import types
from collections import Counter
from pathlib import Path

import micro
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from sdjax.errors import ConfigError
from sdjax.train import trackers
from sdjax.train.config_file import from_table, to_table
from sdjax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

STAGES = [{"name": "first", "steps": 2}, {"name": "second", "steps": 4, "lora_continue": True}]


def events(output):
    """Returns (tag, step, number or PNG) for each value in the event files of a run, and checks the framing."""
    found = []
    for path in sorted((output / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            for value in event.summary.value:
                content = value.image.encoded_image_string if value.HasField("image") else value.simple_value
                found.append((value.tag, event.step, content))
        assert start == len(data)
    return found


def expected(output, before):
    """Returns {(tag, step): number} for the lines of metrics.jsonl. before: stage -> steps of the stages before."""
    numbers = {}
    for line in micro.metric_lines(output, "step"):
        stage, step = line.pop("stage"), line.pop("step")
        numbers |= {(f"{stage}/{name}", before[stage] + step): value for name, value in line.items()}
    return numbers


@pytest.fixture
def make(settings):
    """`make(...)` -> a run of two stages with a tracker."""
    usual = {"trackers": ["tensorboard"], "stages": STAGES}
    return lambda *names, **changes: settings(**usual | ({"trackers": list(names)} if names else {}) | changes)


def assert_same_as_metrics(output):
    found = events(output)
    assert max(Counter((tag, step) for tag, step, _ in found).values()) == 1, "nothing twice"
    numbers = {(tag, step): value for tag, step, value in found if isinstance(value, float)}
    wanted = expected(output, {"first": 0, "second": 2})
    assert numbers.keys() == wanted.keys()
    np.testing.assert_allclose(list(numbers.values()), [wanted[key] for key in numbers], rtol=1e-6)
    pictures = {(tag, step): value for tag, step, value in found if isinstance(value, bytes)}
    names = {("first/samples", 0): "first-0", ("first/samples", 2): "first-2", ("second/samples", 2): "second-0"}
    names |= {("second/samples", 5): "second-3", ("second/samples", 6): "second-4"}
    names |= {(f"{stage}/before-after", step): f"{stage}-before-after" for stage, step in (("first", 2), ("second", 6))}
    assert pictures.keys() == names.keys()
    for key, name in names.items():
        with Image.open(io.BytesIO(pictures[key])) as tracked, Image.open(output / "samples" / f"{name}.png") as saved:
            assert np.array_equal(tracked, saved)


def test_tensorboard_holds_the_numbers_and_pictures_also_of_a_resumed_run(make):
    config = make()
    assert train(config) == 0
    output = Path(config.output)
    assert_same_as_metrics(output)
    # As after a kill: 3 of the 6 steps are saved, the last record is cut off.
    shutil.rmtree(output / "export")
    micro.remove_checkpoints_after(output, 4)
    (path,) = (output / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert train(config, resume=True) == 0
    assert_same_as_metrics(output)
    assert len(list((output / "tensorboard").iterdir())) == 2


def test_a_run_that_starts_afresh_leaves_nothing_of_the_one_before(make):
    config = make()
    assert train(config) == 0
    shutil.rmtree(Path(config.output) / "checkpoints")
    assert train(config) == 0
    assert_same_as_metrics(Path(config.output))


def test_each_copy_has_its_own(make):
    config = make(copies=[{"name": "a"}, {"name": "b", "seed": 3}])
    assert train(config) == 0
    for copy in config.copies:
        assert_same_as_metrics(Path(config.output) / copy.name)


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        assert not self.finished and all(step >= before for before, _ in self.logged)
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module with the functions of wandb that are called. `runs`: the runs that were begun."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init, module.Image = init, lambda path: ("picture", path)
    module.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def logged(runs):
    return Counter((name, step) for run in runs for step, values in run.logged for name in values)


def test_wandb_gets_each_number_and_picture_once_also_from_a_resumed_run(make, wandb):
    config = make("wandb")
    assert train(config) == 0
    (run,) = wandb.runs
    whole = logged([run])
    pictures = {(name, step) for name, step in whole if "samples" in name or "before" in name}
    assert whole.keys() - pictures == expected(Path(config.output), {"first": 0, "second": 2}).keys()
    assert len(pictures) == 7 and set(whole.values()) == {1} and run.finished
    assert run.options["config"] == to_table(config) and run.options["resume"] is None
    output = Path(config.output)
    shutil.rmtree(output / "export")
    micro.remove_checkpoints_after(output, 4)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    killed = next(i for i, line in enumerate(lines) if '"second", "step": 3' in line)  # before the validation
    (output / "metrics.jsonl").write_text("".join(lines[: killed + 1]))
    assert train(config, resume=True) == 0
    _, second = wandb.runs
    assert second.options["id"] == run.options["id"] and second.options["resume"] == "allow"
    again = logged([second])
    assert min(step for _, step in again) == 5 and ("second/loss", 5) not in again
    rest = {("second/samples", 5), ("second/held_out_loss", 5)} | {key for key in whole if key[1] > 5}
    assert again == dict.fromkeys(rest, 1)


def test_each_copy_is_a_run_of_wandb(make, wandb):
    assert train(make("wandb", copies=[{"name": "a"}, {"name": "b", "seed": 3}])) == 0
    assert [Path(run.options["name"]).name for run in wandb.runs] == ["a", "b"]
    assert len({run.options["id"] for run in wandb.runs}) == 2 and all(run.finished for run in wandb.runs)


def fails(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_training_ends_as_without(make, wandb, monkeypatch, caplog, where):
    if where == "init":
        wandb.init = fails
    else:
        monkeypatch.setattr(FakeRun, where, fails)
    without = make(trackers=[])
    config = make("wandb", "tensorboard")
    with caplog.at_level(logging.WARNING, "sdjax.train.trackers"):
        assert train(config) == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "sdjax.train.trackers"]
    assert warnings == ["tracker wandb is left out from now on: OSError: [Errno 28] No space left on device"]
    assert_same_as_metrics(Path(config.output))
    end = micro.exported(Path(config.output), "second")
    shutil.rmtree(config.output)
    assert train(without) == 0
    assert micro.exported(Path(config.output), "second") == end


def test_a_folder_that_cannot_be_written_is_one_warning(make, caplog):
    config = make()
    Path(config.output).mkdir()
    (Path(config.output) / "tensorboard").write_text("a file")
    assert train(config) == 0
    assert sum("tracker tensorboard is left out" in record.getMessage() for record in caplog.records) == 1


def test_a_missing_library_is_an_error_at_once(make, monkeypatch, no_weights):
    monkeypatch.setitem(trackers.MODULES, "wandb", "no_such_module")
    with pytest.raises(ConfigError, match=r"no_such_module, not installed: pip install 'sdjax\[trackers\]'"):
        train(make("wandb"))


def test_a_tracker_named_twice_is_refused(make):
    with pytest.raises(ConfigError, match="no name twice"):
        from_table(to_table(make()) | {"trackers": ["wandb", "wandb"]})
