"""Trains eight concepts at once and one after the other; prints time, memory and the difference of the results.

    python tests/benchmarks/together.py --pictures noto64 --out runs/together

pictures: a folder with metadata.jsonl whose lines have a `subcategory`. Each concept is a word of two vectors, trained
with the embedded model on seven pictures of one sub-category. Each way runs in a separate process. Both use one folder
of compiled programs, which a run of one step has filled for each.
"""

import argparse
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

CONCEPTS = ("cat-face", "time", "zodiac", "keycap", "family", "animal-bug", "face-tongue", "alphanum")


def settings(args, steps):
    copies = []
    records = [json.loads(line) for line in (args.pictures / "metadata.jsonl").read_text().splitlines()]
    for concept in CONCEPTS:
        folder = args.out / "pictures" / concept
        folder.mkdir(parents=True, exist_ok=True)
        for record in [r for r in records if r["subcategory"] == concept][:7]:
            shutil.copy(args.pictures / record["file_name"], folder)
        copies.append({"name": concept, "path": str(folder), "placeholder_tokens": [f"<{concept}>"]})
    stage = {
        "name": "word",
        "train": ["textual_inversion"],
        "steps": steps,
        "learning_rate": 1e-2,
        "placeholder_tokens": ["<thing>"],
        "vectors_per_token": 2,
        "init_tokens": ["face"],
        "template": ["{}", "a {}", "{} emoji"],
        "weight_decay": 0.0,
        "clip_ti_decay": True,
        "clip_ti_norm": 1.9,
    }
    data = {"path": copies[0]["path"], "resolution": 64, "batch_size": args.batch, "missing_caption": "empty"}
    table = {
        "model": "tiny",
        "output": str(args.out / args.way),
        "data": data,
        "stages": [stage],
        "copies": copies,
        "checkpoint": {"every": 0},
        "parallel": {"mesh": {"data": 1}},
    }
    return config_file.from_table(table)


def run(args):
    from sdjax.train.loop import train

    host_memory.keep()
    compilation_cache.enable(args.out / "compiled")
    config = settings(args, args.steps)
    start = time.perf_counter()
    for each in [config] if args.way == "together" else config.members():
        assert train(each) == 0
    seconds = time.perf_counter() - start
    rates = []
    for member in config.members():
        lines = (json.loads(line) for line in (Path(member.output) / "metrics.jsonl").read_text().splitlines())
        rates += [line["examples_per_second"] for line in lines if line.get("step", 0) > 1]
    share = len(CONCEPTS) if args.way == "together" else 1  # the rate of a copy counts only the copy's pictures
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    line = {"way": args.way, "seconds": seconds, "peak_gb": peak}
    print(json.dumps(line | {"pictures_per_second": share * float(np.median(rates)) if rates else None}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--way", choices=["together", "apart"], help="run one of the two ways, in this process")
    args = parser.parse_args()
    if args.way:
        run(args)
        return
    for steps in (1, args.steps):
        for way in ("together", "apart"):
            shutil.rmtree(args.out / way, ignore_errors=True)
            flags = [f"--pictures={args.pictures}", f"--out={args.out}", f"--steps={steps}", f"--batch={args.batch}"]
            command = [sys.executable, __file__, *flags, f"--way={way}"]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            if steps > 1:
                print(line, end="", flush=True)
    worst = 0.0
    for file in sorted((args.out / "together").glob("*/export/word/*.safetensors")):
        alone = args.out / "apart" / file.relative_to(args.out / "together")
        (one,), (other,) = (load_file(path).values() for path in (file, alone))
        worst = max(worst, float(np.linalg.norm(one - other) / np.linalg.norm(other)))
    print(json.dumps({"largest_relative_difference": worst, "concepts": len(CONCEPTS)}))


if __name__ == "__main__":
    main()
