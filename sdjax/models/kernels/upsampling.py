"""Nearest-neighbour enlargement of feature maps."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def upsample_nearest(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B h w C"]:
    """Returns x enlarged by PyTorch's rule: pixel i of the result is pixel `floor(i * in / out)` of x."""
    _, h, w, _ = x.shape
    if (height, width) == (2 * h, 2 * w):
        return interleave([[x, x], [x, x]])
    rows = jnp.arange(height) * h // height
    columns = jnp.arange(width) * w // width
    return x[:, rows][:, :, columns]


def interleave(phases: list[list[Float[Array, "B H W C"]]]) -> Float[Array, "B nH nW C"]:
    """Returns the map whose pixel (n y + i, n x + j) is pixel (y, x) of `phases[i][j]`, of n x n maps."""
    batch, height, width, channels = phases[0][0].shape
    n = len(phases)
    rows = [jnp.stack(row, axis=3).reshape(batch, height, n * width, channels) for row in phases]
    return jnp.stack(rows, axis=2).reshape(batch, n * height, n * width, channels)
