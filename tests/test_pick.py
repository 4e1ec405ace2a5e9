"""The files of single steps that a run leaves, how they survive interruptions, and `sdjax pick`."""

import dataclasses
import json
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from sdjax import pick, trees
from sdjax.__main__ import main
from sdjax.errors import ConfigError
from sdjax.formats.lora_file import load_lora
from sdjax.outline import Outline
from sdjax.train import snapshots
from sdjax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOTH = {
    **{"train": ["lora", "textual_inversion"], "placeholder_tokens": ["<sky>"], "init_tokens": ["red"]},
    **{"learning_rate": {"unet": 1e-2, "textual_inversion": 1e-2}, "steps": 5},
}
NAMES = {"lora.safetensors", "sky.safetensors", "README.md", "samples.png"}


@pytest.fixture(scope="module")
def written(micro_models, micro_images, tmp_path_factory):
    """A finished run of 5 steps with the files of steps 2, 4 and 5."""
    config = micro.settings(
        micro_models(),
        micro_images,
        tmp_path_factory.mktemp("written") / "run",
        stages=[BOTH],
        validation={"prompts": ["a <sky>"], "steps": 1},
        export={"every": 2},
        checkpoint={"every": 1, "keep": 10},
    )
    assert train(config) == 0
    return config


@pytest.fixture
def copied(written, tmp_path):
    """The configuration of a copy of the finished run, and its folder."""
    output = tmp_path / "run"
    shutil.copytree(written.output, output)
    config = dataclasses.replace(written, output=str(output))
    return config, output


def content(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "export" / "style" / "steps").iterdir()}


def test_files_are_written_at_each_step_and_validated(written, micro_models):
    output = Path(written.output)
    steps = snapshots.found(output / "export" / "style" / "steps")
    assert list(steps) == [2, 4, 5] and all(set(files) == NAMES for files in steps.values())
    losses = {line["step"]: line["held_out_loss"] for line in micro.metric_lines(output, "held_out_loss")}
    assert list(losses) == [0, 2, 4, 5]
    best = min((2, 4, 5), key=losses.__getitem__)
    table = (output / "export" / "style" / "steps" / "steps.md").read_text()
    assert [line for line in table.splitlines() if "best" in line] == [f"| {best} | {losses[best]:.5f} | best |"]
    # The last step's files are the export's.
    last, export = steps[5], output / "export" / "style"
    for name in ("lora.safetensors", "sky.safetensors"):
        assert last[name].read_bytes() == (export / name).read_bytes()
    shapes = Outline.load(micro_models()).shapes
    ups = [load_layers(files["lora.safetensors"], shapes) for files in (steps[2], last)]
    assert all(not np.array_equal(a["up"], b["up"]) for a, b in zip(*ups, strict=True))
    assert steps[4]["samples.png"].read_bytes() == (output / "samples" / "style-4.png").read_bytes()
    assert "| steps | 4 of 5, each of 4 images |" in steps[4]["README.md"].read_text()


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_neither_loses_nor_doubles_them(copied, step):
    """Step 2 is one with files, which are written again; step 3 is between two."""
    config, output = copied
    expected = content(output)
    micro.remove_checkpoints_after(output, step)
    assert train(config, resume=True) == 0
    assert content(output) == expected


def test_a_run_that_goes_on_from_an_earlier_step_leaves_none_of_later_ones(copied):
    config, output = copied
    stage = dataclasses.replace(config.stages[0], steps=3)
    assert train(dataclasses.replace(config, stages=(stage,)), resume=True, resume_step=1) == 0
    assert list(snapshots.found(output / "export" / "style" / "steps")) == [2, 3]


def test_the_newest_and_the_best_are_kept(copied):
    config, output = copied
    folder = output / "export" / "style" / "steps"
    snapshots.tidy(folder, {2: 0.1, 4: 0.2, 5: 0.3}, keep=1)
    assert list(snapshots.found(folder)) == [2, 5] and "| 2 | 0.10000 | best |" in (folder / "steps.md").read_text()
    assert len(list(folder.iterdir())) == 2 * len(NAMES) + 1
    snapshots.tidy(folder, {}, keep=1)
    assert list(snapshots.found(folder)) == [5]


