"""Feeds damaged inputs to every reader: `cd tests; python -m fuzz.run --inputs 20000`.

None may crash, hang, show a traceback or run code.

Each chunk of inputs runs in a process with a limit of memory, and each input has a limit of time. The run prints a line
for each fault, with what it takes to repeat it, and the counts. It exits with 1 if there was a fault.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import micro
import numpy as np
from fuzz.targets import Target, fault, make_targets, mutated

CHUNK, SECONDS, MEMORY = 250, 10, 3 << 30


def main() -> int:
    warnings.filterwarnings("ignore", "os.fork")  # JAX has threads, but the child computes nothing
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="only this reader")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        marker = root / "code was run"
        targets = make_targets(micro.make_model(root / "model"), marker)
        if arguments.target:
            targets = {arguments.target: targets[arguments.target]}
        faults, done = [], dict.fromkeys(targets, 0)
        each = -(-arguments.inputs // len(targets))
        for name, target in targets.items():
            for start in range(0, each, CHUNK):
                count = min(CHUNK, each - start)
                faults += _chunk(name, target, arguments.seed, range(start, start + count), root)
                done[name] += count
            print(f"{name}: {done[name]} inputs", flush=True)
        if marker.exists():
            faults.append("a pickle ran code")
        print(f"{sum(done.values())} inputs, {len(faults)} faults")
        for text in faults:
            print(text)
    return bool(faults)


def _chunk(name: str, target: Target, seed: int, numbers: range, root: Path) -> list[str]:
    """Reads some inputs in a child process, and returns its faults."""
    report = root / "report.jsonl"
    report.write_text("")
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + _size(), MEMORY + _size()))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of skipped files
        with report.open("a") as file:
            for number in numbers:
                content = input_of(name, target, seed, number)
                print(json.dumps(number), file=file, flush=True)
                folder = root / "input"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                signal.alarm(SECONDS)  # ends the process
                found = fault(target, content, folder)
                signal.alarm(0)
                if found:
                    print(json.dumps([number, found]), file=file, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    faults = [f"{name} --seed {seed}, input {line[0]}: {line[1]}" for line in lines if isinstance(line, list)]
    if status:
        last = next((line for line in reversed(lines) if isinstance(line, int)), None)
        how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {status >> 8}"
        faults.append(f"{name} --seed {seed}, input {last}: the process ended with {how}")
        if last is not None and last + 1 < numbers.stop:
            faults += _chunk(name, target, seed, range(last + 1, numbers.stop), root)
    return faults


def input_of(name: str, target: Target, seed: int, number: int) -> bytes:
    """The input with this number. Number 0 and the next ones are the good inputs themselves."""
    if number < len(target.seeds):
        return target.seeds[number]
    draw = random.Random(f"{seed} {name} {number}")
    return mutated(draw.choice(target.seeds), draw)


def _size() -> int:
    """The address space that this process has already."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    assert np.float32(1)  # loaded before the limit of memory
    sys.exit(main())
