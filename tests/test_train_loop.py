"""Whole runs: what they leave behind, how they go on after an interruption, and what they refuse before they begin."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import threading
import time
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax import loading, lora, trees
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.formats.lora_file import load_lora
from sdjax.train import checkpoint, config_file
from sdjax.train.__main__ import main
from sdjax.train.loop import train


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    yield from micro.quick_compilation()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    micro.make_model(folder / "model")
    micro.make_images(folder / "images")
    return folder


@pytest.fixture
def settings(place, tmp_path):
    """`settings(**changes)`: a run of its own folder, on shared images and cached latents."""

    def make(**changes):
        data = {"path": str(place / "images"), "resolution": 16, "batch_size": 4, "validation_count": 4}
        data |= {"cache": str(place / "cache"), **changes.pop("data", {})}
        return micro.settings(place / "model", place / "images", tmp_path / "run", data=data, **changes)

    return make


@pytest.fixture(scope="module")
def finished(place):
    """The folder of an uninterrupted run, and what was compiled in it."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    logger.propagate = False
    with jax.log_compiles(True):
        assert train(micro.settings(place / "model", place / "images", place / "finished")) == 0
    logger.removeHandler(handler)
    logger.propagate = True
    return place / "finished", [message.split(" with ")[0] for message in records if "Compiling" in message]


def lines_of(output, key):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if key in line]


