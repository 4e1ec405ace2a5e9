"""The lower half of 16 pictures painted under another name with the embedded model: a picture to look at, and figures.

    python tests/benchmarks/inpainting.py --pictures noto64 --out inpainting.png

pictures: a folder of square pictures with metadata.jsonl; 16 are picked among the names the model knows. Prints a JSON
line for each way of pasting: how many pixels outside the mask changed, and the mean step of colour (0..255) across the
seam, from the last row kept to the first painted, beside that of the originals and that of the pictures' other rows.

On Noto, which the model was trained on, and on Twemoji, the same subjects in another hand, with the defaults: seam 10.5
and 4.3 in the originals, 46.2 and 51.0 pasted plainly, 16.0 and 12.3 with the soft edge; no pixel outside changed. With
the embedded model before this one samplers and steps hardly mattered (54.5 to 56.2 plainly, with ddim, euler_a,
dpmpp_2m_sde, 20 or 50 steps). Nor did a match of colours, by the median difference of the kept pixels, which shifted
pictures by up to 44: 16.0 and 17.5, so there is none.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sdjax
from sdjax.draw import grids
from sdjax.draw.inpainting import on_white
from sdjax.tiny import recipe


def picked(folder, count=16):
    """(pictures, their names, other names), the same at each call."""
    known = {subject.name for subject in recipe.subjects()} - set(recipe.WITHHELD)
    records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    records = sorted((record for record in records if record["text"] in known), key=lambda record: record["text"])
    rows = np.random.default_rng(0).permutation(len(records))[: 2 * count]
    pictures = [on_white(Image.open(folder / records[row]["file_name"])) for row in rows[:count]]
    names = [records[row]["text"] for row in rows]
    return pictures, names[:count], names[count:]


def block(pictures, text):
    """Pictures in a row, twice as large, over a line of text."""
    row = grids.sheet(pictures, columns=len(pictures))
    whole = Image.new("RGB", (2 * row.width + 8, 2 * row.height + 24), "white")
    whole.paste(row.resize((2 * row.width, 2 * row.height), Image.Resampling.NEAREST), (4, 0))
    ImageDraw.Draw(whole).text((whole.width / 2, whole.height - 12), text, "black", ImageFont.load_default(14), "mm")
    return whole


def step_between(pictures, row):
    """Mean step of colour from the row before it to a row."""
    values = np.stack([np.asarray(picture, float) for picture in pictures])
    return float(np.abs(values[:, row] - values[:, row - 1]).mean())


def main():
    parser = argparse.ArgumentParser()
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
    for way, how in {"plain": {"mask_blur": 0}, "ours": {}}.items():
        painted = sd.inpaint(
            others, pictures, mask, guidance=3.0, steps=args.steps, sampler=args.sampler, progress=False, **how
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
