"""Trains under random faults until the run is done, again and again: `cd tests; python -m fuzz.soak --faults 200`.

The run has two stages, class pictures, a cache that other runs share at the same time, and is also trained as copies.
A fault is kill -9, SIGTERM, a disk that is full, or a newest checkpoint that cannot be read, each at a random moment.
Every run must end with the bits of one that was left alone, and no output may hold a traceback. Prints the counts.
"""

import argparse
import collections
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import micro

from sdjax.train import checkpoint, config_file

CODES = {0, 3, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL}
"""Done, a full disk, stopped (the second: while Python starts or ends), killed."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak = Soak(Path(temporary), random.Random(arguments.seed))
        while sum(soak.counts.values()) < arguments.faults:
            for kind in ("one", "copies"):
                soak.run(kind)
        print(f"{soak.runs} runs, faults: {dict(soak.counts)}, {len(soak.wrong)} wrong")
    return bool(soak.wrong)


class Soak:
    """The runs so far."""

    def __init__(self, root: Path, draw: random.Random) -> None:
        self.root, self.draw = root, draw
        self.counts: collections.Counter[str] = collections.Counter()
        self.runs, self.wrong = 0, []
        self.model, self.images = micro.make_model(root / "model"), micro.make_images(root / "images", 8)
        self.expected = {}
        for kind in ("one", "copies"):
            assert self.start(kind, root / f"alone {kind}").wait() == 0
            self.expected[kind] = exports(root / f"alone {kind}")

    def start(self, kind: str, output: Path, *flags: str, most: int | None = None) -> subprocess.Popen:
        """Starts the command. most: largest size of a file in bytes, which acts like a full disk."""
        common = {"steps": 6, "learning_rate": 1e-2, "prior_count": 3, "prior_prompt": "a circle"}
        words = {"train": ["textual_inversion"], "placeholder_tokens": ["<w>"], "init_tokens": ["circle"]}
        stages = [{**common, "name": "words", **words}, {**common, "name": "style", "lora_dropout": 0.1}]
        copies = {"copies": [{"name": "a", "seed": 1}, {"name": "b", "seed": 2}]} if kind == "copies" else {}
        config = micro.settings(
            self.model, self.images, output, stages=stages, validation={}, checkpoint={"every": 1, "keep": 2},
            data={"path": str(self.images), "resolution": 16, "batch_size": 2, "cache": str(self.root / "cache")},
            **copies,
        )  # fmt: skip
        file = self.root / f"{output.name}.toml"
        file.write_text(config_file.to_toml(config))
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(self.root / "xla"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        limit = None if most is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        command = [sys.executable, "-m", "sdjax", "train", str(file), *flags]
        with (self.root / f"{output.name}.log").open("a") as log:
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, preexec_fn=limit)

    def run(self, kind: str) -> None:
        """Trains one run to its end under three to eight faults, and compares its export."""
        output, known = self.root / f"{kind} {self.runs}", len(self.wrong)
        for number in range(self.draw.randint(3, 8)):
            fault = self.draw.choice(["kill -9", "SIGTERM", "full disk", "unreadable checkpoint"])
            self.counts[fault] += 1
            if fault == "unreadable checkpoint":
                damage(output, self.draw)
            most = self.draw.randrange(2_000, 200_000) if fault == "full disk" else None
            process = self.start(kind, output, *["--resume"][: number > 0], most=most)
            if fault != "full disk":
                self.wait(process, self.draw.uniform(0, 12))
                process.send_signal(signal.SIGTERM if fault == "SIGTERM" else signal.SIGKILL)
            code = process.wait()
            if code not in CODES:
                self.wrong.append(f"{output.name}: {fault} ended with {code}")
        code = self.start(kind, output, "--resume").wait()
        log = (self.root / f"{output.name}.log").read_text(errors="replace")
        if code or "Traceback" in log:
            self.wrong.append(f"{output.name}: ended with {code}, or shows a traceback\n{log[-3000:]}")
        elif exports(output) != self.expected[kind]:
            self.wrong.append(f"{output.name}: other bits")
        print(f"{output.name}: {dict(self.counts)}", *self.wrong[known:], sep="\n", flush=True)
        self.runs += 1
        shutil.rmtree(output, ignore_errors=True)

    def wait(self, process: subprocess.Popen, seconds: float) -> None:
        end = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)


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
