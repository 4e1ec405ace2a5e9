"""Measures emoji models on the data of the recipe: a JSON line for each measure and model, and a sheet of pictures.

    python configs/tiny_data.py data runs/tiny/data --noto emoji-datasource-google-16.0.0.tgz
    python tests/benchmarks/tiny_model.py tiny OTHER_FOLDER --data runs/tiny/data --sheet sheet.png

vae: PSNR in dB of the emoji in held_out/, encoded to the mean of the posterior and decoded. mean, median: over the
    pictures. whole: the PSNR of the mean squared error over all pictures.
colour: hearts, circles and squares in eight colours, with four seeds each. The colour of a picture is the mean of its
    pixels that are not white. score: share of pictures whose colour is nearest, in CIELAB, to the true mean of the
    named colour. with_shape: share for which, of the 24 true pictures, the named one is the nearest.
retrieval: the 200 names with the smallest hashes. top1: share for which, of all true pictures, withheld ones included,
    the named one is the nearest. top5: share for which it is one of the five nearest. If the folder of a model has a
    names.txt, only names in it are drawn; if that leaves some out, `retrieval_all` draws 200 of all names.
composition: the names in withheld/, with eight seeds each, measured as in retrieval. Training did not see them.

The distance of two pictures is the Euclidean distance of their features: the means of red, green and blue over 4 x 4
pixels, and twice the means of the absolute horizontal and vertical differences of grey, all for values in [0, 1].
Neither names nor seeds are chosen: names come in the order of their hashes, and picture n of a measure has seed n.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import sdjax

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SHAPES = ("heart", "circle", "square")
BATCH = 32


def read_pictures(folder: Path, *, named: bool = True) -> dict[str, np.ndarray]:
    """Returns name (or file name) -> pixels in [0, 1], of the first file of each name."""
    pictures: dict[str, np.ndarray] = {}
    for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        name = entry["name" if named else "file_name"]
        if name not in pictures:
            pictures[name] = np.asarray(Image.open(folder / entry["file_name"]).convert("RGB"), np.float64) / 255
    return pictures


def by_hash(names: Sequence[str]) -> list[str]:
    """Returns the names in the order of their hashes, which nobody chose."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the PSNR in dB over the last three axes. Values are in [0, 1]."""
    return -10 * np.log10(np.maximum(np.mean(np.square(a - b), axis=(-3, -2, -1)), 1e-10))


