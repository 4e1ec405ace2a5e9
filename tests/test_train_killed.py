"""A training command that is killed again and again, and asked to stop, ends with the bits of one left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import micro
import pytest

from sdjax.train import checkpoint, config_file

STEPS = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    micro.make_model(folder / "model")
    micro.make_images(folder / "images")
    return folder


def start(place, output, *flags):
    """The command in a process of its own, on one device; compiled programs are shared between the runs."""
    file = place / "run.toml"
    data = {"path": str(place / "images"), "resolution": 16, "batch_size": 4, "cache": str(place / "cache")}
    stage = {"steps": STEPS, "lora_dropout": 0.1}
    config = micro.settings(place / "model", place / "images", output, data=data, stages=[stage], validation={})
    file.write_text(config_file.to_toml(config))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(place / "xla"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "sdjax", "train", str(file), *flags]
    with (place / "log.txt").open("a") as log:
        return subprocess.Popen(command, env=environment, stderr=log)


def wait_for_steps(process, output, count, seconds=300):
    """Until the run has written `count` steps, or is over."""
    end = time.monotonic() + seconds
    metrics = output / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < count):
        assert time.monotonic() < end, f"{count} steps were not reached in {seconds} s"
        time.sleep(0.005)


def exported(output):
    return (output / "export" / "style" / "lora.safetensors").read_bytes()


def test_killed_at_random_moments_the_adapter_is_the_same_to_the_bit(place):
    assert start(place, place / "alone").wait() == 0
    output = place / "killed"
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    print(f"seed {seed}")  # shown when the test fails
    for number, steps in enumerate(sorted(moments.sample(range(1, STEPS), 3))):
        process = start(place, output, *["--resume"][: number > 0])
        wait_for_steps(process, output, steps)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()

    assert start(place, output, "--resume").wait() == 0
    assert exported(output) == exported(place / "alone")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


def test_a_signal_ends_the_command_with_its_code_after_saving(place):
    output = place / "stopped"
    process = start(place, output, "--stages.0.steps", "100000", "--checkpoint.every", "0")
    wait_for_steps(process, output, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    saved = checkpoint.steps(output / "checkpoints")
    assert len(saved) == 1 and saved[0] >= 2
    assert start(place, output).wait() == 2  # not without --resume
