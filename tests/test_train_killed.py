"""The training command as a process: killed several times, or stopped, it ends with the bits of one left alone."""

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
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def start(folder, micro_models, micro_images):
    """`start(output, *flags)`: starts the command on one device. Compiled programs are shared between the runs."""

    def start(output, *flags):
        file = folder / "run.toml"
        data = {"path": str(micro_images), "resolution": 16, "batch_size": 4, "cache": str(folder / "cache")}
        stage = {"steps": STEPS, "lora_dropout": 0.1}
        config = micro.settings(micro_models(), micro_images, output, data=data, stages=[stage], validation={})
        file.write_text(config_file.to_toml(config))
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", "sdjax", "train", str(file), *flags]
        with (folder / "log.txt").open("a") as log:
            return subprocess.Popen(command, env=environment, stderr=log)

    return start


def wait_for_steps(process, output, count, seconds=300):
    """Returns once the run has written `count` steps, or has ended."""
    end = time.monotonic() + seconds
    metrics = output / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < count):
        assert time.monotonic() < end, f"{count} steps were not reached in {seconds} s"
        time.sleep(0.005)


def test_killed_at_random_moments_the_adapter_is_the_same_to_the_bit(folder, start):
    assert start(folder / "alone").wait() == 0
    output = folder / "killed"
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    print(f"seed {seed}")  # shown when the test fails
    for number, steps in enumerate(sorted(moments.sample(range(1, STEPS), 3))):
        process = start(output, *["--resume"][: number > 0])
        wait_for_steps(process, output, steps)
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.wait()

    assert start(output, "--resume").wait() == 0
    assert micro.exported(output) == micro.exported(folder / "alone")
    assert [line["step"] for line in micro.metric_lines(output, "step")] == list(range(1, STEPS + 1))


def test_a_signal_ends_the_command_with_its_code_after_saving(folder, start):
    output = folder / "stopped"
    process = start(output, "--stages.0.steps", "100000", "--checkpoint.every", "0")
    wait_for_steps(process, output, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    saved = checkpoint.steps(output / "checkpoints")
    assert len(saved) == 1 and saved[0] >= 2
    assert start(output).wait() == 2  # not without --resume
