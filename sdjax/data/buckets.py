"""Shapes of about the same area, and which of them each image is trained at."""

import math
from collections.abc import Iterable, Mapping, Sequence

from sdjax.data.images import Size, read_size
from sdjax.data.records import Record
from sdjax.errors import DataError

Buckets = Mapping[Size, tuple[Record, ...]]
"""The images of each shape, which have the order of the data set."""


def sizes(resolution: int, *, step: int, max_aspect: float) -> tuple[Size, ...]:
    """The shapes of at most resolution x resolution pixels whose sides are multiples of `step`, from tall to wide.

    Of the shapes with one given side the largest; long side over short one at most `max_aspect`.
    """
    if step > resolution:
        return (Size(resolution, resolution),)

    def largest(side: int) -> int:
        return resolution * resolution // side // step * step

    # A shape that could grow either way is left out: 704x320 where 768x320 fits. No side of one that is narrow enough
    # is above resolution * sqrt(max_aspect).
    widths = range(step, int(resolution * math.sqrt(max_aspect)) + 1, step)
    pairs = [Size(largest(width), width) for width in widths if largest(width)]
    fitting = [size for size in pairs if largest(size.height) == size.width and max(size) <= max_aspect * min(size)]
    return tuple(sorted(fitting, key=_aspect)) or (Size(resolution, resolution),)


def assign(records: Iterable[Record], choices: Sequence[Size]) -> Buckets:
    """Each record under the shape nearest to its own (by the logarithm of width over height); none empty.

    An image that cannot be read goes to the squarest: whoever decodes it will say what is wrong.
    """
    found: dict[Size, list[Record]] = {size: [] for size in choices}
    for record in records:
        found[_nearest(record, choices) if len(choices) > 1 else choices[0]].append(record)
    return {size: tuple(members) for size, members in found.items() if members}


def _nearest(record: Record, choices: Sequence[Size]) -> Size:
    try:
        own = _aspect(read_size(record.path))
    except DataError:
        own = 0.0
    return min(choices, key=lambda size: abs(_aspect(size) - own))


def _aspect(size: Size) -> float:
    return math.log(size.width / size.height)
