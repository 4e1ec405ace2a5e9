"""Whole runs: how they continue after an interruption, what they write, and what stops them."""

import dataclasses
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

from sdjax import trees
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.formats.lora_file import load_lora
from sdjax.outline import Outline
from sdjax.train import checkpoint, config_file
from sdjax.train.loop import train
from sdjax.train.validation import Validator

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_settings_are_written_as_resolved(finished, micro_models, micro_images):
    output, _ = finished
    written = config_file.from_table(tomllib.loads((output / "config.toml").read_text()))
    assert written == micro.settings(micro_models(), micro_images, output)


def test_nothing_is_compiled_twice(finished):
    _, compiled = finished
    for program in ("train_step", "errors", "_sampler_step"):
        assert sum(f"jit({program})" in message for message in compiled) == 1, program


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_signal_saves_and_the_rest_gives_the_same_bits(finished, settings):
    config = settings(checkpoint={"every": 0})
    output = stop_at(config, 2)
    saved = checkpoint.steps(output / "checkpoints")
    assert len(saved) == 1 and 2 <= saved[0] < 6
    with pytest.raises(ConfigError, match="--resume"):
        train(config)
    assert train(config, resume=True) == 0
    assert micro.exported(output) == micro.exported(finished[0])
    assert [line["step"] for line in micro.metric_lines(output)] == [1, 2, 3, 4, 5, 6]
    losses, expected = ([line["loss"] for line in micro.metric_lines(folder)] for folder in (output, finished[0]))
    assert losses == expected


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_while_a_checkpoint_is_written(settings, finished, monkeypatch, background):
    """A checkpoint holds the state of its own step, although later steps are done while it is written."""
    config = settings(checkpoint={"every": 2, "keep": 5, "background": background})
    save, reached = checkpoint.save, []

    def save_late(folder, step, *rest):
        lines = lambda: len(micro.metric_lines(Path(config.output)))
        until = time.monotonic() + (30 if background and step == 2 else 0)
        while lines() < 3 and time.monotonic() < until:
            time.sleep(0.01)
        reached.append((step, lines()))
        save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save_late)
    assert train(config) == 0
    # The save of step 4 waits for that of step 2. The last one is never in the background.
    assert reached[0] == (2, 3 if background else 2)
    assert [step for step, _ in reached] == [2, 4, 6]
    assert micro.exported(Path(config.output)) == micro.exported(finished[0])
    shutil.rmtree(Path(config.output) / "export")
    assert train(config, resume=True, resume_step=2) == 0
    assert micro.exported(Path(config.output)) == micro.exported(finished[0])


def test_a_save_that_fails_in_the_background_ends_the_run(settings, monkeypatch):
    config = settings(checkpoint={"every": 1})
    save = checkpoint.save

    def full(folder, step, *rest):
        if step == 3:
            raise DataError("no space left")
        save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(DataError, match="no space left"):
        train(config)
    assert checkpoint.steps(Path(config.output) / "checkpoints") == [1, 2]
    monkeypatch.undo()
    assert train(config, resume=True) == 0


def stop_at(config, lines):
    """Trains, and sends SIGTERM once metrics.jsonl has this many steps. Returns the folder of the run."""
    output = Path(config.output)

    def watch():
        while not (output / "metrics.jsonl").exists() or len(micro.metric_lines(output)) < lines:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert train(config) == 128 + signal.SIGTERM
    watcher.join()
    return output


def copy_of(finished, settings, **changes):
    """Copies the finished run. Returns its configuration, with changes, and its folder."""
    config = settings(data={"cache": ""}, **changes)
    shutil.copytree(finished[0], config.output)
    return config, Path(config.output)


def test_after_a_crash_before_the_export_only_the_export_is_made(finished, settings):
    config, output = copy_of(finished, settings)
    expected = micro.exported(output)
    shutil.rmtree(output / "export")
    before = (output / "metrics.jsonl").read_text()
    assert train(config, resume=True) == 0
    assert micro.exported(output) == expected
    assert (output / "metrics.jsonl").read_text() == before


def test_a_truncated_checkpoint_is_skipped(finished, settings, caplog):
    config, output = copy_of(finished, settings)
    newest = max((output / "checkpoints").glob("step_*"))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    expected = micro.exported(output)
    shutil.rmtree(output / "export")
    assert train(config, resume=True) == 0
    assert "skipped" in caplog.text and newest.name in caplog.text
    assert micro.exported(output) == expected
    assert [line["step"] for line in micro.metric_lines(output)] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in micro.metric_lines(output, "held_out_loss")] == [0, 3, 6]


