"""Convolution, NHWC, by the fastest of several ways that give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "kh kw C D"], stride: int, padding: Padding, target: str
) -> Float[Array, "B h w D"]:
    """2-D cross-correlation. padding: ((top, bottom), (left, right)). target: "cpu", "gpu" or "tpu"."""
    height, width, channels, features = kernel.shape
    if height == width == stride == 1 and padding == ((0, 0), (0, 0)):
        return x @ kernel[0, 0]
    if target == "cpu" and stride == 1 and x.dtype == kernel.dtype:
        product = _weights_dominate(x, kernel) and not _winograd_pays(x, kernel, padding)
        return (_as_product if product else _with_fast_gradient)(x, kernel, padding)
    return _plain(x, kernel, padding, stride)


def _plain(x, kernel, padding, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _with_fast_gradient(x, kernel, padding):
    """A convolution of stride 1. XLA takes 1.2 to 3 times as long for the gradient of its kernel on the CPU."""
    return (_winograd if _winograd_pays(x, kernel, padding) else _plain)(x, kernel, padding)


def _forward(x, kernel, padding):
    return _with_fast_gradient(x, kernel, padding), (x, kernel)


def _backward(padding, saved, gradient):
    x, kernel = saved
    if _winograd_pays(gradient, kernel, padding):
        by_x = _winograd(gradient, kernel, padding, turned=True)
    else:
        _, pull = jax.vjp(lambda x: _plain(x, kernel, padding), x)
        (by_x,) = pull(gradient)
    return by_x, _kernel_gradient(x, gradient, kernel.shape, padding)


_with_fast_gradient.defvjp(_forward, _backward)


def _winograd_pays(x, kernel, padding) -> bool:
    """Pixels and channels enough that the products outweigh the sums around them, and not too many pixels.

    Few pixels: the kernel is transformed anew at every call. Few channels: each product has as many sums. Many pixels:
    what they take is four times x and four times the result.
    """
    batch, height, width, channels = x.shape
    fits = kernel.shape[:2] == (3, 3) and padding == ((1, 1), (1, 1)) and height % 2 == width % 2 == 0
    pixels, fewest = batch * height * width, min(channels, kernel.shape[3])
    large = pixels >= (256 if fewest >= 256 else 2048) and fewest >= 64 and pixels * channels < 1 << 24
    return fits and large and x.dtype == jnp.float32


def _winograd(x, kernel, padding, *, turned=False):
    """3x3 convolution of padding 1 by tiles of m x m: (m + 2)^2 products a tile and pair of channels instead of 9 m^2.

    turned: with the kernel turned around and its channels changed over, which is the gradient by x of the plain one.

    A transform goes along one axis of the tiles, then along the other, and keeps the places on the first axis in one
    array: few operations to compile. The barriers keep XLA from computing the same again inside whatever reads it.

    Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4. Against float64 the error
    with m = 2 (7e-7) is about that of a plain convolution, with m = 4 it is 2e-6.
    """
    batch, height, width, channels = x.shape
    alone = jax.lax.optimization_barrier
    of_tile, of_kernel, to_result = _toom_cook(_POINTS[_tile(x)])
    size, m = to_result.shape
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
    return alone(_interleave([[_sum(c, list(column)) for column in columns] for c in to_result.T]))


_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, 0.5, -2)}
"""Of those tried for m = 4 the most exact: 2.4e-6, with 2 for 1/2 it is 3.6e-6."""


def _tile(x) -> int:
    """m. Many pixels pay for the larger tile's kernels, which are 4 times the kernel and not 1.8."""
    batch, height, width, _ = x.shape
    return 4 if height % 4 == width % 4 == 0 and batch * height * width >= 1024 else 2


