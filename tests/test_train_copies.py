"""Several trainings at once: each ends as it would have by itself, and stays a run of its own."""

import dataclasses
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.errors import ConfigError
from sdjax.train import checkpoint, config_file
from sdjax.train.loop import train
from sdjax.train.stages import plan_runs

COPIES = [
    {"name": "plane", "placeholder_tokens": ["<plane>"], "init_tokens": ["red"]},
    {"name": "sky", "placeholder_tokens": ["<sky>"], "seed": 5},
    {"name": "again", "seed": 6},
]
STAGES = [
    {"name": "words", "train": ["textual_inversion"], "init_tokens": ["circle"], "clip_ti_decay": True},
    {"name": "both", "train": ["lora", "textual_inversion"], "lora_dropout": 0.1, "ema_decay": 0.9},
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    yield from micro.quick_compilation()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    micro.make_model(folder / "model")
    micro.make_images(folder / "images")
    micro.make_images(folder / "others", count=9)
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    def build(output="together", *, copies=COPIES, stages=STAGES, **more):
        common = {"steps": 3, "learning_rate": 1e-2, "placeholder_tokens": ["<thing>"]}
        copies = [*copies[:-1], {"path": str(folder / "others"), **copies[-1]}]
        options = {
            "stages": [{**common, **stage} for stage in stages],
            "copies": copies,
            "validation": {"prompts": ["a <thing>"], "steps": 1},
            "checkpoint": {"every": 1, "keep": 100},
        }
        return micro.settings(folder / "model", folder / "images", folder / output, **options | more)

    return build


@pytest.fixture(scope="module")
def together(settings):
    assert train(settings()) == 0
    return Path(settings().output)


def exports(folder):
    files = sorted(folder.glob("export/both/*.safetensors"))
    return {f"{path.name} {key}": np.asarray(array) for path in files for key, array in load_file(path).items()}


def test_a_copy_is_what_it_would_be_alone(together, settings):
    member = settings("alone").members()[2]
    assert train(member) == 0
    assert_near(exports(together / "again"), exports(Path(member.output)))


def assert_near(own, alone):
    assert own.keys() == alone.keys() and len(own) > 10
    for name in own:
        np.testing.assert_allclose(own[name], alone[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_copies_differ_and_are_named(together):
    files = {name: exports(together / name) for name in ("plane", "sky", "again")}
    assert {key.split()[0] for key in files["plane"]} >= {"plane.safetensors", "lora.safetensors"}
    assert {key.split()[0] for key in files["again"]} >= {"thing.safetensors"}
    loras = [{key: array for key, array in file.items() if key.startswith("lora.")} for file in files.values()]
    assert any(np.abs(loras[1][key] - loras[2][key]).max() > 1e-3 for key in loras[1])
    assert "a <sky>" in (together / "sky" / "config.toml").read_text()
    assert (together / "sky" / "samples" / "both-before-after.png").exists()


def test_resumed_at_different_steps_ends_with_the_same_bits(together, settings, folder):
    config = settings("resumed")
    shutil.copytree(together, config.output)
    for member, last in zip(config.members(), (4, 5, 4), strict=True):  # killed while it saved the three, in stage 2
        shutil.rmtree(Path(member.output) / "export")
        for step in checkpoint.steps(Path(member.output) / "checkpoints"):
            if step > last:
                shutil.rmtree(Path(member.output) / "checkpoints" / f"step_{step:08d}")
    for member in config.members():
        path = Path(member.output) / "config.toml"
        path.write_text(path.read_text().replace("/together/", "/resumed/"))
    assert train(config, resume=True) == 0
    for copy in config.copies:
        before, after = (exports(root / copy.name) for root in (together, Path(config.output)))
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_copy_goes_on_alone(together, settings, tmp_path):
    """Its folder is that of an ordinary run."""
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


def test_a_lora_below_is_refused(settings):
    stages = [{"name": "style", "train": ["lora"], "placeholder_tokens": []}, STAGES[0]]
    with pytest.raises(ConfigError, match="share one base model"):
        plan_runs(settings("refused", stages=stages))
