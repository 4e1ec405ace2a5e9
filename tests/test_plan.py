"""The command that says what a run needs."""

import json

import jax
import pytest

from sdjax import plan
from sdjax.errors import ConfigError
from sdjax.runtime import chips, compiled

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def config(settings, tmp_path):
    from sdjax.train.config_file import to_toml

    path = tmp_path / "run.toml"
    path.write_text(to_toml(settings(validation={"prompts": []})))
    return str(path)


def test_a_training_run(config, no_weights, capsys, tmp_path):
    assert plan.main([config, "--json", "--stages.0.steps", "7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["advice"] == [] and report["steps"] == 7
    assert [row["name"] for row in report["programs"]] == [
        f"style: {name}" for name in ("encode images", "encode captions", "step", "held-out loss")
    ]
    for row in report["programs"]:
        assert 0 < row["memory_gb"] < row["available_gb"] and row["moved_gb"] >= 0 and row["compile_s"] > 0
        assert row["megacycles"] is row["seconds_at_least"] is None  # no data sheet of this CPU
    assert report["seconds_per_step_at_least"] is None
    assert not (tmp_path / "run").exists()
    assert plan.main([config, "--only-step", "--json"]) == 0
    only = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in only["programs"]] == ["style: step"] and only["fits"]
    assert plan.main([config]) == 0
    out = capsys.readouterr().out
    assert "style: step" in out and "fits: " in out and f"on each of {len(jax.devices())} devices" in out


def test_a_call_to_draw(micro_models, no_weights, capsys):
    arguments = ["--draw", "--model", str(micro_models()), "--size", "24", "--count", "3", "--steps", "5"]
    assert plan.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["runs"] for row in report["programs"]} == {
        "encode text": 1,
        "sampler step": 5,
        "decode": 3,
    }


def test_a_call_to_draw_and_enlarge(micro_models, no_weights, capsys):
    arguments = ["--draw", "--model", str(micro_models()), "--size", "200", "--count", "2", "--upscale", "tiny"]
    assert plan.main([*arguments, "--json"]) == 0
    *_, last = json.loads(capsys.readouterr().out)["programs"]
    assert (last["name"], last["runs"]) == ("upscale a tile", 2 * 4)  # tiles of 192 pixels
    assert last["memory_gb"] > 0
    assert plan.main([*arguments[:-1], "gone.pth"]) == 3
    assert "upscaler 'gone.pth': no such file" in capsys.readouterr().err


def test_the_times_are_those_of_the_data_sheet():
    chip = chips.TPUS["v5e"]
    figures = compiled.Figures(1e9, 197e12, 819e8, {}, None, 0, 1.0)
    assert compiled.seconds_at_least(figures, chip) == 1.0  # compute; the bytes take 0.1 s
    assert compiled.seconds_at_least(figures._replace(moved=819e10), chip) == 10.0
    assert compiled.seconds_at_least(figures._replace(cycles=3e9), chip) == 2.0  # at 1.5 GHz
    assert compiled.seconds_at_least(figures, None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give CONFIG.toml of a training run, or --draw --model MODEL"),
        (["--draw"], "give CONFIG.toml of a training run, or --draw --model MODEL"),
        (["--draw", "--model", "tiny", "run.toml"], "--draw plans a call to draw, which has no run.toml"),
        (["--draw", "--model", "tiny", "--only-step"], "--draw plans a call to draw, which has no --only-step"),
        (["--draw", "--model", "tiny", "--size", "63"], "--size 63: expected a multiple of 8"),
        (["--draw", "--model", "tiny", "--count", "0"], "--count = 0: expected at least 1"),
        (["--draw", "--model", "tiny", "--for", "v9"], "--for v9: choices are t4, l4, a100, h100, and TPU slices of"),
        (["--draw", "--model", "tiny", "--for", "a100:2"], "--for a100:2: choices are"),
        (["missing.toml"], "missing.toml"),
    ],
)
def test_mistakes_are_named(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert plan.main(arguments) in (2, 3)
    assert message in capsys.readouterr().err


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--for v5e:2x2 needs a TPU's compiler: pip install 'sdjax\[tpu\]'"):
        chips.described("v5e:2x2")
    with pytest.raises(
        ConfigError, match="--for t4 needs JAX's CUDA plugin: pip install --no-deps jax-cuda12-plugin=="
    ):
        chips.described("t4")


def test_the_number_type_is_a_setting_of_a_run_too(config, capsys):
    assert plan.main([config, "--dtype", "float8"]) == 2
    assert "float8" in capsys.readouterr().err
