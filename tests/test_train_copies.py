"""Several trainings at once: each ends as if it had been trained alone, and each is a run that can go on alone."""

import dataclasses
import functools
import shutil
from pathlib import Path

import micro
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from sdjax.errors import ConfigError, TrainingStopped
from sdjax.train import checkpoint, config_file, loop, parallel
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


SWEEP = [
    {"name": "low", "learning_rate": 1e-3, "weight_decay": 0.0},
    {"name": "alpha", "lora_alpha": 8.0, "min_snr_gamma": 5.0, "huber_c": 0.5},
    {"name": "noisy", "learning_rate": {"unet": 2e-2}, "weight_decay": 5.0, "noise_offset": 0.1, "prior_weight": 0.5},
    {"name": "plain", "input_perturbation": 0.2},
]
STYLE = {
    "name": "style",
    "train": ["lora"],
    "placeholder_tokens": [],
    "noise_offset": 0.05,
    "loss": "huber",
    "prior_prompt": "circle",
    "prior_count": 2,
    "steps": 4,
}


@pytest.fixture(scope="module")
def sweep(settings):
    """`sweep(output, copies=..., ...)` -> a run whose copies differ in numbers."""

    def make(output="sweep", *, copies=SWEEP, stages=(STYLE,), **changes):
        return settings(output, copies=[{"path": "", **copy} for copy in copies], stages=list(stages), **changes)

    return make


@pytest.fixture(scope="module")
def swept(sweep):
    config = sweep(validation={"prompts": ["red circle", "blue circle"], "steps": 1})
    assert train(config) == 0
    return config


def adapter(output, stage="style"):
    (path,) = Path(output).glob(f"export/{stage}/lora.safetensors")
    return {key: np.asarray(array) for key, array in load_file(path).items()}


def difference(one, other):
    """Returns the difference of two adapters as a multiple of what training made of the second: its up matrices."""
    assert one.keys() == other.keys()
    ups = [key for key in one if "lora_up" in key]
    norm = lambda arrays: np.sqrt(sum(np.sum(np.square(array)) for array in arrays))
    return norm([one[key] - other[key] for key in ups]) / norm([other[key] for key in ups])


@pytest.mark.parametrize("number", range(len(SWEEP)))
def test_a_copy_with_other_numbers_is_what_it_would_be_alone(swept, sweep, number):
    """The two differ by rounding alone: by 2e-6."""
    member = sweep(f"alone-{number}", validation={}).members()[number]
    assert train(member) == 0
    assert difference(adapter(swept.members()[number].output), adapter(member.output)) < 2e-5


def test_the_numbers_make_a_difference(swept):
    ends = [adapter(member.output) for member in swept.members()]
    for i, one in enumerate(ends):
        for other in ends[:i]:
            assert difference(one, other) > 0.1


def test_the_copies_are_compared_in_a_table_and_a_grid(swept):
    table = (Path(swept.output) / "copies.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| ")]
    head, *rows = cells
    assert head[:4] == ["copy", "learning_rate", "weight_decay", "lora_alpha"]
    assert head[-3:] == ["held-out loss before", "and after", "training loss, last tenth"]
    assert [row[0] for row in rows] == ["low", "alpha", "noisy", "plain"]
    assert [row[1] for row in rows] == ["0.001", "0.01", "0.02", "0.01"]
    assert [row[3] for row in rows] == ["2", "8", "2", "2"]
    for row, member in zip(rows, swept.members(), strict=True):
        assert row[-2] == f"{micro.metric_lines(Path(member.output), 'held_out_loss')[-1]['held_out_loss']:.5g}"
    with Image.open(Path(swept.output) / "copies.png") as grid:
        assert grid.width > 4 * 16 and grid.height > 2 * 16


def test_a_resumed_sweep_ends_with_the_same_bits(swept, sweep):
    config = sweep("sweep-resumed", validation={})
    shutil.copytree(swept.output, config.output)
    for member in config.members():
        shutil.rmtree(Path(member.output) / "export")
        micro.remove_checkpoints_after(Path(member.output), 2)
    assert train(config, resume=True) == 0
    for one, other in zip(swept.members(), config.members(), strict=True):
        before, after = adapter(one.output), adapter(other.output)
        assert all(np.array_equal(before[key], after[key]) for key in before)


