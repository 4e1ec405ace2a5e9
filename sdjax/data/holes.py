"""What training for inpainting hides of an image: random masks fixed by seed, name and number, or the image's own."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw

from sdjax.data.images import Crop, Size, read_mask
from sdjax.data.records import Record
from sdjax.errors import DataError


def make_holes(
    record: Record, size: Size, crops: Sequence[Crop], *, count: int, full: float, seed: int
) -> Bool[np.ndarray, "V K H W"]:
    """`count` masks of each crop of an image, True where it is hidden; an image's own is the same each time.

    full: share of the random masks that hide everything. Raises DataError for an own mask that hides nothing.
    """
    if record.hole is None:
        return np.stack(
            [
                np.stack([random_hole(size, full, seed=seed, name=record.name, crop=v, number=k) for k in range(count)])
                for v in range(len(crops))
            ]
        )
    hole = read_mask(record.hole, size, crops)[..., 0] >= 0.5
    if not hole.any():
        raise DataError(f"{record.hole}: the mask is nowhere white in what is shown of the image: nothing is painted")
    return np.repeat(hole[:, None], count, axis=1)


def random_hole(size: Size, full: float, *, seed: int, name: str, crop: int, number: int) -> Bool[np.ndarray, "H W"]:
    """Everything with probability `full`, else one to three rectangles or one to three brush strokes; never nothing."""
    digest = hashlib.sha256(f"{seed} {crop} {number} {name}".encode()).digest()
    # Raw words, whose stream NumPy never changes, as fractions below 1.
    words = np.random.Philox(np.random.SeedSequence(int.from_bytes(digest))).random_raw(64)
    fractions = iter((words >> np.uint64(11)).astype(np.float64) / 2.0**53)
    if next(fractions) < full:
        return np.ones(size, bool)
    shape = _rectangle if next(fractions) < 0.5 else _stroke
    hole = Image.new("1", (size.width, size.height))
    for _ in range(1 + int(3 * next(fractions))):
        shape(ImageDraw.Draw(hole), size, fractions)
    return np.asarray(hole)


def _rectangle(pen: ImageDraw.ImageDraw, size: Size, fractions: Iterator[float]) -> None:
    """0.15 to 0.75 of either side."""
    height, width = (max(1, round(side * (0.15 + 0.6 * next(fractions)))) for side in size)
    top, left = int((size.height - height + 1) * next(fractions)), int((size.width - width + 1) * next(fractions))
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=1)


def _stroke(pen: ImageDraw.ImageDraw, size: Size, fractions: Iterator[float]) -> None:
    """From place to place, two to five of them, 0.08 to 0.25 of the short side wide, round at its ends and joints."""
    width = max(2, math.ceil(min(size) * (0.08 + 0.17 * next(fractions))))
    points = [
        (int(size.width * next(fractions)), int(size.height * next(fractions)))
        for _ in range(2 + int(4 * next(fractions)))
    ]
    pen.line(points, fill=1, width=width)
    for point in points:
        pen.circle(point, width / 2, fill=1)