def exported(output, stage="style"):
    return (output / "export" / stage / "lora.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_metrics_have_a_line_a_step_and_a_validation(finished):
    output, _ = finished
    steps = lines_of(output, "loss")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(
        set(line) == {"stage", "step", "loss", "learning_rate", "grad_norm", "examples_per_second"} for line in steps
    )
    assert all(line["learning_rate"] == pytest.approx(5e-3) and line["stage"] == "style" for line in steps)
    assert [line["step"] for line in lines_of(output, "held_out_loss")] == [0, 3, 6]


def test_the_settings_are_kept_as_resolved(finished, place):
    output, _ = finished
    kept = config_file.from_table(tomllib.loads((output / "config.toml").read_text()))
    assert kept == micro.settings(place / "model", place / "images", output)


def test_pictures_of_every_validation(finished):
    output, _ = finished
    names = {path.name for path in (output / "samples").iterdir()}
    assert names == {"style-0.png", "style-3.png", "style-6.png", "style-before-after.png"}
    for name in names:
        Image.open(output / "samples" / name).load()


def test_nothing_is_compiled_twice(finished):
    _, compiled = finished
    for program in ("train_step", "errors", "_sampler_step"):
        assert sum(f"jit({program})" in message for message in compiled) == 1, program


def test_the_export_is_the_trained_adapter_in_both_namings(finished, place):
    output, _ = finished
    sd = sdjax.load(place / "model")
    kohya, peft = (
        load_lora(output / "export" / "style" / name, sd.params)
        for name in ("lora.safetensors", "pytorch_lora_weights.safetensors")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged(sd, kohya), merged(sd, peft))
    assert all(np.abs(layer["up"]).max() > 0 for _, layer in trees.layers(kohya, "down"))
    assert "style" in (output / "export" / "style" / "README.md").read_text()
    assert (output / "export" / "style" / "samples.png").exists()


def merged(sd, adapters):
    return {part: lora.merge(sd.params[part], tree) for part, tree in adapters.items()}


# ----------------------------------------------------------------------------------------------------- going on again


def test_a_signal_saves_and_the_rest_gives_the_same_bits(finished, settings):
    config = settings(checkpoint={"every": 0})
    output = stop_at(config, 2)
    saved = checkpoint.steps(output / "checkpoints")
    assert len(saved) == 1 and 2 <= saved[0] < 6
    with pytest.raises(ConfigError, match="--resume"):
        train(config)
    assert train(config, resume=True) == 0
    assert exported(output) == exported(finished[0])
    assert [line["step"] for line in lines_of(output, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines_of(output, "loss")] == [
        line["loss"] for line in lines_of(finished[0], "loss")
    ]


def stop_at(config, lines):
    """Run, and send SIGTERM once metrics.jsonl has so many steps; the run's folder."""
    output = Path(config.output)

    def watch():
        while not (output / "metrics.jsonl").exists() or len(lines_of(output, "loss")) < lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert train(config) == 128 + signal.SIGTERM
    watcher.join()
    return output


def copy_of(finished, settings, **changes):
    """The finished run copied to a folder of its own."""
    config = settings(data={"cache": ""}, **changes)
    shutil.copytree(finished[0], config.output)
    return config, Path(config.output)


def test_after_a_crash_before_the_export_only_the_export_is_made(finished, settings):
    config, output = copy_of(finished, settings)
    expected = exported(output)
    shutil.rmtree(output / "export")
    before = (output / "metrics.jsonl").read_text()
    assert train(config, resume=True) == 0
    assert exported(output) == expected
    assert (output / "metrics.jsonl").read_text() == before


def test_a_truncated_checkpoint_is_passed_over(finished, settings, caplog):
    config, output = copy_of(finished, settings)
    newest = max((output / "checkpoints").glob("step_*"))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    expected = exported(output)
    shutil.rmtree(output / "export")
    assert train(config, resume=True) == 0
    assert "skipped" in caplog.text and newest.name in caplog.text
    assert exported(output) == expected
    assert [line["step"] for line in lines_of(output, "loss")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines_of(output, "held_out_loss")] == [0, 3, 6]


def test_resuming_another_run_is_refused_with_what_differs(finished, settings):
    config, _ = copy_of(finished, settings, stages=[{"lora_rank": 3}])
    with pytest.raises(DataError, match=r"stages\.0\.lora_rank was 2, is 3"):
        train(config, resume=True)


def test_resuming_with_other_images_is_refused_unless_allowed(finished, settings, tmp_path):
    images = micro.make_images(tmp_path / "other", 10)
    config, _ = copy_of(finished, settings)
    data = dataclasses.replace(config.data, path=str(images))
    with pytest.raises(DataError, match=r"data\.style"):
        train(dataclasses.replace(config, data=data), resume=True)
    allowed = dataclasses.replace(config.checkpoint, allow_changed_data=True)
    assert train(dataclasses.replace(config, data=data, checkpoint=allowed), resume=True) == 0


def test_two_stages_add_up_and_resume_between(place, settings, tmp_path):
    """SDXL: the U-Net on cached text, then both text models, with dropout, in their place."""
    micro.make_model(tmp_path / "xl", sdxl=True)
    rates = {"unet": 1e-3, "text_encoder": 1e-2, "text_encoder_2": 5e-3}
    second = {"name": "second", "steps": 2, "lora_dropout": 0.2, "learning_rate": rates, "lora_parts": list(rates)}
    config = dataclasses.replace(
        settings(
            stages=[{"name": "first", "steps": 2}, second],
            checkpoint={"every": 0, "keep": 9},
            data={"caption_dropout": 0.5},
        ),
        model=str(tmp_path / "xl"),
    )
    assert train(config) == 0
    output = Path(config.output)
    sd = sdjax.load(tmp_path / "xl")
    first, second = (
        load_lora(output / "export" / name / "lora.safetensors", sd.params) for name in ("first", "second")
    )
    assert set(first) == {"unet"} and set(second) == {"unet", "text_encoder", "text_encoder_2"}
    # The second adapter holds the first, ranks side by side.
    for path, layer in trees.layers(first, "down"):
        whole = dict(trees.layers(second, "down"))[path]
        rank = layer["down"].shape[-1]
        np.testing.assert_array_equal(whole["down"][..., :rank], layer["down"])
        assert whole["down"].shape[-1] == 2 * rank
    expected = exported(output, "second")
    shutil.rmtree(output / "export" / "second")
    shutil.rmtree(output / "checkpoints" / "step_00000004")
    assert train(config, resume=True) == 0
    assert exported(output, "second") == expected
    assert lines_of(output, "loss")[-1]["learning_rate"] == pytest.approx(rates)


# --------------------------------------------------------------------------------------------------- stopping by itself


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(settings):
    config = settings(stages=[{"learning_rate": 1e30, "clip_norm": 0.0}], checkpoint={"every": 1}, validation={})
    with pytest.raises(TrainingStopped, match="learning_rate"):
        train(config)
    folder = f"{config.output}/checkpoints"
    assert checkpoint.steps(folder)
    for line in Path(config.output, "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_out_of_memory_gives_advice(settings, monkeypatch):
    def exhausted(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    monkeypatch.setattr("sdjax.train.results.load_weights", exhausted)
    with pytest.raises(TrainingStopped, match=r"batch_size.*accumulation.*remat"):
        train(settings(data={"cache": ""}))


def test_resuming_nothing_starts_fresh_and_says_so(settings, caplog, monkeypatch):
    monkeypatch.setattr("sdjax.train.loop._train_stage", lambda trainings: vars(trainings[0]).update(number=99) or 0)
    assert train(settings(), resume=True) == 0
    assert "starting fresh" in caplog.text


# ------------------------------------------------------------------------------------------ errors before anything slow


@pytest.fixture
def no_weights(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_params", load)


BAD = [
    ({"data": {"path": "/nowhere"}}, DataError, "/nowhere"),
    ({"data": {"validation_count": 12}}, DataError, "nothing left to train on"),
    ({"data": {"validation_count": 0, "validation_path": "/nowhere"}}, DataError, "validation_path.*nowhere"),
    ({"data": {"resolution": 1024}}, ConfigError, "1024.*16 pixels"),
    ({"data": {"batch_size": 3}, "parallel": {"mesh": {"data": 8}}}, ConfigError, "3 images.*8 devices"),
    ({"clip_skip": 3}, ConfigError, r"clip_skip = 3.*1 .*2"),
    ({"dtype": "float16"}, ConfigError, "bfloat16"),
    ({"stages": [{"lora_targets": ["no_such_layer"]}]}, ConfigError, r"stages\.0: unet: .*matches no layer"),
    ({"stages": [{"lora_ranks": {".": 0}}]}, ConfigError, "no layer with an adapter"),
    ({"stages": [{"lora_parts": ["text_encoder_2"]}]}, ConfigError, "no text_encoder_2; it has unet, text_encoder"),
    ({"stages": [{"name": n, "use_dora": True} for n in "ab"]}, ConfigError, r"stages\.1: .*DoRA"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_settings_are_refused_before_weights_are_read(settings, no_weights, changes, error, message):
    with pytest.raises(error, match=message):
        train(settings(**changes))


def test_a_folder_that_cannot_be_written_is_refused_first(settings, no_weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(dataclasses.replace(settings(), output=str(tmp_path / "file" / "run")))


def test_truncated_weights_are_refused_before_any_is_read(settings, place, no_weights, tmp_path):
    model = shutil.copytree(place / "model", tmp_path / "cut")
    weights = next((model / "unet").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(DataError, match="truncated"):
        train(dataclasses.replace(settings(), model=str(model)))


def test_the_command_returns_exit_codes_and_one_line(settings, capsys, tmp_path, no_weights):
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(settings()))
    former = signal.getsignal(signal.SIGTERM)
    try:
        for arguments, code, message in (
            ([str(tmp_path / "none.toml")], 2, "none.toml"),
            ([str(file), "--sead", "1"], 2, "unknown flag --sead"),
            ([str(file), "--data.path", "/nowhere"], 3, "/nowhere"),
            ([str(file), "--resume-step", "7"], 3, "no checkpoint of step 7"),
        ):
            assert main(arguments) == code
            complaint = capsys.readouterr().err
            assert message in complaint.splitlines()[-1] and complaint.splitlines()[-1].startswith("error: ")
            assert "Traceback" not in complaint
    finally:
        signal.signal(signal.SIGTERM, former)


def test_bfloat16_with_remat_and_accumulation_trains_under_pmap(settings):
    config = settings(
        dtype="bfloat16",
        remat=True,
        data={"accumulation": 2, "batch_size": 2},
        stages=[{"steps": 2}],
        validation={},
        parallel={"mode": "pmap", "mesh": {"data": 2}},
    )
    assert train(config) == 0
    tree = load_lora(f"{config.output}/export/style", loading.outline(config.model).shapes)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_a_full_disk_is_one_line(settings, monkeypatch, tmp_path, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdjax.train.loop.plan_runs", full)
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(settings()))
    former = signal.getsignal(signal.SIGTERM)
    assert main([str(file)]) == 3
    signal.signal(signal.SIGTERM, former)
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device"
