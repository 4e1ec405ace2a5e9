"""Measures emoji models on the data of the recipe: a JSON line for each measure and model, and a sheet of pictures.

    python configs/tiny_data.py data runs/tiny/data --sets runs/tiny/sets
    python tests/benchmarks/tiny_model.py FOLDER --data runs/tiny/data --sheet sheet.png
    python tests/benchmarks/tiny_model.py tiny --data runs/tiny/data --styles ""     (a model without style words)

vae: PSNR in dB of pictures, encoded to the mean of the posterior and decoded: of the emoji in held_out/, and of those
    that the model is taught. mean, median: over the pictures. whole: that of the squared error over all pictures.
colour: hearts, circles and squares in eight colours, with four seeds each. The colour of a picture is the mean of its
    pixels that are not white. score: share of pictures whose colour is nearest, in CIELAB, to the true mean of the
    named colour. with_shape: share for which, of the 24 true pictures, the named one is the nearest.
retrieval: 200 pairs of a name and a set of its style, those with the smallest hashes. top1: share for which, of the
    true pictures of this set, the named one is the nearest. top5: share for which it is one of the five nearest.
    in_style: share whose nearest picture of this name, of all sets, is that of the set asked for.
unnamed: the 200 names with the smallest hashes, no style named. A name is as near as the nearest set's picture of it.
variety: 50 names with four seeds each, no style named. distance: the mean distance between two seeds, as a share of the
    mean distance between two names. kept: share of the pictures that are among the five nearest of their name.
composition: the names that training left out, with eight seeds each, measured as in retrieval.

    python -m sdjax.train configs/quickstart.toml --model FOLDER --output runs/q
    python -m sdjax.train configs/lora_style.toml --model FOLDER --output runs/o \\
      --data.path runs/tiny/data/samples/openmoji
    ... --taught twemoji=runs/q/export/style/lora.safetensors --taught openmoji=runs/o/export/style/lora.safetensors

style: 100 names that are not among the sample pictures, with and without the LoRA. moved: share nearer to the picture
    of this name in the taught set than to its picture in any set of the model. recognised: share for which it is among
    the five nearest pictures of the taught set. --weight sets the weight of the LoRA.

    python -m sdjax.train configs/textual_inversion.toml --model FOLDER --output runs/c \\
      --data.path runs/tiny/data/characters/green-fox-crown
    ... --character green-fox-crown=runs/c/export/word/thing.safetensors

character: 16 pictures of the word. named: share whose nearest picture, of all true pictures and the character's six
    other poses, is a pose.

The distance of two pictures is the Euclidean one of their features (`sdjax.train.likeness.features`). Neither names
nor seeds are chosen: names come in the order of their hashes, and picture n of a measure has seed n.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

import sdjax
from sdjax.data.images import picture
from sdjax.train import likeness

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
SHAPES = ("heart", "circle", "square")
WITHHELD = ("green circle", "purple circle", "yellow square", "orange square", "brown heart")
STYLES = "noto,blob,fluent,flat,glyph,firefox,emojitwo,sticker"
BATCH = 32

T = TypeVar("T")
Pictures = dict[tuple[str, str], np.ndarray]
"""Set and name -> pixels [64, 64, 3] in [0, 1]."""


# ------------------------------------------------------------------------------------------------ pictures, distances


def read(folder: Path) -> Pictures:
    """Returns the pictures of a folder. Those without a set or a name have an empty one, or the name of the file."""
    pictures: Pictures = {}
    for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines():
        entry = json.loads(line)
        key = entry.get("set", ""), entry.get("name", entry["file_name"])
        if key in pictures:
            key = key[0], f"{key[1]} {entry['file_name']}"
        pictures[key] = np.asarray(Image.open(folder / entry["file_name"]).convert("RGB"), np.float64) / 255
    return pictures


def by_hash(things: Sequence[T]) -> list[T]:
    """Returns things in the order of their hashes, which nobody chose."""
    return sorted(things, key=lambda thing: hashlib.sha256(str(thing).encode()).digest())


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the PSNR in dB over the last three axes. Values are in [0, 1]."""
    return -10 * np.log10(np.maximum(np.mean(np.square(a - b), axis=(-3, -2, -1)), 1e-10))


