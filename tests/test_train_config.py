"""TOML and flags -> a checked RunConfig, and every way in which they can be wrong."""

import dataclasses
import inspect
import re
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.errors import ConfigError, DataError
from sdjax.train import config, config_file
from sdjax.train.config import Data, DataOverride, OnResume, RunConfig, Stage
from sdjax.train.config_file import compare_runs, flatten, from_table, on_resume

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


def with_words(**changes):
    return with_stage(**{"train": ["textual_inversion"], "placeholder_tokens": ["<plana>"]} | changes)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return str(path)


def minimal(**changes):
    table = tomllib.loads(FILE) | changes
    return table


def with_stage(**changes):
    table = minimal()
    table["stages"][0] |= changes
    return table


def test_the_file_as_written(path):
    run = config_file.load(path)
    assert run.stages[0].learning_rate == 1e-3  # TOML reads 1e-3 as a number
    assert run.stages[1].learning_rate == {"unet": 1e-4, "text_encoder": 5e-5}
    assert run.stages[1].lora_ranks == {"mid_block.*": 8}
    assert run.data_of(run.stages[0]) == run.data
    assert run.data_of(run.stages[1]) == dataclasses.replace(run.data, path="character")
    assert run.validation.prompts == ("a red heart",)


def test_a_stage_may_override_every_data_field_and_no_other():
    assert [f.name for f in dataclasses.fields(DataOverride)] == [f.name for f in dataclasses.fields(Data)]


def test_choices_are_those_of_the_rooms_that_carry_them_out():
    from sdjax import lora

    assert set(config.LoraTargets.__args__) == set(lora.TARGETS)


def test_flags_win_over_the_file(path):
    flags = """
        --stages.0.steps 5 --data.batch-size 2 --resume --parallel.mesh.data -1 --stages.0.betas 0.8 0.9 --clip-skip 2
        --stages.1.learning-rate unet 1 text_encoder 1e-5 --stages.0.data.flip True --no-remat
        --stages.0.lora-targets attention+ff --stages.1.lora-targets to_q$ to_k$ --validation.prompts a
    """
    arguments = config_file.parse_args([path, *flags.split(), "b c"])
    run = arguments.config
    assert (arguments.resume, arguments.resume_step, arguments.debug) == (True, None, False)
    assert run.stages[0].steps == 5
    assert run.stages[0].lora_targets == "attention+ff"
    assert run.stages[1].lora_targets == ("to_q$", "to_k$")
    assert run.stages[1].learning_rate == {"unet": 1.0, "text_encoder": 1e-5}
    assert run.stages[0].betas == (0.8, 0.9)
    assert run.clip_skip == 2
    assert run.validation.prompts == ("a", "b c")
    # The run's value reaches the stages that keep it, the stage's own stays.
    assert run.data_of(run.stages[1]) == dataclasses.replace(run.data, batch_size=2, path="character")
    assert run.data_of(run.stages[0]).flip
    assert not run.data.flip


def test_resuming_from_a_step_is_resuming(path):
    arguments = config_file.parse_args([path, "--resume-step", "100", "--debug"])
    assert (arguments.resume, arguments.resume_step, arguments.debug) == (True, 100, True)
    assert not config_file.parse_args([path]).resume


