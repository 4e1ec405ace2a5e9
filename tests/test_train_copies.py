"""Several trainings at once: each ends as if it had been trained alone, and each is a run that can go on alone."""

import dataclasses
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.errors import ConfigError
from sdjax.train import checkpoint, config_file, loop
from sdjax.train.loop import train
from sdjax.train.stages import plan_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

COPIES = [
    {"name": "plane", "placeholder_tokens": ["<plane>"], "init_tokens": ["red"]},
    {"name": "sky", "placeholder_tokens": ["<sky>"], "seed": 5},
    {"name": "again", "seed": 6},
]
STAGES = [
    {"name": "words", "train": ["textual_inversion"], "init_tokens": ["circle"], "clip_ti_decay": True},
    {"name": "both", "train": ["lora", "textual_inversion"], "lora_dropout": 0.1, "ema_decay": 0.9},
]


@pytest.fixture(scope="module")
def settings(micro_models, micro_images, tmp_path_factory):
    """`settings(output, copies=..., stages=..., ...)` -> a run with copies, of which the last has other images."""
    folder = tmp_path_factory.mktemp("copies")
    micro.make_images(folder / "others", count=9)

    def make(output="together", *, copies=COPIES, stages=STAGES, **changes):
        common = {"steps": 3, "learning_rate": 1e-2, "placeholder_tokens": ["<thing>"]}
        copies = [*copies[:-1], {"path": str(folder / "others"), **copies[-1]}]
        options = {
            "stages": [{**common, **stage} for stage in stages],
            "copies": copies,
            "validation": {"prompts": ["a <thing>"], "steps": 1},
            "checkpoint": {"every": 1, "keep": 100},
        }
        return micro.settings(micro_models(), micro_images, folder / output, **options | changes)

    return make


@pytest.fixture(scope="module")
def together(settings):
    assert train(settings()) == 0
    return Path(settings().output)


def exports(folder):
    """Returns "file tensor" -> array, for the exports of the last stage."""
    files = sorted(folder.glob("export/both/*.safetensors"))
    return {f"{path.name} {key}": np.asarray(array) for path in files for key, array in load_file(path).items()}


def test_a_copy_is_what_it_would_be_alone(together, settings):
    member = settings("alone").members()[2]
    assert train(member) == 0
    assert_near(exports(together / "again"), exports(Path(member.output)))


def assert_near(copy, alone):
    assert copy.keys() == alone.keys() and len(copy) > 10
    for name in copy:
        np.testing.assert_allclose(copy[name], alone[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_copies_differ_and_are_named(together):
    files = {name: exports(together / name) for name in ("plane", "sky", "again")}
    assert {key.split()[0] for key in files["plane"]} >= {"plane.safetensors", "lora.safetensors"}
    assert {key.split()[0] for key in files["again"]} >= {"thing.safetensors"}
    loras = [{key: array for key, array in file.items() if key.startswith("lora.")} for file in files.values()]
    assert any(np.abs(loras[1][key] - loras[2][key]).max() > 1e-3 for key in loras[1])
    assert "a <sky>" in (together / "sky" / "config.toml").read_text()
    assert (together / "sky" / "samples" / "both-before-after.png").exists()


def test_resumed_at_different_steps_ends_with_the_same_bits(together, settings):
    config = settings("resumed")
    shutil.copytree(together, config.output)
    for member, last in zip(config.members(), (4, 5, 4), strict=True):  # killed in stage 2, while it saved the copies
        shutil.rmtree(Path(member.output) / "export")
        micro.remove_checkpoints_after(Path(member.output), last)
        path = Path(member.output) / "config.toml"
        path.write_text(path.read_text().replace("/together/", "/resumed/"))
    assert train(config, resume=True) == 0
    for copy in config.copies:
        before, after = (exports(root / copy.name) for root in (together, Path(config.output)))
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_stopped_between_the_saves_of_two_copies_all_stand_at_one_step(settings, monkeypatch, caplog):
    """With keep = 1 the step before is removed only when all copies have saved. Before that there is the beginning."""
    config = settings("between", stages=STAGES[:1], checkpoint={"every": 1, "keep": 1}, validation={})
    save, calls = checkpoint.save, []

    def save_until_stopped(*arguments):
        save(*arguments)
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save_until_stopped)
        train(config)
    outputs = [Path(member.output) for member in config.members()]
    assert [checkpoint.steps(output / "checkpoints") for output in outputs] == [[1, 2], [1, 2], [1]]
    assert restored(config) == [1, 1, 1]
    for output, last in zip(outputs, (1, 0, 0), strict=True):  # as if it had been stopped at the first save
        micro.remove_checkpoints_after(output, last)
    assert restored(config) == [0, 0, 0]
    assert "saved for the first time: starting fresh" in caplog.text


def restored(config):
    trainings = [loop.Training(run) for run in plan_runs(config)]
    loop.restore_all(trainings, None)
    return [training.reached for training in trainings]


def test_a_copy_goes_on_alone(together, settings, tmp_path):
    """The folder of a copy is that of an ordinary run."""
    member = config_file.load(together / "sky" / "config.toml")
    assert member == settings().members()[1]
    shutil.copytree(together / "sky", tmp_path / "sky")
    member = dataclasses.replace(member, output=str(tmp_path / "sky"))
    assert train(member, resume=True, resume_step=3) == 0
    assert_near(exports(together / "sky"), exports(tmp_path / "sky"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": [{"name": "a"}, {"name": "a"}]}, "names that differ"),
        ({"copies": [{"name": "cache"}]}, "names that differ"),
        ({"stages": [{"name": "x", "train": ["unet"], "placeholder_tokens": []}]}, "share one"),
        ({"stages": [{"name": "x", "train": ["lora"], "placeholder_tokens": []}]}, "no stage trains any"),
        ({"parallel": {"mode": "pmap"}}, "'jit'"),
        ({"copies": [{"name": "a", "init_tokens": ["red", "blue"]}]}, r"copies\.0 \(a\)"),
    ],
)
def test_what_cannot_be_copied_is_refused(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings("refused", **{"copies": COPIES, **changes})
