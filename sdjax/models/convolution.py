"""Convolution, NHWC, by the fastest of several ways that give the same numbers."""

import functools

import jax
import jax.numpy as jnp
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
        return (_as_product if _weights_dominate(x, kernel) else _with_fast_gradient)(x, kernel, padding)
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
    """Channels enough that the products outweigh the sums around them, and neither too few tiles nor too many.

    Few: the kernel is transformed anew at every call. Many: what they take is four times x and four times the result.
    """
    batch, height, width, channels = x.shape
    fits = kernel.shape[:2] == (3, 3) and padding == ((1, 1), (1, 1)) and height % 2 == width % 2 == 0
    pixels = batch * height * width
    large = min(channels, kernel.shape[3]) >= 256 and pixels >= 1024 and pixels * channels < 1 << 24
    return fits and large and x.dtype == jnp.float32


def _winograd(x, kernel, padding, *, turned=False):
    """3x3 convolution of padding 1 in tiles of 2x2: 16 products a tile and pair of channels instead of 36.

    turned: with the kernel turned around and its channels changed over, which is the gradient by x of the plain one.

    Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1, F(2x2, 3x3). Against
    float64 its error (7e-7) is about that of a plain convolution.
    """

    def of_kernel(taps):
        outer, middle = 0.5 * (taps[0] + taps[2]), 0.5 * taps[1]
        return [taps[0], outer + middle, outer - middle, taps[2]]

    def of_tile(pixels):
        a, b, c, d = pixels
        return [a - c, b + c, c - b, b - d]

    def to_result(products):
        a, b, c, d = products
        return [a + b + c, b - c - d]

    batch, height, width, channels = x.shape
    tiles = (batch, height // 2, width // 2, -1)
    x, kernel = jax.lax.optimization_barrier((jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel))
    rows = of_tile([x[:, i : i + height : 2] for i in range(4)])
    parts = [of_tile([row[:, :, j : j + width : 2] for j in range(4)]) for row in rows]
    kernels = [of_kernel(row) for row in of_kernel(kernel[::-1, ::-1] if turned else kernel)]
    parts, kernels = jax.lax.optimization_barrier((parts, kernels))  # or XLA computes them again inside the products

    def product(part, kernel):
        return (part.reshape(-1, channels) @ (kernel.T if turned else kernel)).reshape(tiles)

    products = [list(map(product, *pair)) for pair in zip(parts, kernels, strict=True)]
    products = jax.lax.optimization_barrier(products)
    columns = [to_result(row) for row in products]
    left, right = (to_result(column) for column in zip(*columns, strict=True))
    return jax.lax.optimization_barrier(_interleave([[left[i], right[i]] for i in range(2)]))


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
    """Four `[B, H, W, C]` phases -> `[B, 2H, 2W, C]`."""
    batch, height, width, channels = phases[0][0].shape
    rows = [jnp.stack(row, axis=3).reshape(batch, height, 2 * width, channels) for row in phases]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)