def test_every_field_is_a_flag_with_its_help(path, capsys):
    with pytest.raises(SystemExit) as stopped:
        config_file.parse_args([path, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in config_file.flags(config_file.load(path)):
        assert f"--{flag}" in text
    assert "(default: 0.001)" in text


def test_help_needs_no_file(capsys):
    with pytest.raises(SystemExit) as stopped:
        config_file.parse_args(["--help"])
    assert stopped.value.code == 0
    assert "--stages.0.lora-rank" in capsys.readouterr().out


def test_every_field_is_documented():
    for record in (Data, Stage, config.Validation, config.Checkpoint, config.Mesh):
        body = inspect.getsource(record)
        for f in dataclasses.fields(record):
            if not dataclasses.is_dataclass(f.type):
                assert body.split(f"    {f.name}: ", 1)[1].split('"""')[1].strip(), f.name


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (minimal(modle="x"), r"unknown key modle: did you mean model\?"),
        (minimal(zzz=1), "unknown key zzz: choices: model, output"),
        (minimal(data={"path": "x", "batchsize": 2}), r"unknown key data.batchsize: did you mean data.batch_size\?"),
        (with_stage(lr=1), r"unknown key stages.0.lr: choices"),
        (with_stage(data={"pth": "x"}), r"unknown key stages.0.data.pth: did you mean stages.0.data.path\?"),
        (minimal(data={}), "missing: data.path"),
        ({}, "missing: model, output, data, stages"),
        (minimal(stages=[]), "at least one"),
        (minimal(model=3), "model = 3: expected text"),
        (minimal(model=""), "model = '': expected not empty"),
        (minimal(remat=1), "remat = 1: expected true or false"),
        (minimal(seed=True), "seed = True: expected a whole number"),
        (minimal(seed=1.5), "seed = 1.5: expected a whole number"),
        (minimal(seed=-1), "seed = -1: expected at least 0"),
        (minimal(dtype="int8"), "dtype = 'int8': expected one of float32, bfloat16, float16"),
        (minimal(dtype=["float32"]), "dtype = .*expected one of"),
        (minimal(data="images"), "data = 'images': expected a table"),
        (
            minimal(data={"path": "x", "resolution": 60}),
            "data.resolution = 60: expected at least 8 and at most 4096, a multiple of 8",
        ),
        (minimal(data={"path": "x", "resolution": 0}), "data.resolution = 0: expected at least 8"),
        (minimal(data={"path": "x", "caption_dropout": 1.5}), "at least 0 and at most 1"),
        (minimal(data={"path": "x", "background": "whitish"}), "a CSS colour name"),
        (minimal(data={"path": "x", "validation_count": 1, "validation_path": "y"}), "choose one"),
        (with_stage(steps=0), "stages.0.steps = 0: expected at least 1"),
        (with_stage(steps=10.0), "stages.0.steps = 10.0: expected a whole number"),
        (with_stage(learning_rate="1e-4"), "stages.0.learning_rate = '1e-4': expected a number"),
        (with_stage(learning_rate=float("nan")), "expected a number"),
        (with_stage(learning_rate=0), "expected above 0"),
        (with_stage(learning_rate={"unet": "x"}), "stages.0.learning_rate.unet = 'x'"),
        (with_stage(learning_rate={"text_encoder": 1e-4}), "has text_encoder, but .* trains unet"),
        (with_stage(train=["lokr"]), "stages.0.train.0 = 'lokr': expected one of lora, textual_inversion, unet"),
        (with_stage(train=["lora", "unet"]), "unet is trained as a whole and by LoRA"),
        (with_stage(train=["vae", "unet"], lora_parts=["text_encoder"]), "vae is trained alone"),
        (with_stage(train=["vae"], vae_loss={"l3": 1}), "has 'l3': choices are l1, l2"),
        (with_stage(train=["textual_inversion"]), "need each other"),
        (with_stage(placeholder_tokens=["<a>"]), "need each other"),
        (with_words(placeholder_tokens=["<a b>"]), "different words without spaces"),
        (with_words(placeholder_tokens=["<a>", "<a>"]), "different words"),
        (with_words(vectors_per_token=[1, 2]), "one number, or 1"),
        (with_words(vectors_per_token=0), "at least 1"),
        (with_words(init_tokens=["a", "b"]), "one for each of 1"),
        (with_words(template=["a photo"]), "with {} where the new words go"),
        (with_stage(template="style"), "template needs placeholder_tokens"),
        (with_words(learning_rate={"unet": 1e-3}), "has unet, but the stage trains textual_inversion"),
        (with_stage(train=[]), "at least one"),
        (with_stage(train={}), "stages.0.train = {}: expected a list"),
        (with_stage(lora_targets="atention"), "expected one of attention, attention"),
        (with_stage(lora_targets=["to_(q"]), "not a regular expression"),
        (with_stage(lora_ranks={"*": 4}), "not a regular expression"),
        (with_stage(betas=[0.9]), "stages.0.betas = .*expected a list of 2"),
        (with_stage(betas=[0.9, 1.0]), "stages.0.betas.1 = 1.0"),
        (with_stage(min_snr_gamma=5, debiased=True), "choose one"),
        (with_stage(optimizer="schedule_free", ema_decay=0.9), "averages by itself"),
        (with_stage(warmup_steps=301), "more than"),
        (with_stage(schedule="constant_with_warmup"), "needs stages.0.warmup_steps"),
        (with_stage(timestep_range=[0.5, 0.5]), "the first below the second"),
        (with_stage(name="character"), "taken by an earlier stage"),
        (with_stage(name="../x"), "a name of letters"),
        (with_stage(name=".."), "a name of letters"),
        (minimal(parallel={"mode": "pmap", "mesh": {"fsdp": 2}}), "'pmap' has a data axis only"),
        (minimal(parallel={"mesh": {"data": -1, "fsdp": -1}}), "only one of"),
        (minimal(parallel={"mesh": {"data": 0}}), "an axis is 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(table, message):
    with pytest.raises(ConfigError, match=message) as error:
        config_file.from_table(table)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("flags", "message"),
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
def test_a_wrong_flag_is_one_clear_line(path, flags, message, capsys):
    with pytest.raises(ConfigError, match=message) as error:
        config_file.parse_args([path, *flags])
    assert len(str(error.value).splitlines()) == 1
    assert not capsys.readouterr().err


def test_a_missing_or_broken_file(tmp_path):
    with pytest.raises(ConfigError, match="the configuration comes first"):
        config_file.parse_args([])
    with pytest.raises(ConfigError, match="the configuration comes first"):
        config_file.parse_args(["--resume"])
    with pytest.raises(ConfigError, match=r"nope\.toml: No such file"):
        config_file.parse_args([str(tmp_path / "nope.toml")])
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML: Invalid value"):
        config_file.parse_args([str(broken)])
    broken.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        config_file.parse_args([str(broken)])


def test_written_and_read_again(path):
    run = config_file.load(path)
    assert config_file.from_table(tomllib.loads(config_file.to_toml(run))) == run


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
        validation=config.Validation(prompts=tuple(prompts)),
    )
    assert config_file.from_table(tomllib.loads(config_file.to_toml(run))) == run


def _compiles(pattern):
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def test_flatten_names_every_value(path):
    flat = config_file.flatten(config_file.load(path))
    assert flat["data.resolution"] == 64
    assert flat["stages.1.learning_rate.unet"] == 1e-4
    assert flat["stages.1.data.path"] == "character"
    assert flat["validation.prompts"] == ["a red heart"]


def test_reading_a_configuration_loads_nothing_heavy():
    code = "import sys, sdjax.train.config; print(sorted({'jax', 'tyro', 'flax', 'orbax', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    assert 'fingerprint.model was "ab", is "cd"' in str(error.value)
    assert "stages.0.lora_rank was 4, is 8" in str(error.value)
    assert "learning_rate" not in str(error.value)
    assert "another stages.0.learning_rate: was 0.0001, is 0.001" in caplog.text
    with pytest.raises(DataError, match=r"stages.1.name was null, is \"more\""):
        compare_runs(saved, {**saved, "stages.1.name": "more"}, run_of())


def test_changed_data_is_refused_unless_allowed():
    saved, current = {"fingerprint.data.a": "ab"}, {"fingerprint.data.a": "cd"}
    with pytest.raises(DataError, match=r"fingerprint\.data\.a"):
        compare_runs(saved, current, run_of())
    compare_runs(saved, current, run_of(checkpoint={"allow_changed_data": True}))


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
        ("data.repeats.cat/*", OnResume.LOGGED), ("stages.0.vae_loss.l1", OnResume.LOGGED), ("dtype", OnResume.LOGGED),
        ("output", OnResume.FREE), ("data.path", OnResume.FREE), ("validation.prompts", OnResume.FREE),
        ("parallel.mesh.data", OnResume.FREE), ("checkpoint.keep", OnResume.FREE),
    ],
)  # fmt: skip
def test_the_mark_of_a_setting_says_whether_it_may_change(key, mark):
    assert on_resume(key) is mark
