"""Several processes that train one run, each with two devices: as one process alone, and when one is stopped."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import micro
import numpy as np
import pytest
from safetensors.numpy import load_file

from sdjax.runtime.processes import HEARTBEAT
from sdjax.train import config_file
from sdjax.train.loop import train

STAGES = [
    {"name": "words", **micro.WORDS, "init_tokens": ["red circle", "<rand-0.1>"], "steps": 3},
    {"name": "style", "steps": 4, "prior_prompt": "a circle", "prior_count": 2, "data": {"inpaint_masks": 2}},
]
CHANGES = {
    "stages": STAGES,
    "checkpoint": {"every": 1},
    "data": {"buckets": True, "bucket_step": 8, "flip": True, "caption_dropout": 0.2, "batch_size": 8},
    "validation": {"prompts": ["a <plana>"], "steps": 1, "every": 3},
}
COPIES = {
    "stages": [{"steps": 3}],
    "checkpoint": {"every": 1},
    "validation": {},
    "copies": [{"name": "a", "seed": 1}, {"name": "b", "learning_rate": 1e-3}],
}


@pytest.fixture
def run(settings, tmp_path):
    """`run(name, count, *flags, **changes)` -> the processes of a run in folder `name`, which write NAME.I.log."""
    started: list[subprocess.Popen] = []

    def run(name: str, count: int, *flags: str, **changes) -> list[subprocess.Popen]:
        config = settings(**(changes or CHANGES), parallel={"cpu_devices": 2 if count > 1 else 1})
        file = tmp_path / f"{name}.toml"
        file.write_text(config_file.to_toml(dataclasses.replace(config, output=str(tmp_path / name))))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            place = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TQDM_DISABLE": "1"}
        for index in range(count):
            several = ["--coordinator", place, "--processes", str(count), "--process", str(index)] if count > 1 else []
            with (tmp_path / f"{name}.{index}.log").open("w") as log:
                command = [sys.executable, "-m", "sdjax.train", str(file), *flags, *several]
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        return started[-count:]

    yield run
    for process in started:
        process.kill()
        process.wait()


def codes(processes, seconds=240):
    ends = time.monotonic() + seconds
    return [process.wait(max(1, ends - time.monotonic())) for process in processes]


def wait_for(path: Path, processes, seconds=240):
    ends = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < ends and all(process.poll() is None for process in processes), path
        time.sleep(0.05)


def assert_same_end(one: Path, other: Path):
    """The gradients are summed in another order, so results differ by the rounding of float32."""
    losses = [[line["loss"] for line in micro.metric_lines(output)] for output in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    held_out = [
        [line["held_out_loss"] for line in micro.metric_lines(output, "held_out_loss")] for output in (one, other)
    ]
    np.testing.assert_allclose(*held_out, rtol=1e-4)
    for stage, count in (("words", 2), ("style", 4)):
        assert_same_files(one, other, stage, count)
        assert (other / "export" / stage / "samples.png").exists()


def assert_same_files(one: Path, other: Path, stage: str, count: int):
    files = sorted((one / "export" / stage).glob("*.safetensors"))
    assert len(files) == count
    for file in files:
        expected, found = load_file(file), load_file(other / "export" / stage / file.name)
        assert expected.keys() == found.keys()
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-2, atol=2e-4, err_msg=name)


def test_a_run_in_four_processes_then_one_then_two_ends_as_in_one(run, tmp_path):
    """Two stages in buckets, the second with holes to paint. A signal to one of four saves and stops all."""
    logs = lambda name: [file.read_text() for file in sorted(tmp_path.glob(f"{name}.*.log"))]
    assert codes(run("one", 1)) == [0], logs("one")
    four = run("other", 4)
    wait_for(tmp_path / "other" / "metrics.jsonl", four)
    four[1].send_signal(signal.SIGTERM)
    assert codes(four) == [143] * 4, logs("other")
    (alone,) = run("other", 1, "--resume")
    wait_for(tmp_path / "other" / "checkpoints" / "step_00000005", [alone])
    alone.kill()
    assert codes(run("other", 2, "--resume")) == [0, 0], logs("other")
    assert_same_end(tmp_path / "one", tmp_path / "other")
    assert "stage" not in (tmp_path / "other.1.log").read_text()  # the first process alone reports


@pytest.mark.usefixtures("quick_compilation")
def test_a_process_that_is_killed_ends_the_other_and_the_rest_gives_the_same_copies(run, settings, tmp_path):
    """In a folder whose name orbax does not take as it is."""
    name = "run [2]"
    both = run(name, 2, **COPIES)
    wait_for(tmp_path / name / "b" / "checkpoints" / "step_00000001", both)
    both[0].kill()
    assert codes(both, 2 * HEARTBEAT)[1] not in (0, None)
    message = (tmp_path / f"{name}.1.log").read_text()
    assert "Traceback" not in message and ("another process" in message or "another task died" in message)
    assert codes(run(name, 2, "--resume", **COPIES)) == [0, 0], (tmp_path / f"{name}.0.log").read_text()
    alone = settings(**COPIES)
    assert train(alone) == 0
    for copy in COPIES["copies"]:
        one, other = (Path(output, copy["name"]) for output in (alone.output, tmp_path / name))
        losses = [[line["loss"] for line in micro.metric_lines(output)] for output in (one, other)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        assert_same_files(one, other, "style", 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "--processes and --process need --coordinator HOST:PORT"),
        (["--coordinator", "localhost:1", "--processes", "2"], "needs --processes N and --process I, from 0 to N - 1"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2"], "from 0 to N - 1"),
    ],
)
def test_wrong_flags(settings, tmp_path, flags, message):
    file = tmp_path / "run.toml"
    file.write_text(config_file.to_toml(settings()))
    command = [sys.executable, "-m", "sdjax.train", str(file), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
