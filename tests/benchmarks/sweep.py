"""Trains the copies of a recipe at once and one after the other; prints time, memory and the difference of the LoRAs.

    python tests/benchmarks/sweep.py configs/learning_rates.toml --out runs/sweep

No pictures are drawn. Each way runs in a separate process, with a fresh folder of compiled programs: alone, each
learning rate is a program of its own. `steps_s` is the time of all steps without compilation, from the median.
"""

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from sdjax.runtime import compilation_cache, host_memory
from sdjax.train import config_file
from sdjax.train.config import RunConfig, Validation


def settings(args: argparse.Namespace) -> RunConfig:
    config = config_file.load(args.recipe)
    stages = tuple(dataclasses.replace(stage, steps=args.steps, warmup_steps=0) for stage in config.stages)
    output = str(args.out / args.way)
    return dataclasses.replace(config, output=output, stages=stages, validation=Validation(held_out_timesteps=1))


def run(args: argparse.Namespace) -> None:
    from sdjax.train.loop import train

    host_memory.keep()
    compilation_cache.enable(args.out / args.way / "compiled")
    config = settings(args)
    start = time.perf_counter()
    for each in [config] if args.way == "together" else config.members():
        assert train(each) == 0
    line = {"way": args.way, "copies": len(config.copies), "steps": args.steps}
    rates = [
        json.loads(text).get("examples_per_second")
        for member in config.members()
        for text in (Path(member.output) / "metrics.jsonl").read_text().splitlines()
    ]
    step = config.data.batch_size / float(np.median([rate for rate in rates if rate]))
    line["steps_s"] = round(step * args.steps * (1 if args.way == "together" else len(config.copies)), 1)
    line["seconds"] = round(time.perf_counter() - start, 1)
    line["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    print(json.dumps(line))


def difference(file: Path, other: Path) -> float:
    """Returns the difference of two LoRAs as a multiple of what training made of the second: its up matrices."""
    ours, theirs = load_file(file), load_file(other)
    ups = [key for key in theirs if "lora_up" in key]
    norm = lambda arrays: float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))
    return norm([ours[key] - theirs[key] for key in ups]) / norm([theirs[key] for key in ups])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--way", choices=["together", "apart"], help="run one of the two ways, in this process")
    args = parser.parse_args()
    if args.way:
        run(args)
        return
    for way in ("together", "apart"):
        shutil.rmtree(args.out / way, ignore_errors=True)
        command = [sys.executable, __file__, args.recipe, f"--out={args.out}", f"--steps={args.steps}", f"--way={way}"]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout, end="", flush=True)
    files = sorted((args.out / "together").glob("*/export/*/lora.safetensors"))
    apart = [args.out / "apart" / file.relative_to(args.out / "together") for file in files]
    pairs = zip(files, apart, strict=True)
    print(json.dumps({"differences": {file.parts[-4]: difference(file, other) for file, other in pairs}}))


if __name__ == "__main__":
    main()
