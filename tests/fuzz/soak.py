"""Trains under random faults until the run is done, again and again: `cd tests; python -m fuzz.soak --faults 200`.

The run has two stages, class pictures, a cache that other runs share at the same time, and is also trained as copies
and, with `--kinds processes`, in two processes. A fault is kill -9, SIGTERM, a disk that is full, or a newest
checkpoint that cannot be read, each at a random moment; of two processes it strikes one, and the other must end soon.
Every run must end with the bits of one that was left alone, and no output may hold a traceback. Prints the counts.
"""

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import micro

from sdjax.runtime.processes import HEARTBEAT
from sdjax.train import checkpoint, config_file

CODES = {0, 3, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
"""Done, a full disk, stopped (the second: while Python starts or ends), killed."""
LEFT = {4, -signal.SIGABRT}
"""The codes of a process whose other process has ended: by sdjax, and by JAX."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=("one", "copies", "processes"), default=["one", "copies"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(Path(temporary), random.Random(arguments.seed), arguments.kinds)
        while sum(soak.counts.values()) < arguments.faults:
            for kind in arguments.kinds:
                soak.run(kind)
        print(f"{soak.runs} runs, faults: {dict(soak.counts)}, {len(soak.wrong)} wrong")
    return bool(soak.wrong)


class Soak:
    """The runs so far."""

    def __init__(self, root: Path, draw: random.Random, kinds: Sequence[str]) -> None:
        self.root, self.draw = root, draw
        self.counts: collections.Counter[str] = collections.Counter()
        self.runs, self.wrong = 0, []
        self.model, self.images = micro.make_model(root / "model"), micro.make_images(root / "images", 8)
        self.expected = {}
        for kind in kinds:
            assert not any(process.wait() for process in self.start(kind, root / f"alone {kind}"))
            self.expected[kind] = exports(root / f"alone {kind}")

    def start(self, kind: str, output: Path, *flags: str, most: int | None = None) -> list[subprocess.Popen]:
        """Starts the processes of a run. most: largest size of a file in bytes, which acts like a full disk."""
        common = {"steps": 6, "learning_rate": 1e-2, "prior_count": 3, "prior_prompt": "a circle"}
        words = {"train": ["textual_inversion"], "placeholder_tokens": ["<w>"], "init_tokens": ["circle"]}
        stages = [{**common, "name": "words", **words}, {**common, "name": "style", "lora_dropout": 0.1}]
        copies = {"copies": [{"name": "a", "seed": 1}, {"name": "b", "seed": 2}]} if kind == "copies" else {}
        config = micro.settings(
            self.model, self.images, output, stages=stages, validation={}, checkpoint={"every": 1, "keep": 2},
            data={"path": str(self.images), "resolution": 16, "batch_size": 2, "cache": str(self.root / "cache")},
            parallel={"mesh": {"data": -1}}, **copies,
        )  # fmt: skip
        file = self.root / f"{output.name}.toml"
        file.write_text(config_file.to_toml(config))
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(self.root / "xla"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        limit = None if most is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        command = [sys.executable, "-m", "sdjax", "train", str(file), *flags]
        commands = [command]
        if kind == "processes":
            with socket.socket() as free:
                free.bind(("localhost", 0))
                several = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", "2", "--process"]
            commands = [[*command, *several, str(index)] for index in range(2)]
        with (self.root / f"{output.name}.log").open("a") as log:
            how: Any = {"env": environment, "stderr": log, "stdout": log, "preexec_fn": limit}
            return [subprocess.Popen(command, **how) for command in commands]

    def run(self, kind: str) -> None:
        """Trains one run to its end under three to eight faults, and compares its export."""
        output, known = self.root / f"{kind} {self.runs}", len(self.wrong)
        for number in range(self.draw.randint(3, 8)):
            fault = self.draw.choice(["kill -9", "SIGTERM", "full disk", "unreadable checkpoint"])
            self.counts[fault] += 1
            if fault == "unreadable checkpoint":
                damage(output, self.draw)
            most = self.draw.randrange(2_000, 200_000) if fault == "full disk" else None
            log = self.root / f"{output.name}.log"
            joined, done = _count(log, "Gloo"), _count(output / "metrics.jsonl", '"loss"')
            processes = self.start(kind, output, *["--resume"][: number > 0], most=most)
            struck, steps = processes[number % len(processes)], done + self.draw.randint(0, 4)
            if kind == "processes":  # to find each other takes as long as Python's start, and to compile as long
                self.wait(struck, 300, lambda log=log, n=joined: _count(log, "Gloo") > n)
                self.wait(struck, 300, lambda n=steps: _count(output / "metrics.jsonl", '"loss"') >= n)
            if fault != "full disk":
                self.wait(struck, self.draw.uniform(0, 3 if kind == "processes" else 12))
                struck.send_signal(signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
            codes = [self.end(process, output.name, fault) for process in processes]
            if any(code not in CODES | (LEFT if kind == "processes" else set()) for code in codes):
                self.wrong.append(f"{output.name}: {fault} ended with {codes}")
        codes = [self.end(process, output.name, "none") for process in self.start(kind, output, "--resume")]
        log = (self.root / f"{output.name}.log").read_text(errors="replace")
        if any(codes) or "Traceback" in log:
            self.wrong.append(f"{output.name}: ended with {codes}, or shows a traceback\n{log[-3000:]}")
        elif exports(output) != self.expected[kind]:
            self.wrong.append(f"{output.name}: other bits")
        print(f"{output.name}: {dict(self.counts)}", *self.wrong[known:], sep="\n", flush=True)
        self.runs += 1
        shutil.rmtree(output, ignore_errors=True)

    def wait(self, process: subprocess.Popen, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end and not until():
            time.sleep(0.01)

    def end(self, process: subprocess.Popen, name: str, fault: str) -> int:
        """The exit code of a process, which is killed if it does not end."""
        try:
            return process.wait(900 + 2 * HEARTBEAT)
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{name}: hangs after {fault}")
            process.kill()
            return process.wait()


def _count(path: Path, word: str) -> int:
    """How often a word stands in a file."""
    return path.read_text(errors="replace").count(word) if path.exists() else 0


def damage(output: Path, draw: random.Random) -> None:
    """Flips a bit or cuts a file in the newest checkpoint, if there are two: with one, nothing would be left."""
    for folder in output.rglob("checkpoints"):
        known = checkpoint.steps(folder)
        files = sorted(path for path in (folder / f"step_{max(known, default=0):08d}").rglob("*") if path.is_file())
        if len(known) < 2 or not files:
            continue
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        if content and draw.random() < 0.5:
            content[draw.randrange(len(content))] ^= 16
        else:
            del content[len(content) // 2 :]
        path.write_bytes(content)


def exports(output: Path) -> dict[str, bytes]:
    """The content of every exported weight file."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("export/**/*.safetensors")}


if __name__ == "__main__":
    sys.exit(main())