@functools.cache
def _toom_cook(points: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The transforms of a tile `[s, s]`, a kernel `[s, 3]` and a result `[s, m]`, from n points and infinity.

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
    """`sum_i c_i a_i`, without those of coefficient 0."""
    terms = [a if c == 1 else a * jnp.asarray(c, a.dtype) for c, a in zip(coefficients, arrays, strict=True) if c]
    return functools.reduce(jnp.add, terms)


def _kernel_gradient(x, gradient, shape, padding):
    """`dK[i, j] = sum_p x[p + (i, j)] dy[p]` for all taps as one matrix product.

    The columns' shifts are laid out beside each other in x, the rows' (the other way) in dy: kh + kw copies, not kh kw.
    """
    size_h, size_w, channels, features = shape
    width = gradient.shape[2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    dy = jnp.pad(gradient, ((0, 0), (size_h - 1, size_h - 1), (0, 0), (0, 0)))
    left = jnp.concatenate([x[:, :, j : j + width] for j in range(size_w)], axis=-1)
    rows = x.shape[1]
    right = jnp.concatenate([dy[:, size_h - 1 - i : size_h - 1 - i + rows] for i in range(size_h)], axis=-1)
    # Otherwise XLA computes the copies again inside the product.
    left, right = jax.lax.optimization_barrier((left, right))
    product = left.reshape(-1, size_w * channels).T @ right.reshape(-1, size_h * features)
    return product.reshape(size_w, channels, size_h, features).transpose(2, 0, 1, 3)


def _weights_dominate(x, kernel) -> bool:
    """Small maps of many channels, where XLA's CPU convolution spends its time repacking the kernel."""
    batch, height, width, channels = x.shape
    return batch * height * width <= 512 and channels * kernel.shape[3] >= 1 << 18


def _as_product(x, kernel, padding):
    """One matrix product of the pixels' neighbourhoods with the kernel (im2col): 2 to 6 times as fast there."""
    size_h, size_w, channels, features = kernel.shape
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = padded.shape[1] - size_h + 1, padded.shape[2] - size_w + 1
    shifted = [padded[:, i : i + height, j : j + width] for i in range(size_h) for j in range(size_w)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, size_h * size_w * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(x.shape[0], height, width, features)


def upsample_nearest(x: Float[Array, "B H W C"], height: int, width: int) -> Float[Array, "B h w C"]:
    """Nearest-neighbour enlargement, PyTorch's rule `source = floor(i * in / out)`."""
    batch, h, w, channels = x.shape
    if (height, width) == (2 * h, 2 * w):
        return _interleave([[x, x], [x, x]])
    rows = jnp.arange(height) * h // height
    columns = jnp.arange(width) * w // width
    return x[:, rows][:, :, columns]


def upsampled_convolution(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"], target: str
) -> Float[Array, "B 2*H 2*W D"]:
    """3x3 convolution of x enlarged twice, without enlarging it: each of the four output phases sees only 2x2 inputs.

    The kernel's taps that fall on one input are added up first: 4 / 9 of the multiplications.
    """
    first, middle, last = kernel[0], kernel[1], kernel[2]
    by_row = (jnp.stack([first, middle + last]), jnp.stack([first + middle, last]))
    pads = ((1, 0), (0, 1))

    def phase(i, j):
        rows = by_row[i]
        left, centre, right = rows[:, 0], rows[:, 1], rows[:, 2]
        taps = [left, centre + right] if j == 0 else [left + centre, right]
        return convolution(x, jnp.stack(taps, axis=1), 1, (pads[i], pads[j]), target)

    return _interleave([[phase(i, j) for j in range(2)] for i in range(2)])


def _interleave(phases: list[list[Array]]) -> Array:
    """n x n phases `[B, H, W, C]` -> `[B, nH, nW, C]`."""
    batch, height, width, channels = phases[0][0].shape
    n = len(phases)
    rows = [jnp.stack(row, axis=3).reshape(batch, height, n * width, channels) for row in phases]
    return jnp.stack(rows, axis=2).reshape(batch, n * height, n * width, channels)