def features(pixels: np.ndarray) -> np.ndarray:
    """Returns the features [N, 1280] of pictures [N, 64, 64, 3] in [0, 1]."""

    def means(x):
        n, h, w, c = x.shape
        return x.reshape(n, h // 4, 4, w // 4, 4, c).mean((2, 4)).reshape(n, -1)

    grey = np.pad(pixels @ np.array([0.299, 0.587, 0.114]), ((0, 0), (0, 1), (0, 1)), mode="edge")
    across, down = np.abs(np.diff(grey, axis=2))[:, :-1], np.abs(np.diff(grey, axis=1))[:, :, :-1]
    return np.concatenate([means(pixels), 2 * means(np.stack([across, down], axis=-1))], axis=1)


def ranks(drawn: np.ndarray, wanted: Sequence[str], true: dict[str, np.ndarray]) -> np.ndarray:
    """Returns, for each drawn picture, how many true pictures are nearer to it than the wanted one."""
    names = list(true)
    distances = np.linalg.norm(features(drawn)[:, None] - features(np.stack([*true.values()]))[None], axis=-1)
    to_wanted = distances[np.arange(len(drawn)), [names.index(name) for name in wanted]]
    return np.sum(distances < to_wanted[:, None], axis=1)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB in [0, 1] to CIELAB (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = linear @ np.array(matrix).T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def mean_colour(pixels: np.ndarray) -> np.ndarray:
    """Returns the CIELAB mean of the pixels with a channel below 0.95, or white if there are fewer than 16."""
    coloured = pixels[pixels.min(-1) < 0.95]
    return lab(coloured.mean(0) if len(coloured) >= 16 else np.ones(3))


def named_colours(drawn: np.ndarray, true: dict[str, np.ndarray]) -> list[str]:
    """Returns which of COLOURS each drawn picture has."""
    references = np.stack(
        [np.mean([mean_colour(true[f"{colour} {shape}"]) for shape in SHAPES], axis=0) for colour in COLOURS]
    )
    return [COLOURS[int(np.argmin(np.linalg.norm(references - mean_colour(pixels), axis=-1)))] for pixels in drawn]


def draw(sd: sdjax.StableDiffusion, prompts: Sequence[str], steps: int, guidance: float) -> np.ndarray:
    """Returns pictures in [0, 1]. Picture n has seed n. All batches have one size, so one program draws all."""
    pictures = []
    for first in range(0, len(prompts), BATCH):
        batch = list(prompts[first : first + BATCH])
        full = batch + [""] * (BATCH - len(batch))
        drawn = sd.text2image(full, steps=steps, guidance=guidance, seed=first, height=64, width=64, progress=False)
        pictures += [np.asarray(image, np.float64) / 255 for image in drawn[: len(batch)]]
    return np.stack(pictures)


def measure(source: str, data: Path, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Prints the figures of a model. Returns a picture for each name of the sheet."""
    started = time.perf_counter()
    sd = sdjax.load(source)
    true = read_pictures(data / "pictures")
    trained = list(true)
    withheld = read_pictures(data / "withheld")
    true |= withheld

    def report(name: str, **figures: object) -> None:
        seconds = round(time.perf_counter() - started, 1)
        print(json.dumps({"model": source, "measure": name, **figures, "seconds": seconds}), flush=True)

    emoji = np.stack([*read_pictures(data / "held_out", named=False).values()])[: args.limit]
    decoded = np.asarray(sd.decode_latents(sd.encode_image(emoji.astype(np.float32))), np.float64)
    each = psnr(decoded, emoji)
    whole = float(-10 * np.log10(np.mean(np.square(decoded - emoji))))
    report("vae", count=len(emoji), mean=_round(each.mean()), median=_round(np.median(each)), whole=_round(whole))

    asked = [f"{colour} {shape}" for _ in range(4) for colour in COLOURS for shape in SHAPES][: args.limit]
    drawn = draw(sd, asked, args.steps, args.guidance)
    named = named_colours(drawn, true)
    wrong = [f"{name}: {got}" for name, got in zip(asked, named, strict=True) if name.split()[0] != got]
    shapes = {name: true[name] for name in dict.fromkeys(asked)}
    nearest = ranks(drawn, asked, shapes) == 0
    report(
        "colour",
        count=len(asked),
        score=_round(1 - len(wrong) / len(asked)),
        with_shape=_round(nearest.mean()),
        wrong=wrong,
    )
    sheet = dict(zip(asked[:24], drawn[:24], strict=True))

    listed = Path(sd.model.outline.folder.path) / "names.txt"
    known = set(listed.read_text("utf-8").splitlines()) if listed.exists() else set(trained)
    ordered = by_hash(trained)
    for label, names in (("retrieval", [n for n in ordered if n in known]), ("retrieval_all", ordered)):
        if label == "retrieval_all" and known.issuperset(ordered):
            continue
        asked = names[:200][: args.limit]
        drawn = draw(sd, asked, args.steps, args.guidance)
        places = ranks(drawn, asked, true)
        report(
            label,
            count=len(asked),
            among=len(true),
            top1=_round(np.mean(places < 1)),
            top5=_round(np.mean(places < 5)),
            median_psnr=_round(np.median(psnr(drawn, np.stack([true[name] for name in asked])))),
            missed=[name for name, place in zip(asked, places, strict=True) if place >= 5][:40],
        )
        sheet |= dict(zip(asked, drawn, strict=True))

    asked = [name for _ in range(8) for name in by_hash(list(withheld))][: args.limit]
    drawn = draw(sd, asked, args.steps, args.guidance)
    places = ranks(drawn, asked, true)
    by_name = {n: _round(np.mean([p < 1 for a, p in zip(asked, places, strict=True) if a == n])) for n in withheld}
    report(
        "composition",
        count=len(asked),
        top1=_round(np.mean(places < 1)),
        top5=_round(np.mean(places < 5)),
        by_name=by_name,
    )
    return sheet | dict(zip(asked, drawn, strict=True))


def write_sheet(file: str, sheets: Sequence[dict[str, np.ndarray]], true: dict[str, np.ndarray]) -> None:
    """Writes a sheet, sixteen names across: a name, its true picture and that of each model, or grey if not drawn."""
    names = list(dict.fromkeys(name for sheet in sheets for name in sheet))
    rows, across = len(sheets) + 1, 16
    width, height = 72, 64 * rows + 16
    out = Image.new("RGB", (across * width, -(-len(names) // across) * height), "#dddddd")
    pen = ImageDraw.Draw(out)
    for i, name in enumerate(names):
        x, y = i % across * width + 4, i // across * height
        pen.text((x, y), name[:11], fill="black")
        for row, sheet in enumerate([true, *sheets]):
            if name in sheet:
                out.paste(Image.fromarray(np.round(sheet[name] * 255).astype(np.uint8)), (x, y + 14 + 64 * row))
    out.save(file)


def _round(value: float | np.floating) -> float:
    return round(float(value), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders, or tiny")
    parser.add_argument("--data", required=True, help="folder that the recipe's data command wrote")
    parser.add_argument("--sheet", default="", help="PNG file for the true pictures and those of each model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--limit", type=int, help="most pictures of each measure, for a quick look")
    args = parser.parse_args()
    data = Path(args.data)
    sheets = [measure(source, data, args) for source in args.models]
    if args.sheet:
        write_sheet(args.sheet, sheets, read_pictures(data / "pictures") | read_pictures(data / "withheld"))


if __name__ == "__main__":
    main()
