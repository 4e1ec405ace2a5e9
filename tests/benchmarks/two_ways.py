"""Trains the copies of a run at once and one after the other, for `sweep.py` and `together.py`: a process for each."""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.runtime import compilation_cache, host_memory
from sdjax.train.config import RunConfig

WAYS = ("together", "apart")


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--way", choices=WAYS, help="run one of the two ways, in this process")
    return made


def train(config: RunConfig, way: str, compiled: Path) -> dict[str, Any]:
    """Trains in this process. compiled: the folder of compiled programs. Returns what is measured.

    pictures_per_second is the median over the steps but the first of each copy, of one copy; None of a single step.
    """
    from sdjax.train.loop import train

    host_memory.keep()
    compilation_cache.enable(compiled)
    start = time.perf_counter()
    for each in [config] if way == "together" else config.members():
        assert train(each) == 0
    seconds = time.perf_counter() - start
    texts = [Path(member.output, "metrics.jsonl").read_text() for member in config.members()]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    rates = [line["examples_per_second"] for line in lines if line.get("step", 0) > 1 and "loss" in line]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    rate = float(np.median(rates)) if rates else None
    return {"way": way, "seconds": round(seconds, 1), "peak_gb": round(peak, 2), "pictures_per_second": rate}


def start_both(out: Path, *flags: str | Path) -> str:
    """Runs the command of this process again for each way, with these flags. Returns what both printed."""
    printed = ""
    for way in WAYS:
        shutil.rmtree(out / way, ignore_errors=True)
        command = [sys.executable, sys.argv[0], *flags, f"--out={out}", f"--way={way}"]
        printed += subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return printed


def pairs(out: Path, pattern: str) -> Iterator[tuple[Path, Path]]:
    """Yields the files of a pattern below the folder of the first way, each with that of the second way."""
    for file in sorted((out / "together").glob(pattern)):
        yield file, out / "apart" / file.relative_to(out / "together")
