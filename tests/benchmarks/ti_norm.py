"""Trains a new word with and without clip_ti_decay; prints JSON lines, and draws the norms to OUT/norm.png.

python tests/benchmarks/ti_norm.py --images FOLDER --out runs/ti_norm [--learning-rate 5e-3]
"""

import argparse
import json
import shutil
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sdjax.runtime import compilation_cache, host_memory
from sdjax.train import config_file
from sdjax.train.loop import train

COLOURS = {"on": "#1f77b4", "off": "#d62728"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    host_memory.keep()
    compilation_cache.enable()
    courses = {}
    for decay in COLOURS:
        output = args.out / decay
        shutil.rmtree(output, ignore_errors=True)
        stage = {
            "name": "word",
            "train": ["textual_inversion"],
            "steps": args.steps,
            "learning_rate": args.learning_rate,
            "placeholder_tokens": ["<thing>"],
            "vectors_per_token": 2,
            "init_tokens": ["cat face"],
            "template": ["{}", "a {}", "{} emoji"],
            "weight_decay": 0.0,
            "clip_ti_decay": decay == "on",
        }
        data = {"path": str(args.images), "resolution": 64, "batch_size": 8, "missing_caption": "empty"}
        table = {"model": "tiny", "output": str(output), "data": data, "stages": [stage], "checkpoint": {"every": 0}}
        assert train(config_file.from_table(table)) == 0
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        courses[decay] = [line["row_norm"] for line in lines if "row_norm" in line]
        tail = [line["loss"] for line in lines if "loss" in line][-50:]
        figures = {"clip_ti_decay": decay, "first": courses[decay][0], "last": courses[decay][-1]}
        print(json.dumps(figures | {"mean_loss_of_last_50": sum(tail) / len(tail)}), flush=True)
    plot(courses).save(args.out / "norm.png")


def plot(courses, width=640, height=360, left=60, low=40):
    """Returns a plot of a line over the steps for each course, with a scale that begins at 0 and a legend."""
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    top = max(map(max, courses.values())) * 1.1
    right, bottom = width - 20, height - low

    def place(step, norm, steps):
        return left + (right - left) * step / steps, bottom - (bottom - 20) * norm / top

    for i in range(5):
        y = place(0, top * i / 4, 1)[1]
        pen.line([(left, y), (right, y)], fill="#dddddd")
        pen.text((8, y - 8), f"{top * i / 4:.2f}", fill="black", font=font)
    for i, (name, norms) in enumerate(courses.items()):
        pen.line([place(step, norm, len(norms)) for step, norm in enumerate(norms)], fill=COLOURS[name], width=2)
        pen.text((left + 10 + 180 * i, 4), f"clip_ti_decay {name}", fill=COLOURS[name], font=font)
    pen.text((left, bottom + 10), f"norm of the vectors, over {len(norms)} steps", fill="black", font=font)
    return sheet


if __name__ == "__main__":
    main()
