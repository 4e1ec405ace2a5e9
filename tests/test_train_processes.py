"""Two processes that train one run, each with two devices: as one process alone, and when one of them is stopped."""

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
from sdjax.train import checkpoint, config_file

STAGES = [
    {"name": "words", **micro.WORDS, "init_tokens": ["red circle", "<rand-0.1>"], "steps": 3},
    {"name": "style", "steps": 4, "prior_prompt": "a circle", "prior_count": 2},
]
CHANGES = {
    "stages": STAGES,
    "checkpoint": {"every": 1},
    "data": {"buckets": True, "bucket_step": 8, "flip": True, "caption_dropout": 0.2},
    "validation": {"prompts": ["a <plana>"], "steps": 1, "every": 3},
}


@pytest.fixture
def run(settings, tmp_path):
    """`run(name, count, *flags)` -> the processes of a run in folder `name`, whose output goes to NAME.I.log."""
    started: list[subprocess.Popen] = []

    def run(name: str, count: int, *flags: str) -> list[subprocess.Popen]:
        config = settings(**CHANGES, parallel={"cpu_devices": 2 if count > 1 else 1})
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
    for stage in ("words", "style"):
        files = sorted((one / "export" / stage).glob("*.safetensors"))
        assert len(files) == (2 if stage == "words" else 4)
        for file in files:
            expected, found = load_file(file), load_file(other / "export" / stage / file.name)
            assert expected.keys() == found.keys()
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-2, atol=2e-4, err_msg=name)
        assert (other / "export" / stage / "samples.png").exists()


def test_a_run_in_two_processes_then_one_then_two_ends_as_in_one(run, tmp_path):
    """A signal to one of two processes stops both after they have saved."""
    logs = lambda name: [file.read_text() for file in sorted(tmp_path.glob(f"{name}.*.log"))]
    assert codes(run("one", 1)) == [0], logs("one")
    both = run("other", 2)
    wait_for(tmp_path / "other" / "metrics.jsonl", both)
    both[1].send_signal(signal.SIGTERM)
    assert codes(both) == [143, 143], logs("other")
    (alone,) = run("other", 1, "--resume")
    wait_for(tmp_path / "other" / "checkpoints" / "step_00000005", [alone])
    alone.kill()
    assert codes(run("other", 2, "--resume")) == [0, 0], logs("other")
    assert_same_end(tmp_path / "one", tmp_path / "other")
    assert "stage" not in (tmp_path / "other.1.log").read_text()  # the first process alone reports


def test_a_process_that_is_killed_ends_the_other(run, tmp_path):
    both = run("run", 2)
    wait_for(tmp_path / "run" / "checkpoints" / "step_00000002", both)
    both[0].kill()
    assert codes(both, 2 * HEARTBEAT)[1] not in (0, None)
    message = (tmp_path / "run.1.log").read_text()
    assert "Traceback" not in message and ("another process" in message or "another task died" in message)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")


SAVING = """
import sys, jax, numpy as np
from sdjax.train import checkpoint
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
state = {"kernel": np.arange(6, dtype=np.float32)}
for step in (1, 2):
    checkpoint.save(sys.argv[3], step, state, {})
assert checkpoint.restore(sys.argv[3], lambda _: state).state["kernel"].tolist() == [0, 1, 2, 3, 4, 5]
"""


def test_processes_save_below_a_folder_of_any_name(tmp_path):
    """orbax takes a space or a bracket for something else, and all processes must give it the same name."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SAVING, place]
    both = [subprocess.Popen([*command, str(index), str(tmp_path / "a [b]")]) for index in range(2)]
    assert codes(both) == [0, 0]
    assert checkpoint.steps(tmp_path / "a [b]") == [1, 2]


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
