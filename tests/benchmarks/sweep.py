"""Trains the copies of a recipe at once and one after the other; prints time, memory and the difference of the LoRAs.

    python tests/benchmarks/sweep.py configs/learning_rates.toml --out runs/sweep

No pictures are drawn. Each way runs in a separate process, with a fresh folder of compiled programs: alone, each
learning rate is a program of its own. `steps_s` is the time of all steps without compilation, from the median.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import two_ways
from safetensors.numpy import load_file

from sdjax.train import config_file
from sdjax.train.config import RunConfig, Validation


def settings(args: argparse.Namespace) -> RunConfig:
    config = config_file.load(args.recipe)
    stages = tuple(dataclasses.replace(stage, steps=args.steps, warmup_steps=0) for stage in config.stages)
    output = str(args.out / args.way)
    return dataclasses.replace(config, output=output, stages=stages, validation=Validation(held_out_timesteps=1))


def run(args: argparse.Namespace) -> None:
    config = settings(args)
    line = two_ways.train(config, args.way, args.out / args.way / "compiled")
    steps = args.steps * (1 if args.way == "together" else len(config.copies))
    line["steps_s"] = round(steps * config.data.batch_size / line.pop("pictures_per_second"), 1)
    print(json.dumps(line | {"copies": len(config.copies), "steps": args.steps}))


def difference(file: Path, other: Path) -> float:
    """Returns the difference of two LoRAs as a multiple of what training made of the second: its up matrices."""
    ours, theirs = load_file(file), load_file(other)
    ups = [key for key in theirs if "lora_up" in key]
    norm = lambda arrays: float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))
    return norm([ours[key] - theirs[key] for key in ups]) / norm([theirs[key] for key in ups])


def main() -> None:
    parser = two_ways.parser(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    if args.way:
        run(args)
        return
    print(two_ways.start_both(args.out, args.recipe, f"--steps={args.steps}"), end="")
    found = two_ways.pairs(args.out, "*/export/*/lora.safetensors")
    print(json.dumps({"differences": {file.parts[-4]: difference(file, other) for file, other in found}}))


if __name__ == "__main__":
    main()
