"""Chooses shapes of about the same area, and the shape that each image is trained at."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sdjax.data.files import picture_size
from sdjax.data.images import Size
from sdjax.data.records import Record, chosen
from sdjax.errors import DataError

Buckets = Mapping[Size, Sequence[Record]]
"""Shape -> its images, in the order of the data set."""


def sizes(resolution: int, *, step: int, max_aspect: float) -> tuple[Size, ...]:
    """The shapes of at most resolution x resolution pixels whose sides are multiples of `step`, from tall to wide.

    A shape is left out if one of its sides could still grow, or if the long side is more than `max_aspect` times the
    short side. If no shape remains, the result is the square of `resolution`.
    """
    if step > resolution:
        return (Size(resolution, resolution),)

    def largest(side: int) -> int:
        return resolution * resolution // side // step * step

    # 704x320, for example, is left out because 768x320 fits. A shape within max_aspect has no side above
    # resolution * sqrt(max_aspect).
    widths = range(step, int(resolution * math.sqrt(max_aspect)) + 1, step)
    pairs = [Size(largest(width), width) for width in widths if largest(width)]
    fitting = [size for size in pairs if largest(size.height) == size.width and max(size) <= max_aspect * min(size)]
    return tuple(sorted(fitting, key=_aspect)) or (Size(resolution, resolution),)


def assign(records: Sequence[Record], choices: Sequence[Size]) -> Buckets:
    """Assigns each image to the nearest of the shapes `choices`; shapes without images are left out.

    Shapes are compared by the logarithm of width over height. An image that cannot be read goes to the squarest shape,
    since the error will be reported when the image is decoded.
    """
    if len(choices) == 1:
        return {choices[0]: records}

    @functools.cache
    def nearest(aspect: float) -> int:
        return min(range(len(choices)), key=lambda i: abs(_aspect(choices[i]) - aspect))

    buckets = np.fromiter((nearest(_aspect_of(record)) for record in records), np.int32, len(records))
    return {size: chosen(records, np.flatnonzero(buckets == i)) for i, size in enumerate(choices) if i in buckets}


def _aspect_of(record: Record) -> float:
    try:
        return _aspect(picture_size(record.file))
    except DataError:
        return 0.0


def _aspect(size: Size) -> float:
    return math.log(size.width / size.height)
