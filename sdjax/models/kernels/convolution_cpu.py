"""Convolutions of stride 1 on the CPU, NHWC, where XLA's are slow.

`convolve` computes a convolution in one of three ways that give the same numbers up to rounding, and its gradients:

- one matrix product of the pixels' neighbourhoods with the kernel, for small maps of many channels,
- Winograd's transform, for maps of many pixels and many channels,
- XLA's convolution, for everything else.

`doubled_and_convolved` is for a map whose sides are doubled before the convolution.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.models.kernels.upsampling import interleave

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of zeros around a map: ((top, bottom), (left, right))."""


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"], padding: Padding
) -> Float[Array, "B h w D"]:
    """Returns the convolution of stride 1, by the way that is fastest for these shapes."""
    if product_pays(x, kernel) and not winograd_tile(x, kernel, padding):
        return _by_product(x, kernel, padding)
    return _with_fast_gradient(x, kernel, padding)


def product_pays(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"]) -> bool:
    """Whether one matrix product is faster than XLA's convolution.

    It is for small maps of many channels, where XLA spends its time on repacking the kernel: 2 to 6 times as fast.
    """
    batch, height, width, channels = x.shape
    return batch * height * width <= 512 and channels * kernel.shape[3] >= 1 << 18


def winograd_tile(x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"], padding: Padding) -> int:
    """The side m of Winograd's tiles where they are faster than XLA's convolution, else 0.

    Only 3x3 convolutions of padding 1 in float32 qualify, on maps of even height and width. With few pixels, the
    transform of the kernel, needed at every call, takes too long. With few channels, the products are too small beside
    the sums around them. With many pixels, the transformed map and result take too much memory: four times that of the
    map and the result.
    Tiles of 4 are 1.2 to 1.4 times as fast as tiles of 2, given enough pixels: their transformed kernels have 4 times
    the size of the kernel, those of tiles of 2 have 1.8 times.
    """
    batch, height, width, channels = x.shape
    fits = kernel.shape[:2] == (3, 3) and padding == ((1, 1), (1, 1)) and height % 2 == width % 2 == 0
    pixels, fewest = batch * height * width, min(channels, kernel.shape[3])
    pays = pixels >= (256 if fewest >= 256 else 2048) and fewest >= 64 and pixels * channels < 1 << 24
    if not (fits and pays and x.dtype == jnp.float32):
        return 0
    return 4 if height % 4 == width % 4 == 0 and pixels >= 1024 else 2


def doubled_and_convolved(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B 2*H 2*W D"]:
    """Returns the 3x3 convolution of padding 1 of x after its sides are doubled, without doubling them.

    A pixel of the result sees only 2x2 pixels of x. So the taps of the kernel that fall on one pixel are added up
    first, once for each of the four phases (even or odd row, even or odd column): 4 / 9 of the multiplications.
    """
    first, middle, last = kernel[0], kernel[1], kernel[2]
    by_row = (jnp.stack([first, middle + last]), jnp.stack([first + middle, last]))
    pads = ((1, 0), (0, 1))

    def phase(i, j):
        rows = by_row[i]
        left, centre, right = rows[:, 0], rows[:, 1], rows[:, 2]
        taps = [left, centre + right] if j == 0 else [left + centre, right]
        return convolve(x, jnp.stack(taps, axis=1), (pads[i], pads[j]))

    return interleave([[phase(i, j) for j in range(2)] for i in range(2)])


def _by_xla(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _by_product(x, kernel, padding):
    """Returns one matrix product of the pixels' neighbourhoods with the kernel (im2col)."""
    size_h, size_w, channels, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = padded.shape[1] - size_h + 1, padded.shape[2] - size_w + 1
    shifted = [padded[:, i : i + height, j : j + width] for i in range(size_h) for j in range(size_w)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, size_h * size_w * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(x.shape[0], height, width, features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_fast_gradient(x, kernel, padding):
    """Returns the convolution by Winograd's transform or XLA; the gradient by the kernel is a matrix product."""
    tile = winograd_tile(x, kernel, padding)
    return _by_winograd(x, kernel, padding, tile) if tile else _by_xla(x, kernel, padding)


def _forward(x, kernel, padding):
    return _with_fast_gradient(x, kernel, padding), (x, kernel)


def _backward(padding, saved, gradient):
    x, kernel = saved
    tile = winograd_tile(gradient, kernel, padding)
    if tile:
        by_x = _by_winograd(gradient, kernel, padding, tile, turned=True)
    else:
        _, pull = jax.vjp(lambda x: _by_xla(x, kernel, padding), x)
        (by_x,) = pull(gradient)
    return by_x, _kernel_gradient(x, gradient, kernel.shape, padding)


_with_fast_gradient.defvjp(_forward, _backward)


def _kernel_gradient(x, gradient, shape, padding):
    """Returns `dK[i, j] = sum over p of x[p + (i, j)] dy[p]`, for all taps in one matrix product.

    Copies of x shifted by columns lie beside each other, and copies of dy shifted by rows the other way: kh + kw
    copies in place of kh kw. XLA's own gradient takes 1.2 to 3 times as long.
    """
    size_h, size_w, channels, features = shape
    width = gradient.shape[2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    dy = jnp.pad(gradient, ((0, 0), (size_h - 1, size_h - 1), (0, 0), (0, 0)))
    left = jnp.concatenate([x[:, :, j : j + width] for j in range(size_w)], axis=-1)
    rows = x.shape[1]
    right = jnp.concatenate([dy[:, size_h - 1 - i : size_h - 1 - i + rows] for i in range(size_h)], axis=-1)
    # Without the barrier XLA computes the copies again inside the product.
    left, right = jax.lax.optimization_barrier((left, right))
    product = left.reshape(-1, size_w * channels).T @ right.reshape(-1, size_h * features)
    return product.reshape(size_w, channels, size_h, features).transpose(2, 0, 1, 3)


def _by_winograd(x, kernel, padding, m, *, turned=False):
    """Returns the 3x3 convolution of padding 1 by tiles of m x m.

    A tile and pair of channels needs (m + 2)^2 products instead of 9 m^2. turned: with the kernel turned around and its
    channels swapped, which gives the gradient by x of the convolution that is not turned.

    A transform goes along one axis of the tiles, then along the other. Its places are on the first axis of one array,
    so that there are few operations to compile. The barriers keep XLA from computing one result again in each operation
    that reads it.

    Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4. Against float64 the error
    is 7e-7 with m = 2, about that of XLA's convolution, and 2e-6 with m = 4.
    """
    batch, height, width, channels = x.shape
    alone = jax.lax.optimization_barrier
    of_tile, of_kernel, to_result = _toom_cook(_POINTS[m])
    size = m + 2
    if turned:
        of_kernel = of_kernel[:, ::-1]
    x, kernel = alone((jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel))
    rows = alone(jnp.stack([_sum(c, [x[:, i : i + height : m] for i in range(size)]) for c in of_tile]))
    parts = [_sum(c, [rows[:, :, :, j : j + width : m] for j in range(size)]) for c in of_tile]
    kernels = [jnp.asarray(np.kron(of_kernel, c), x.dtype) @ kernel.reshape(9, -1) for c in of_kernel]
    parts, kernels = alone((parts, kernels))

    def product(part, taps):
        taps = taps.reshape(size, *kernel.shape[2:])
        out = jnp.einsum("spd,scd->spc" if turned else "spc,scd->spd", part.reshape(size, -1, channels), taps)
        return out.reshape(size, batch, height // m, width // m, -1)

    products = alone([product(*pair) for pair in zip(parts, kernels, strict=True)])
    columns = alone([_sum(c, products) for c in to_result.T])
    return alone(interleave([[_sum(c, list(column)) for column in columns] for c in to_result.T]))


_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, 0.5, -2)}
"""Side of the tiles -> the points of the transform. Of those tried for 4 these are the most exact: the error is 2.4e-6,
with 2 in place of 1/2 it is 3.6e-6."""


@functools.cache
def _toom_cook(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the transforms of a tile `[s, s]`, a kernel `[s, 3]` and a result `[s, m]`, from n points and infinity.

    s = n + 1 and m = n - 1. Source: Lavin & Gray 2016, section 2: products of polynomials by their values at points.
    """
    size, m = len(points) + 1, len(points) - 1
    of_tile, of_kernel, to_result = np.zeros((size, size)), np.zeros((size, 3)), np.zeros((size, m))
    for i, point in enumerate(points):
        others = np.delete(points, i)
        of_tile[i, :-1] = np.poly(others)[::-1]
        of_kernel[i] = point ** np.arange(3) / np.prod(point - others)
        to_result[i] = point ** np.arange(m)
    of_tile[-1] = np.poly(points)[::-1]
    of_kernel[-1, -1] = to_result[-1, -1] = 1
    return of_tile, of_kernel, to_result


def _sum(coefficients, arrays):
    """Returns `sum_i c_i a_i`, without the terms of coefficient 0."""
    terms = [a if c == 1 else a * jnp.asarray(c, a.dtype) for c, a in zip(coefficients, arrays, strict=True) if c]
    return functools.reduce(jnp.add, terms)
