"""Trains eight concepts at once and one after the other; prints time, memory and the difference of the results.

    python tests/benchmarks/together.py --pictures noto64 --out runs/together

pictures: a folder with metadata.jsonl whose lines have a `subcategory`. Each concept is a word of two vectors, trained
with the embedded model on seven pictures of one sub-category. Each way runs in a separate process. Both use one folder
of compiled programs, which a run of one step has filled for each.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import two_ways
from safetensors.numpy import load_file

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
    line = two_ways.train(settings(args, args.steps), args.way, args.out / "compiled")
    if args.way == "together" and line["pictures_per_second"]:
        line["pictures_per_second"] *= len(CONCEPTS)  # the rate of a copy counts only the copy's pictures
    print(json.dumps(line))


def main():
    parser = two_ways.parser(__doc__)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    if args.way:
        run(args)
        return
    for steps in (1, args.steps):
        flags = f"--pictures={args.pictures}", f"--steps={steps}", f"--batch={args.batch}"
        lines = two_ways.start_both(args.out, *flags)
    print(lines, end="")
    worst = 0.0
    for file, alone in two_ways.pairs(args.out, "*/export/word/*.safetensors"):
        (one,), (other,) = (load_file(path).values() for path in (file, alone))
        worst = max(worst, float(np.linalg.norm(one - other) / np.linalg.norm(other)))
    print(json.dumps({"largest_relative_difference": worst, "concepts": len(CONCEPTS)}))


if __name__ == "__main__":
    main()