def test_resuming_another_run_is_refused_with_the_differences(finished, settings):
    config, _ = copy_of(finished, settings, stages=[{"lora_rank": 3}])
    with pytest.raises(DataError, match=r"stages\.0\.lora_rank was 2, is 3"):
        train(config, resume=True)


def test_resuming_on_another_model_or_with_another_word_is_refused(everything, micro_models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(micro_models(), model)
    index = model / "model_index.json"
    index.write_text(index.read_text().replace("{", '{"force_zeros_for_empty_prompt": true, ', 1))
    with pytest.raises(DataError, match=r"cannot resume, the run has changed: model is another one: its weights, conf"):
        train(dataclasses.replace(everything, model=str(model)), resume=True)
    stages = [dataclasses.replace(stage, placeholder_tokens=()) for stage in everything.stages]
    for i, stage in enumerate(everything.stages):
        words = tuple(word.replace("<plana>", "<planb>") for word in stage.placeholder_tokens)
        stages[i] = dataclasses.replace(stage, placeholder_tokens=words)
    with pytest.raises(DataError, match=r"stages\.0\.placeholder_tokens was .*<plana>.*, is .*<planb>"):
        train(dataclasses.replace(everything, stages=tuple(stages)), resume=True)


def test_resuming_with_another_rate_and_batch_is_logged(finished, settings, caplog):
    config, _ = copy_of(finished, settings, validation={}, stages=[{"learning_rate": 1e-3}])
    data = dataclasses.replace(config.data, batch_size=2, background="black")
    assert train(dataclasses.replace(config, data=data), resume=True) == 0
    for change in ("stages.0.learning_rate: was 0.005, is 0.001",
                   "data.batch_size: was 4, is 2", 'data.background: was "white", is "black"'):  # fmt: skip
        assert f"resuming with another {change}" in caplog.text


def test_resuming_with_other_images_is_refused_unless_allowed(finished, settings, tmp_path):
    images = micro.make_images(tmp_path / "other", 10)
    config, _ = copy_of(finished, settings)
    data = dataclasses.replace(config.data, path=str(images))
    with pytest.raises(DataError, match=r"data\.style: 2 missing \(10\.png, 11\.png\) .*allow-changed-data"):
        train(dataclasses.replace(config, data=data), resume=True)
    allowed = dataclasses.replace(config.checkpoint, allow_changed_data=True)
    assert train(dataclasses.replace(config, data=data, checkpoint=allowed), resume=True) == 0


def test_resuming_with_fewer_steps_than_are_done_is_refused(finished, settings):
    config, _ = copy_of(finished, settings, stages=[{"steps": 4}])
    with pytest.raises(
        ConfigError, match=r"stages\.0\.steps = 4 is less than the 6 steps that are done: .*--resume-step"
    ):
        train(config, resume=True)
    assert train(config, resume=True, resume_step=4) == 0


def test_resuming_nothing_starts_fresh_and_says_so(settings, caplog):
    assert train(settings(stages=[{"steps": 1}], validation={}), resume=True) == 0
    assert "starting fresh" in caplog.text


def test_two_stages_add_up_and_resume_between(settings, micro_models):
    """SDXL: first the U-Net on cached text, then the U-Net with both text models and dropout."""
    model = micro_models(sdxl=True)
    rates = {"unet": 1e-3, "text_encoder": 1e-2, "text_encoder_2": 5e-3}
    second = {"name": "second", "steps": 2, "lora_dropout": 0.2, "learning_rate": rates, "lora_parts": list(rates)}
    config = dataclasses.replace(
        settings(
            stages=[{"name": "first", "steps": 2}, second],
            checkpoint={"every": 0, "keep": 9},
            data={"caption_dropout": 0.5},
        ),
        model=str(model),
    )
    assert train(config) == 0
    output = Path(config.output)
    shapes = Outline.load(model).shapes
    first, second = (load_lora(output / "export" / name / "lora.safetensors", shapes) for name in ("first", "second"))
    assert set(first) == {"unet"} and set(second) == {"unet", "text_encoder", "text_encoder_2"}
    # The second adapter holds the first: its ranks come first.
    for path, layer in trees.layers(first, "down"):
        whole = dict(trees.layers(second, "down"))[path]
        rank = layer["down"].shape[-1]
        np.testing.assert_array_equal(whole["down"][..., :rank], layer["down"])
        assert whole["down"].shape[-1] == 2 * rank
    expected = micro.exported(output, "second")
    shutil.rmtree(output / "export" / "second")
    micro.remove_checkpoints_after(output, 2)
    assert train(config, resume=True) == 0
    assert micro.exported(output, "second") == expected
    assert micro.metric_lines(output)[-1]["learning_rate"] == pytest.approx(rates)


@pytest.mark.parametrize("step", [4, 7])
def test_a_run_of_every_kind_resumed_anywhere_ends_with_the_same_bits(everything, tmp_path, step):
    """Step 4 is between two stages. Step 7 is within the stage of the autoencoder, before another one."""
    finished, output = Path(everything.output), tmp_path / "run"
    shutil.copytree(finished, output)
    micro.remove_checkpoints_after(output, step)
    shutil.rmtree(output / "export")
    validation = dataclasses.replace(everything.validation, prompts=())
    assert train(dataclasses.replace(everything, output=str(output), validation=validation), resume=True) == 0
    assert micro.exported(output, "whole") == micro.exported(finished, "whole")


# ------------------------------------------------------------------------------------------------------------- stopping


def test_out_of_memory_gives_advice(settings, monkeypatch):
    def exhausted(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

    monkeypatch.setattr("sdjax.outline.Outline.load_weights", exhausted)
    with pytest.raises(TrainingStopped, match=r"batch_size.*accumulation.*remat"):
        train(settings(data={"cache": ""}))


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])  # even root cannot write to /proc
def test_a_folder_that_cannot_be_written_is_refused_first(settings, no_weights, tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(dataclasses.replace(settings(), output=str(tmp_path / folder)))


# ------------------------------------------------------------------------------------------------- options of the step


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
    tree = load_lora(f"{config.output}/export/style", Outline.load(config.model).shapes)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def test_weights_that_are_split_lie_whole_on_no_device(settings, monkeypatch, tmp_path):
    """Before and while pictures are drawn; the pictures and the held-out loss are those of one device."""
    others, whole, draw = {id(array) for array in jax.live_arrays()}, [], Validator._draw

    def drawing(self, model, *prompts):
        new = [array for array in jax.live_arrays() if id(array) not in others and array.nbytes > 5_000]
        split = [array for array in new if len(array.sharding.device_set) > 1]
        parts = {part.data.unsafe_buffer_pointer() for array in split for part in array.addressable_shards}
        alone = (array for array in new if len(array.sharding.device_set) == 1)
        whole.extend(array.shape for array in alone if array.unsafe_buffer_pointer() not in parts)
        return draw(self, model, *prompts)

    monkeypatch.setattr(Validator, "_draw", drawing)
    how = {
        "stages": [{"train": ["unet", "text_encoder"], "steps": 1, "learning_rate": 1e-4}],
        "validation": {"prompts": ["red circle"], "steps": 1, "guidance": 1.0, "held_out_timesteps": 1},
    }
    runs = {}
    for devices in (2, 1):
        config = settings(**how, parallel={"mesh": {"data": 1, "fsdp": devices}})
        config = dataclasses.replace(config, output=str(tmp_path / f"on_{devices}"))
        assert train(config) == 0
        runs[devices] = [line["held_out_loss"] for line in micro.metric_lines(Path(config.output), "held_out_loss")]
        assert bool(whole) == (devices == 1)
    np.testing.assert_allclose(runs[2], runs[1], rtol=1e-5)
    sheets = [np.asarray(Image.open(tmp_path / f"on_{n}" / "samples" / "style-1.png"), int) for n in (2, 1)]
    assert abs(sheets[0] - sheets[1]).max() <= 2


def test_a_run_goes_on_over_other_devices(settings):
    """Two steps on each of four kinds of mesh, with a checkpoint between them, against eight steps on one device."""

    def run(output, steps, parallel, *, resume=False):
        stages = [{"train": ["lora", "textual_inversion"], "placeholder_tokens": ["<it>"], "steps": steps}]
        config = settings(stages=stages, validation={}, data={"validation_count": 0}, parallel=parallel)
        config = dataclasses.replace(config, output=f"{config.output}-{output}")
        assert train(config, resume=resume) == 0
        return config

    alone = run("alone", 8, {"mesh": {"data": 1}})
    meshes = ({"data": 4}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 2})
    for n, parallel in enumerate([*({"mesh": mesh} for mesh in meshes), {"mode": "pmap", "mesh": {"data": 2}}]):
        moved = run("moved", 2 * n + 2, parallel, resume=n > 0)
    losses = [[line["loss"] for line in micro.metric_lines(Path(run.output))] for run in (alone, moved)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    shapes = Outline.load(alone.model).shapes
    trees = [load_lora(f"{run.output}/export/style/lora.safetensors", shapes) for run in (alone, moved)]
    for one, other in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-5)
