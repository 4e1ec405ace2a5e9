"""A network on overlapping tiles of a picture, which needs the memory of one tile for a picture of any size."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from sdjax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The sizes of the tiles in pixels. Raises ConfigError for values that do not fit.

    tile: side of the square tiles. overlap: the least width that neighbours share. margin: width along the edges of a
    tile where its neighbours decide alone, less than half of the overlap.
    """

    tile: int = 512
    overlap: int = 64
    margin: int = 0

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.overlap <= self.tile or self.tile < 16:
            raise ConfigError(
                f"tile = {self.tile} with overlap = {self.overlap}: tile must be 16 or more, overlap 0 to half of tile"
            )


def tiled(
    compute: Callable[[Float[np.ndarray, "1 a b c"]], Array],
    values: Float[np.ndarray, "1 H W C"],
    tiling: Tiling,
    *,
    factor: int,
    encode: bool,
    channels: int,
) -> Float[np.ndarray, "1 h w D"]:
    """Returns the results of `compute` for each tile, put together.

    Where tiles overlap, the result is their mean, weighted by the distance from their edges. All tiles have one shape,
    so `compute` is compiled once.
    factor: side of the square of pixels that one latent stands for. encode: whether `values` are pixels and the results
    latents, else it is the other way round. channels: of the results. The pixels that an upscaler enlarges are latents
    here.
    """
    into, out = (factor, 1) if encode else (1, factor)
    rows, columns = (tiles(size // into, tiling, factor) for size in values.shape[1:3])
    height, width = (size // into * out for size in values.shape[1:3])
    total, weights = np.zeros((1, height, width, channels), np.float32), np.zeros((height, width, 1), np.float32)
    for top, tall in rows:
        for left, wide in columns:
            piece = values[:, top * into : (top + tall) * into, left * into : (left + wide) * into]
            result = np.asarray(compute(piece), np.float32)
            place = np.s_[top * out : (top + tall) * out, left * out : (left + wide) * out]
            widths = (tiling.overlap * out // factor, tiling.margin * out // factor)
            ramps = (_ramp(length * out, *widths) for length in (tall, wide))
            weight = np.multiply.outer(*ramps)[..., None]
            total[:, *place] += weight * result
            weights[place] += weight
    return total / weights


def tiles(length: int, tiling: Tiling, factor: int) -> list[tuple[int, int]]:
    """Returns (start, length) of each tile along one side of `length` latents, evenly spread."""
    tile, overlap = min(tiling.tile // factor, length), tiling.overlap // factor
    count = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    return [(round(start), tile) for start in np.linspace(0, length - tile, count)]


def _ramp(length: int, overlap: int, margin: int) -> Float[np.ndarray, " N"]:
    """Returns weights of 1 in the middle, which fall towards 0 over `overlap` places at both ends.

    They are next to 0 in the outer `margin` of these, and not 0, because there is no neighbour beyond the picture.
    """
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5 - margin
    return np.clip(distance / max(overlap - 2 * margin, 0.5), 1e-6, 1).astype(np.float32)
