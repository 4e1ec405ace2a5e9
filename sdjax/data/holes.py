"""Makes the masks that hide an image in training for inpainting: random ones, or the image's mask file."""

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
    """`count` masks of each of V crops of an image, True where the image is hidden.

    If the record has a mask file, all `count` masks are that one. Otherwise they are random, and `full` is the share
    of them that hide everything. Raises DataError for a mask file that hides nothing of the crops.
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
        raise DataError(f"{record.hole}: the mask is nowhere white in the crops of the image: nothing would be painted")
    return np.repeat(hole[:, None], count, axis=1)


def random_hole(size: Size, full: float, *, seed: int, name: str, crop: int, number: int) -> Bool[np.ndarray, "H W"]:
    """A random mask, which depends on the arguments alone and is never empty.

    It hides everything with probability `full`, else one to three rectangles or one to three brush strokes.
    """
    digest = hashlib.sha256(f"{seed} {crop} {number} {name}".encode()).digest()
    # Fractions below 1, made from raw words because NumPy never changes their stream.
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
    """Draws a rectangle. Each of its sides is 0.15 to 0.75 of the picture's."""
    height, width = (max(1, round(side * (0.15 + 0.6 * next(fractions)))) for side in size)
    top, left = int((size.height - height + 1) * next(fractions)), int((size.width - width + 1) * next(fractions))
    pen.rectangle((left, top, left + width - 1, top + height - 1), fill=1)


def _stroke(pen: ImageDraw.ImageDraw, size: Size, fractions: Iterator[float]) -> None:
    """Draws a line through two to five points, 0.08 to 0.25 of the short side wide, with round ends and joints."""
    width = max(2, math.ceil(min(size) * (0.08 + 0.17 * next(fractions))))
    points = [
        (int(size.width * next(fractions)), int(size.height * next(fractions)))
        for _ in range(2 + int(4 * next(fractions)))
    ]
    pen.line(points, fill=1, width=width)
    for point in points:
        pen.circle(point, width / 2, fill=1)
