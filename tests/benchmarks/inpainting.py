"""Paints the lower half of 16 pictures under another name with the embedded model, and measures the seam.

    python tests/benchmarks/inpainting.py --pictures noto64 --out inpainting.png

pictures: a folder of square pictures with metadata.jsonl. 16 of them are picked among the names that the model knows.
Draws the file OUT, and prints a JSON line for the originals, for plain pasting and for sdjax's way with a soft edge.
changed_outside: pixels outside the mask that changed. seam: mean step of colour (0..255) from the last kept row to the
first painted row. other_rows: the same between all other rows of the originals.

With the defaults, on Noto, which the model was trained on, and on Twemoji, which has the same subjects in another
style: the seam is 10.5 and 4.3 in the originals, 46.2 and 51.0 with plain pasting, 16.0 and 12.3 with the soft edge. No
pixel outside the mask changed. Tried with the previous embedded model: samplers and steps hardly mattered (54.5 to 56.2
with plain pasting, for ddim, euler_a and dpmpp_2m_sde at 20 or 50 steps). Matching the colours by the median difference
of the kept pixels shifted pictures by up to 44 and did not help (16.0 and 17.5), so sdjax does not do it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[2] / "configs"))

import tiny_data

import sdjax
from sdjax.data.images import on_white
from sdjax.draw import grids


def picked(folder, count=16):
    """Returns (pictures, their names, other names), the same in each call."""
    known = {subject.name for subject in tiny_data.subjects()} - set(tiny_data.WITHHELD)
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records = sorted((record for record in records if record["text"] in known), key=lambda record: record["text"])
    rows = np.random.default_rng(0).permutation(len(records))[: 2 * count]
    pictures = [on_white(Image.open(folder / records[row]["file_name"])) for row in rows[:count]]
    names = [records[row]["text"] for row in rows]
    return pictures, names[:count], names[count:]


def block(pictures, text):
    """Returns pictures in a row, twice as large, above a line of text."""
    row = grids.sheet(pictures, columns=len(pictures))
    whole = Image.new("RGB", (2 * row.width + 8, 2 * row.height + 24), "white")
    whole.paste(row.resize((2 * row.width, 2 * row.height), Image.Resampling.NEAREST), (4, 0))
    ImageDraw.Draw(whole).text((whole.width / 2, whole.height - 12), text, "black", ImageFont.load_default(14), "mm")
    return whole


def step_between(pictures, row):
    """Returns the mean step of colour from the row before `row` to it."""
    values = np.stack([np.asarray(picture, float) for picture in pictures])
    return float(np.abs(values[:, row] - values[:, row - 1]).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("inpainting.png"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sampler", default="dpmpp_2m")
    args = parser.parse_args()
    sd = sdjax.load(args.model)
    pictures, names, others = picked(args.pictures)
    width, height = pictures[0].size
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, height // 2, width, height))
    kept = np.asarray(mask) == 0
    rest = [row for row in range(1, height) if row != height // 2]
    original = {
        "seam": step_between(pictures, height // 2),
        "other_rows": np.mean([step_between(pictures, r) for r in rest]),
    }
    print(json.dumps({"way": "original"} | original))
    for way, settings in {"plain": {"mask_blur": 0}, "ours": {}}.items():
        painted = sd.inpaint(
            others, pictures, mask, guidance=3.0, steps=args.steps, sampler=args.sampler, progress=False, **settings
        )
        changed = sum(
            int((np.asarray(new)[kept] != np.asarray(old)[kept]).any(-1).sum())
            for new, old in zip(painted, pictures, strict=True)
        )
        print(json.dumps({"way": way, "changed_outside": changed, "seam": step_between(painted, height // 2)}))
    shown = [Image.composite(Image.new("RGB", old.size, "grey"), old, mask) for old in pictures]
    blocks = [
        block([old, masked, new], f"{name}, {other}")
        for old, masked, new, name, other in zip(pictures, shown, painted, names, others, strict=True)
    ]
    grids.sheet(blocks, columns=4).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