def features(pixels: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Returns the features [N, 1280] of pictures [N, 64, 64, 3] in [0, 1]."""
    return np.stack([likeness.features(picture(each)) for each in pixels])


class References:
    """True pictures, and how far drawn pictures are from them."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.keys = list(pictures)
        self.names = list(dict.fromkeys(name for _, name in self.keys))

    @cached_property
    def _features(self) -> np.ndarray:
        return features([*self.pictures.values()])

    def of(self, sets: Sequence[str]) -> "References":
        """Returns those of some sets."""
        return References({key: pixels for key, pixels in self.pictures.items() if key[0] in sets})

    def distances(self, drawn: np.ndarray) -> np.ndarray:
        """Returns [N, names], the distance from each drawn picture to the nearest picture of each name."""
        given = features(drawn)
        squares = np.sum(given**2, 1)[:, None] - 2 * given @ self._features.T + np.sum(self._features**2, 1)
        each = np.sqrt(np.maximum(squares, 0))
        columns = np.array([self.names.index(name) for _, name in self.keys])
        return np.stack([each[:, columns == i].min(1) for i in range(len(self.names))], axis=1)

    def to(self, drawn: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
        """Returns the distance of each drawn picture to the wanted name."""
        return self.distances(drawn)[np.arange(len(drawn)), [self.names.index(name) for name in wanted]]

    def ranks(self, drawn: np.ndarray, wanted: Sequence[str]) -> np.ndarray:
        """Returns, for each drawn picture, how many names are nearer to it than the wanted one."""
        distances = self.distances(drawn)
        own = distances[np.arange(len(drawn)), [self.names.index(name) for name in wanted]]
        return np.sum(distances < own[:, None], axis=1)


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


# ------------------------------------------------------------------------------------------------ the measures


class Measurer:
    """Draws with one model, prints its figures, and keeps pictures for the sheet."""

    def __init__(self, source: str, args: argparse.Namespace) -> None:
        self.source, self.args = source, args
        self.started = time.perf_counter()
        self.sd = sdjax.load(source)
        self.data = Path(args.data)
        self.styles = [word for word in args.styles.split(",") if word]
        """The words for styles that the model knows."""
        self.true = References(read(self.data / "true")).of(self.styles or ["noto"])
        self.sheet: dict[str, np.ndarray] = {}

    def report(self, name: str, **figures: object) -> None:
        """Prints a line."""
        rounded = {key: round(float(v), 3) if isinstance(v, (float, np.floating)) else v for key, v in figures.items()}
        seconds = round(time.perf_counter() - self.started, 1)
        print(json.dumps({"model": self.source, "measure": name, **rounded, "seconds": seconds}), flush=True)

    def prompt(self, name: str, style: str = "noto") -> str:
        """Returns the prompt for a name in a style, if the model has words for styles."""
        return f"{name}, {style}" if self.styles else name

    def draw(self, prompts: Sequence[str], sd: sdjax.StableDiffusion | None = None) -> np.ndarray:
        """Returns pictures in [0, 1]. Picture n has seed n. All batches have one size, so one program draws all."""
        pictures = []
        for first in range(0, len(prompts), BATCH):
            batch = list(prompts[first : first + BATCH])
            drawn = (sd or self.sd).text2image(
                batch + [""] * (BATCH - len(batch)),
                steps=self.args.steps,
                guidance=self.args.guidance,
                seed=first,
                height=64,
                width=64,
                progress=False,
            )
            pictures += [np.asarray(image, np.float64) / 255 for image in drawn[: len(batch)]]
        self.sheet |= {
            f"{prompt} {len(self.sheet) + i}" if prompt in self.sheet else prompt: pixels
            for i, (prompt, pixels) in enumerate(zip(prompts, pictures, strict=True))
        }
        return np.stack(pictures)

    def vae(self) -> None:
        """Reports the PSNR of pictures that the autoencoder has not seen."""
        taught = read(self.data / "taught")
        groups = {"held_out": [*read(self.data / "held_out").values()]}
        groups |= {s: [v for (own, _), v in taught.items() if own == s] for s in sorted({s for s, _ in taught})}
        for name, group in groups.items():
            emoji = np.stack(group)[: self.args.limit]
            parts = [emoji[i : i + 64].astype(np.float32) for i in range(0, len(emoji), 64)]
            decoded = np.concatenate([np.asarray(self.sd.decode_latents(self.sd.encode_image(part))) for part in parts])
            each, whole = psnr(decoded, emoji), -10 * np.log10(np.mean(np.square(decoded - emoji)))
            self.report("vae", pictures=name, count=len(emoji), mean=each.mean(), median=np.median(each), whole=whole)

    def colour(self) -> None:
        """Reports whether colours are those named."""
        true = {name: pixels for (style, name), pixels in self.true.pictures.items() if style == "noto"}
        asked = [f"{colour} {shape}" for _ in range(4) for colour in COLOURS for shape in SHAPES][: self.args.limit]
        drawn = self.draw([self.prompt(name) for name in asked])
        named = named_colours(drawn, true)
        wrong = [f"{name}: {got}" for name, got in zip(asked, named, strict=True) if name.split()[0] != got]
        shapes = References({("noto", name): true[name] for name in dict.fromkeys(asked)})
        score, with_shape = 1 - len(wrong) / len(asked), np.mean(shapes.ranks(drawn, asked) < 1)
        self.report("colour", count=len(asked), score=score, with_shape=with_shape, wrong=wrong)

    def retrieval(self, label: str = "retrieval", only: Sequence[str] = (), repeats: int = 1) -> None:
        """Reports whether pictures of names in the styles of sets are recognised. only: the names; none: all."""
        keys = [key for key in self.true.keys if (key[1] in only if only else key[1] not in WITHHELD)]
        asked = ([key for _ in range(repeats) for key in by_hash(keys)])[: self.args.limit or 200]
        drawn = self.draw([self.prompt(name, style) for style, name in asked])
        places, in_style = np.zeros(len(asked), int), np.zeros(len(asked), bool)
        for style in dict.fromkeys(style for style, _ in asked):
            own = self.true.of([style])
            rows = [i for i, key in enumerate(asked) if key[0] == style]
            wanted = [asked[i][1] for i in rows]
            places[rows] = own.ranks(drawn[rows], wanted)
            in_style[rows] = own.to(drawn[rows], wanted) <= self.true.to(drawn[rows], wanted) + 1e-9
        missed = [", ".join(key[::-1]) for key, place in zip(asked, places, strict=True) if place >= 5][:40]
        figures = {"top1": np.mean(places < 1), "top5": np.mean(places < 5), "in_style": np.mean(in_style)}
        self.report(label, count=len(asked), **figures, missed=missed)

    def unnamed(self) -> None:
        """Reports whether pictures of names are recognised if no style is named."""
        asked = by_hash([name for name in self.true.names if name not in WITHHELD])[: self.args.limit or 200]
        places = self.true.ranks(self.draw(asked), asked)
        self.report("unnamed", count=len(asked), top1=np.mean(places < 1), top5=np.mean(places < 5))

    def variety(self) -> None:
        """Reports how much seeds differ, and whether the subject stays."""
        names = by_hash([name for name in self.true.names if name not in WITHHELD])[: (self.args.limit or 50)]
        asked = [name for name in names for _ in range(4)]
        drawn = self.draw(asked)
        own = features(drawn).reshape(len(names), 4, -1)

        def mean(x: np.ndarray) -> float:  # of the distances between all pairs in the last axis but one
            apart = np.linalg.norm(x[..., :, None, :] - x[..., None, :, :], axis=-1)
            return float(apart.sum() / (apart.size - apart.size // apart.shape[-1]))

        share = mean(own) / mean(np.moveaxis(own, 0, 1))
        kept = np.mean(self.true.ranks(drawn, asked) < 5)
        self.report("variety", names=len(names), seeds=4, distance=share, kept=kept)

    def style(self, word: str, lora: str) -> None:
        """Reports how far a LoRA moves pictures to a taught set, with names that were not among its pictures."""
        own = References(read(self.data / "taught")).of([word])
        sampled = {name for _, name in read(self.data / "samples" / word)}
        known = set(self.true.names)
        names = [name for name in by_hash(own.names) if name in known - sampled][: self.args.limit or 100]
        for label, sd in (("base", None), (lora, self.sd.with_lora(lora, weight=self.args.weight))):
            drawn = self.draw(names, sd)
            moved = np.mean(own.to(drawn, names) < self.true.to(drawn, names))
            places = own.ranks(drawn, names)
            figures = {"moved": moved, "recognised": np.mean(places < 5), "top1": np.mean(places < 1)}
            weight = self.args.weight if sd else 0.0
            self.report("style", style=word, lora=label, weight=weight, count=len(names), **figures)

    def character(self, name: str, file: str) -> None:
        """Reports whether a word draws the character that it was taught from."""
        poses = {("", f"pose {i}"): pixels for i, pixels in enumerate(read(self.data / "poses" / name).values())}
        references = References(self.true.pictures | poses)
        word = f"<{Path(file).stem}>"
        drawn = self.draw([word] * min(16, self.args.limit or 16), self.sd.with_embedding(file))
        nearest = [references.names[i] for i in references.distances(drawn).argmin(1)]
        named = np.mean([near.startswith("pose ") for near in nearest])
        self.report("character", character=name, count=len(drawn), named=named, nearest=nearest)


def measure(source: str, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Prints the figures of a model. Returns the pictures for the sheet."""
    measurer = Measurer(source, args)
    measures = {
        "vae": measurer.vae,
        "colour": measurer.colour,
        "retrieval": measurer.retrieval,
        "unnamed": measurer.unnamed,
        "variety": measurer.variety,
        "composition": lambda: measurer.retrieval("composition", WITHHELD, repeats=8),
    }
    for name in args.measures.split(",") if args.measures else ():
        measures[name]()
    for given in args.taught:
        measurer.style(*given.split("=", 1))
    for given in args.character:
        measurer.character(*given.split("=", 1))
    return measurer.sheet


def write_sheet(file: str, sheets: Sequence[dict[str, np.ndarray]], true: Pictures) -> None:
    """Writes a sheet, sixteen prompts across: a prompt, its true picture and that of each model, grey if not drawn."""
    prompts = list(dict.fromkeys(prompt for sheet in sheets for prompt in sheet))
    rows, across = len(sheets) + 1, 16
    width, height = 72, 64 * rows + 16
    out = Image.new("RGB", (across * width, -(-len(prompts) // across) * height), "#dddddd")
    pen = ImageDraw.Draw(out)
    for i, prompt in enumerate(prompts):
        x, y = i % across * width + 4, i // across * height
        pen.text((x, y), prompt[:11], fill="black")
        name, _, style = prompt.partition(", ")
        known = {prompt: true[key]} if (key := (style or "noto", name)) in true else {}
        for row, sheet in enumerate([known, *sheets]):
            if prompt in sheet:
                out.paste(Image.fromarray(np.round(sheet[prompt] * 255).astype(np.uint8)), (x, y + 14 + 64 * row))
    out.save(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model folders, or tiny")
    parser.add_argument("--data", required=True, help="folder that the recipe's data command wrote")
    parser.add_argument("--styles", default=STYLES, help="the words for styles that the models know; empty: none, Noto")
    parser.add_argument("--measures", default="vae,colour,retrieval,unnamed,variety,composition")
    parser.add_argument("--taught", action="append", default=[], metavar="SET=LORA", help="measure a taught style")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of these LoRAs")
    parser.add_argument("--character", action="append", default=[], metavar="NAME=FILE", help="measure a taught word")
    parser.add_argument("--sheet", default="", help="PNG file for the true pictures and those of each model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--limit", type=int, help="most pictures of each measure, for a quick look")
    args = parser.parse_args()
    sheets = [measure(source, args) for source in args.models]
    if args.sheet:
        write_sheet(args.sheet, sheets, read(Path(args.data) / "true"))


if __name__ == "__main__":
    main()