def test_pick_makes_a_step_the_export(copied, micro_models, capsys):
    _, output = copied
    export = output / "export" / "style"
    steps = snapshots.found(export / "steps")
    assert main(["pick", str(output), "--step", "2"]) == 0
    assert f"{export} now holds step 2, held-out loss" in capsys.readouterr().out
    for name in NAMES:
        assert (export / name).read_bytes() == steps[2][name].read_bytes()
    shapes = Outline.load(micro_models()).shapes
    both = [load_layers(export / name, shapes) for name in ("lora.safetensors", "pytorch_lora_weights.safetensors")]
    for kohya, peft in zip(*both, strict=True):
        np.testing.assert_allclose(kohya["scale"] * kohya["up"], peft["scale"] * peft["up"], rtol=1e-6)
    with safe_open(export / "lora.safetensors", "np") as file:
        assert file.metadata()["ss_steps"] == "2"
    with Image.open(export / "samples.png") as grid:
        assert grid.size[0] > 16
    losses = {line["step"]: line["held_out_loss"] for line in micro.metric_lines(output, "held_out_loss")}
    best = min((2, 4, 5), key=losses.__getitem__)
    for flags in (["--best"], []):
        assert pick.main([str(output), *flags]) == 0
        assert (export / "lora.safetensors").read_bytes() == steps[best]["lora.safetensors"].read_bytes()


def load_layers(path, shapes):
    layers = sorted(trees.layers(load_lora(path, shapes), "down"), key=lambda item: item[0])
    return [layer for _, layer in layers]


def test_pick_without_pictures_removes_those_of_another_step(copied):
    _, output = copied
    (output / "export" / "style" / "steps" / "samples-000002.png").unlink()
    assert pick.main([str(output), "--step", "2"]) == 0
    assert not (output / "export" / "style" / "samples.png").exists()


def test_what_pick_cannot_do_is_one_error_and_changes_nothing(copied, finished, tmp_path, capsys):
    _, output = copied
    (tmp_path / "copies" / "a").mkdir(parents=True)
    shutil.copy(output / "config.toml", tmp_path / "copies" / "a" / "config.toml")
    lines = [line for line in (output / "metrics.jsonl").read_text().splitlines() if "held_out" not in line]
    cases = [
        ([str(output), "--step", "3"], 3, "--step 3: stage style has files of the steps 2, 4, 5"),
        ([str(output), "--step", "2", "--best"], 2, "not allowed with"),
        ([str(output), "--stage", "words"], 2, "the stages of"),
        ([str(finished[0])], 3, "stage style has no files of single steps: export.every = 100 writes them"),
        ([str(tmp_path / "none")], 3, "not the folder of a run"),
        ([str(tmp_path / "copies")], 3, f"those of its copies do: {tmp_path / 'copies' / 'a'}"),
    ]
    before = micro.exported(output)
    for arguments, code, message in cases:
        assert pick.main(arguments) == code, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    (output / "metrics.jsonl").write_text("\n".join(lines))
    assert pick.main([str(output)]) == 3
    assert "no held-out loss tells the best step, give --step: stage style has files" in capsys.readouterr().err
    assert micro.exported(output) == before and not (tmp_path / "none").exists()


def test_only_stages_without_whole_models_write_files(settings):
    stages = [{"name": "a"}, {"name": "b", "train": ["unet"]}, {"name": "c"}]
    config = settings(stages=stages, export={"every": 4})
    assert [config.file_steps(i) for i in range(3)] == [{4, 6}, set(), set()]
    assert config.validation_steps(0) == {0, 3, 4, 6} and config.validation_steps(1) == {0, 3, 6}
    with pytest.raises(ConfigError, match=r"export\.every writes LoRAs"):
        settings(stages=stages[1:], export={"every": 4})
    with pytest.raises(ConfigError, match=r"export\.keep = 2 needs export\.every"):
        settings(export={"keep": 2})


def test_each_copy_has_its_files(settings):
    copies = [{"name": "a"}, {"name": "b", "learning_rate": 1e-4}]
    config = settings(stages=[{"steps": 2}], validation={}, export={"every": 1, "keep": 1}, copies=copies)
    assert train(config) == 0
    for copy in ("a", "b"):
        output = Path(config.output) / copy
        losses = snapshots.losses(output / "metrics.jsonl", "style")
        assert sorted(losses) == [0, 1, 2]
        expected = {2} | ({1} if losses[1] <= losses[2] else set())
        assert set(snapshots.found(output / "export" / "style" / "steps")) == expected
    lines = [json.loads(line) for line in (Path(config.output) / "a" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5
