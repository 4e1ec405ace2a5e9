"""Group and layer normalisation with statistics in float32, and backward passes written by hand.

The backward passes that autodiff makes take three to six times as long on the CPU, because they reduce one large fused
expression several times. They also keep more than the input.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: Float[Array, "B ... C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    groups: int,
    epsilon: float,
    silu: bool,
    target: str,
) -> Float[Array, "B ... C"]:
    """Returns x normalised over space and each group of channels (Wu and He 2018), then SiLU if `silu`; float32."""
    return _group_norm_forward(x, scale, bias, groups, epsilon, silu, target)[0]


def _group_norm_forward(x, scale, bias, groups, epsilon, silu, target):
    flat = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    space = flat.shape[1]
    mean = _group_mean(jnp.sum(flat, axis=1), groups, space)
    if _in_one_pass(x, target):
        variance = _group_mean(jnp.sum(jnp.square(flat), axis=1), groups, space) - jnp.square(mean)
        variance = jnp.maximum(variance, 0)
    else:
        variance = _group_mean(jnp.sum(jnp.square(flat - mean), axis=1), groups, space)
    rstd = jax.lax.rsqrt(variance + epsilon)
    gain = rstd * scale.astype(jnp.float32)
    y = flat * gain + (bias.astype(jnp.float32) - mean * gain)
    return (jax.nn.silu(y) if silu else y).reshape(x.shape), (x, scale, bias, mean, rstd)


def _group_norm_backward(groups, epsilon, silu, target, saved, d_out):
    x, scale, bias, mean, rstd = saved
    gain = scale.astype(jnp.float32)
    normed = (x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1]) - mean) * rstd
    d_y = d_out.astype(jnp.float32).reshape(normed.shape)
    if silu:
        y = normed * gain + bias.astype(jnp.float32)
        gate = jax.nn.sigmoid(y)
        d_y = d_y * gate * (1 + y * (1 - gate))
    d_bias, d_scale = _sum_over_space(d_y, target), _sum_over_space(d_y * normed, target)
    space = normed.shape[1]
    d_x = rstd * (
        d_y * gain - _group_mean(d_bias * gain, groups, space) - normed * _group_mean(d_scale * gain, groups, space)
    )
    d_scale, d_bias = jnp.sum(d_scale, axis=0), jnp.sum(d_bias, axis=0)
    return d_x.reshape(x.shape).astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _in_one_pass(x: Array, target: str) -> bool:
    """Whether the variance is formed as the mean square less the square of the mean: for half precision on a TPU.

    The compiler sums both while it computes x, so that statistics cost nothing in many places. Cancellation loses
    `mean^2 / variance` units in the last place of float32. Rounding x to half precision has changed the variance more.
    """
    return target == "tpu" and x.dtype.itemsize == 2


def _group_mean(sums: Float[Array, "B C"], groups: int, space: int) -> Float[Array, "B 1 C"]:
    """Returns the mean of each channel's group, from the sum of each channel over space."""
    batch, channels = sums.shape
    size = channels // groups
    means = jnp.sum(sums.reshape(batch, groups, size), axis=-1) / (size * space)
    return jnp.broadcast_to(means[:, :, None], (batch, groups, size)).reshape(batch, 1, channels)


def _sum_over_space(x: Float[Array, "B S C"], target: str) -> Float[Array, "B C"]:
    if target != "cpu":
        return jnp.sum(x, axis=1)
    # A product with ones uses all cores. XLA's sum over rows of a fused expression runs on one, column by column.
    return jnp.einsum("bs,bsc->bc", jnp.ones(x.shape[:2], x.dtype), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float, target: str
) -> Float[Array, "... D"]:
    """Returns x normalised over the last axis (Ba et al. 2016); float32."""
    return _layer_norm_forward(x, scale, bias, epsilon, target)[0]


def _layer_norm_forward(x, scale, bias, epsilon, target):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    if _in_one_pass(x, target):
        variance = jnp.maximum(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(variance + epsilon)
    y = (wide - mean) * rstd * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return y, (x, scale, bias, mean, rstd)


def _layer_norm_backward(epsilon, target, saved, d_out):
    x, scale, bias, mean, rstd = saved
    gain = scale.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * rstd
    d_y = d_out.astype(jnp.float32)
    d_normed = d_y * gain

    def row_mean(y):
        if target != "cpu":
            return jnp.mean(y, axis=-1, keepdims=True)
        return (y @ jnp.ones((y.shape[-1],), y.dtype))[..., None] / y.shape[-1]

    d_x = rstd * (d_normed - row_mean(d_normed) - normed * row_mean(d_normed * normed))
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = jnp.sum(d_y * normed, axis=rows), jnp.sum(d_y, axis=rows)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