def test_copies_stand_on_one_lora_that_the_first_trains_for_all(sweep, monkeypatch):
    """The stage before the sweep is trained once, and yet each copy is a run that can be resumed alone."""
    first = {**STYLE, "prior_prompt": "", "steps": 2, "name": "shared"}
    second = {**first, "name": "style", "steps": 3}
    copies = [{"name": "a", "stage": "style", "learning_rate": 1e-3}, {"name": "b", "stage": "style"}]
    make = functools.partial(sweep, copies=copies, stages=[first, second])
    config = make("upon-one", validation={"prompts": ["red circle"], "steps": 1})
    stacked = []
    monkeypatch.setattr(loop, "together", lambda step: stacked.append(step) or parallel.together(step))
    assert train(config) == 0
    assert len(stacked) == 1, "only the second stage is trained in copies"
    a, b = (Path(member.output) for member in config.members())
    assert (a / "export/shared/lora.safetensors").read_bytes() == (b / "export/shared/lora.safetensors").read_bytes()
    assert (b / "export/shared/samples.png").exists()
    alone = make("upon-one-alone", validation={}).members()[0]
    assert train(alone) == 0
    assert difference(adapter(a), adapter(alone.output)) < 2e-5 < 0.1 < difference(adapter(a), adapter(b))
    end = adapter(b)
    for output in (a, b):
        shutil.rmtree(output / "export")
        micro.remove_checkpoints_after(output, 1)
    assert train(config, resume=True) == 0
    assert all(np.array_equal(end[key], tensor) for key, tensor in adapter(b).items())


def test_a_copy_that_is_not_finite_does_not_stop_the_others(sweep, caplog):
    stage = {"name": "style", "train": ["lora"], "placeholder_tokens": [], "clip_norm": 0.0}
    copies = [{"name": "wild", "learning_rate": 1e30}, {"name": "tame"}]
    config = sweep("wild", copies=copies, stages=[stage], validation={})
    assert train(config) == 0
    wild, tame = (micro.metric_lines(Path(member.output)) for member in config.members())
    assert len(wild) == len(tame) == 3 and None in [wild[-1]["loss"], wild[-1]["grad_norm"]]
    assert None not in [line["loss"] for line in tame]
    warnings = [record.getMessage() for record in caplog.records if "other copies go on" in record.getMessage()]
    assert len(warnings) == 1 and warnings[0].startswith("wild, stage style, step")
    assert "steps not finite" in (Path(config.output) / "copies.md").read_text()
    both = sweep("both-wild", copies=[copies[0], {**copies[1], "learning_rate": 2e30}], stages=[stage], validation={})
    with pytest.raises(TrainingStopped, match="learning_rate"):
        train(both)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_rank": 8},
            "copies.0.lora_rank: copies train in one program and have the same lora_rank",
        ),
        ({"optimizer": "lion"}, "have the same optimizer"),
        ({"batch_size": 2}, "have the same batch_size"),
        ({"huber_c": 0.2}, "copies.0.huber_c changes nothing: no stage uses it"),
        ({"stage": "other", "weight_decay": 0.0}, "copies.0.stage = 'other': expected one of style"),
        ({"learning_rate": -1.0}, "copies.0.learning_rate = -1.0: expected above 0"),
        ({"learning_rate": {"vae": 1.0}}, r"copies.0 \(a\): stages.0.learning_rate has vae"),
        ({"noise_offset": 0.1}, "noise_offset is 0 in some"),
    ],
)
def test_what_cannot_differ_is_refused(sweep, changes, message):
    stage = {"name": "style", "train": ["lora"], "placeholder_tokens": []}
    with pytest.raises(ConfigError, match=message):
        plan_runs(sweep("refused", copies=[{"name": "a", **changes}, {"name": "b"}], stages=[stage]))


def test_numbers_of_copies_are_flags(sweep, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(sweep("flags")))
    flags = ["--copies.0.learning-rate", "0.5", "--copies.1.lora-alpha", "2"]
    config = config_file.parse_args([str(file), *flags]).config
    assert [member.stages[0].learning_rate for member in config.members()[:2]] == [0.5, 1e-2]
    assert config.members()[1].stages[0].lora_alpha == 2.0


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
