"""Settings are read from TOML and flags, written as TOML, and compared when a run is resumed."""

import dataclasses
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.errors import ConfigError, DataError
from sdjax.train.config import Data, OnResume, RunConfig, Stage, Validation
from sdjax.train.config_file import compare_runs, flags, flatten, from_table, load, on_resume, parse_args, to_toml

FILE = """
model = "tiny"
output = "runs/style"

[data]
path = "images"
resolution = 64
batch_size = 4

[[stages]]
name = "style"
train = ["lora"]
steps = 300
learning_rate = 1e-3
lora_rank = 4

[[stages]]
name = "character"
train = ["lora"]
steps = 100
lora_parts = ["unet", "text_encoder"]
learning_rate = { unet = 1e-4, text_encoder = 5e-5 }
lora_ranks = { "mid_block.*" = 8 }
data.path = "character"

[validation]
prompts = ["a red heart"]
every = 100

[parallel]
mesh = { data = -1, fsdp = 1 }
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return str(path)


def test_the_file_as_written(path):
    run = load(path)
    assert run.stages[0].learning_rate == 1e-3  # TOML reads 1e-3 as a number
    assert run.stages[1].learning_rate == {"unet": 1e-4, "text_encoder": 5e-5}
    assert run.stages[1].lora_ranks == {"mid_block.*": 8}
    assert run.data_of(run.stages[0]) == run.data
    assert run.data_of(run.stages[1]) == dataclasses.replace(run.data, path="character")
    assert run.validation.prompts == ("a red heart",)


def test_flags_win_over_the_file(path):
    line = """
        --stages.0.steps 5 --data.batch-size 2 --resume --parallel.mesh.data -1 --stages.0.betas 0.8 0.9 --clip-skip 2
        --stages.1.learning-rate unet 1 text_encoder 1e-5 --stages.0.data.flip True --no-remat
        --stages.0.lora-targets attention+ff --stages.1.lora-targets to_q$ to_k$ --validation.prompts a
    """
    arguments = parse_args([path, *line.split(), "b c"])
    run = arguments.config
    assert (arguments.resume, arguments.resume_step, arguments.debug) == (True, None, False)
    assert run.stages[0].steps == 5
    assert run.stages[0].lora_targets == "attention+ff"
    assert run.stages[1].lora_targets == ("to_q$", "to_k$")
    assert run.stages[1].learning_rate == {"unet": 1.0, "text_encoder": 1e-5}
    assert run.stages[0].betas == (0.8, 0.9)
    assert run.clip_skip == 2
    assert run.validation.prompts == ("a", "b c")
    # A stage that changes a data setting keeps its change; other stages take the value of the flag.
    assert run.data_of(run.stages[1]) == dataclasses.replace(run.data, batch_size=2, path="character")
    assert run.data_of(run.stages[0]).flip
    assert not run.data.flip


def test_resuming_from_a_step_is_resuming(path):
    arguments = parse_args([path, "--resume-step", "100", "--debug"])
    assert (arguments.resume, arguments.resume_step, arguments.debug) == (True, 100, True)
    assert not parse_args([path]).resume


def test_every_field_is_a_flag_with_its_help(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args([path, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in flags(load(path)):
        assert f"--{flag}" in text
    assert "(default: 0.001)" in text


def test_help_needs_no_file(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    assert "--stages.0.lora-rank" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages.0.step", "5"], r"unknown flag --stages.0.step: did you mean --stages.0.steps\?"),
        (["--stages.2.steps", "5"], "unknown flag --stages.2.steps"),
        (["--data.batch_sise=5"], r"did you mean --data.batch-size\?"),
        (["extra"], "unknown flag extra"),
        (["--stages.0.steps", "many"], "stages.0.steps"),
        (["--stages.0.steps"], "stages.0.steps"),
        (["--stages.0.steps", "0"], "stages.0.steps = 0: expected at least 1"),
        (["--dtype", "int8"], "int8.*float32"),
        (["--stages.0.train", "lokr"], "lokr"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(path, arguments, message, capsys):
    with pytest.raises(ConfigError, match=message) as error:
        parse_args([path, *arguments])
    assert len(str(error.value).splitlines()) == 1
    assert not capsys.readouterr().err


def test_a_missing_or_broken_file(tmp_path):
    with pytest.raises(ConfigError, match="the configuration comes first"):
        parse_args([])
    with pytest.raises(ConfigError, match="the configuration comes first"):
        parse_args(["--resume"])
    with pytest.raises(ConfigError, match=r"nope\.toml: No such file"):
        parse_args([str(tmp_path / "nope.toml")])
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: Invalid value"):
        parse_args([str(broken)])
    broken.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_args([str(broken)])


def test_written_and_read_again(path):
    run = load(path)
    assert from_table(tomllib.loads(to_toml(run))) == run


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
NUMBERS = st.floats(1e-12, 1e12)


RANKS = st.dictionaries(st.from_regex(r"[a-z. *\"]+", fullmatch=True), st.integers(0, 99))


@given(TEXT, st.lists(TEXT), NUMBERS, RANKS)
def test_any_text_and_number_survives_the_round_trip(text, prompts, number, ranks):
    ranks = {k: v for k, v in ranks.items() if _compiles(k)}
    run = RunConfig(
        text,
        text,
        Data(text, caption=text),
        (Stage("a", ("lora",), 1, number, lora_alpha=number, lora_ranks=ranks),),
        validation=Validation(prompts=tuple(prompts)),
    )
    assert from_table(tomllib.loads(to_toml(run))) == run


def _compiles(pattern):
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def test_flatten_names_every_value(path):
    flat = flatten(load(path))
    assert flat["data.resolution"] == 64
    assert flat["stages.1.learning_rate.unet"] == 1e-4
    assert flat["stages.1.data.path"] == "character"
    assert flat["validation.prompts"] == ["a red heart"]


# ------------------------------------------------------------------------------------------- what may change on resume


def run_of(**changes):
    stage = {"name": "a", "train": ["vae"], "steps": 1, "learning_rate": 1.0, "vae_loss": {"l1": 2.0}}
    return from_table({"model": "m", "output": "o", "data": {"path": "p"}, "stages": [stage], **changes})


def test_the_same_run_compares_equal_through_json():
    run = {"stages.0.betas": [0.9, 0.999], "seed": 0, "fingerprint.model": "ab"}
    compare_runs(run, {**run, "stages.0.betas": (0.9, 0.999)}, run_of())


def test_another_run_is_refused_with_the_list(caplog):
    saved = {"fingerprint.model": "ab", "stages.0.lora_rank": 4, "stages.0.learning_rate": 1e-4, "output": "a"}
    current = {"fingerprint.model": "cd", "stages.0.lora_rank": 8, "stages.0.learning_rate": 1e-3, "output": "b"}
    with pytest.raises(DataError) as error:
        compare_runs(saved, current, run_of())
    assert "model is another one" in str(error.value)
    assert "stages.0.lora_rank was 4, is 8" in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert "another stages.0.learning_rate: was 0.0001, is 0.001" in caplog.text
    with pytest.raises(DataError, match=r"stages.1.name was null, is \"more\""):
        compare_runs(saved, {**saved, "stages.1.name": "more"}, run_of())


def test_changed_images_are_named_and_refused_unless_allowed(caplog):
    saved = {"fingerprint.data.a": {"same.png": "0", "1.png": "1", "gone.png": "2"}}
    current = {"fingerprint.data.a": {"same.png": "0", "1.png": "3", **{f"new{i}.png": "4" for i in range(9)}}}
    shown = "1 changed (1.png), 9 new (new0.png, new1.png, new2.png, ...), 1 missing (gone.png)"
    with pytest.raises(DataError, match=rf"data\.a: {re.escape(shown)} \(--checkpoint\.allow-changed-data"):
        compare_runs(saved, current, run_of())
    compare_runs(saved, current, run_of(checkpoint={"allow_changed_data": True}))
    assert shown in caplog.text


def test_a_run_saved_before_a_setting_existed_had_it_at_its_default():
    saved = {k: v for k, v in flatten(run_of()).items() if k not in ("copies", "data.inpaint_full")}
    compare_runs(saved, flatten(run_of()), run_of())
    changed = run_of(data={"path": "p", "inpaint_full": 0.5})
    with pytest.raises(DataError, match=r"changed: data.inpaint_full was 0.25, is 0.5$"):
        compare_runs(saved, flatten(changed), changed)


@pytest.mark.parametrize(
    ("key", "mark"),
    [
        ("seed", None), ("data.resolution", None), ("clip_skip", None), ("stages.0.lora_rank", None),
        ("stages.0.train", None), ("fingerprint.model", None), ("copies.0.name", None),
        ("stages.3.learning_rate.unet", OnResume.LOGGED), ("stages.0.data.batch_size", OnResume.LOGGED),
        ("data.background", OnResume.LOGGED), ("data.on_bad_image", OnResume.LOGGED),
        ("data.repeats.cat/*", OnResume.LOGGED), ("stages.0.vae_loss.l1", OnResume.LOGGED), ("dtype", OnResume.LOGGED),
        ("output", OnResume.FREE), ("data.path", OnResume.FREE), ("validation.prompts", OnResume.FREE),
        ("parallel.mesh.data", OnResume.FREE), ("checkpoint.keep", OnResume.FREE),
    ],
)  # fmt: skip
def test_the_mark_of_a_setting_says_whether_it_may_change(key, mark):
    assert on_resume(key) is mark
