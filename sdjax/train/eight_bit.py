"""Adam with moments of eight bits, a quarter of the memory (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization").

Each array is divided into blocks of up to 256 numbers along its last axis. A block has one scale, its largest absolute
value, so an outlier spoils only its own block. Between the scale and 0 the codes must be close together near 0, where
most of the numbers lie. The paper looks them up in a table. Here they are powers, which TPUs compute more easily:

    first moment     m = scale * sign(k) (|k| / 127)^2     k = -127 .. 127
    second moment    v = scale * (k / 255)^4               k = 0 .. 255

A step changes the second moment by less than the distance of two codes, so rounding to the nearest would undo each
change. Rounding is stochastic instead: up or down with the probability that makes the code right on average. What
decides is a hash of the gradient, the step and the place, so a run can be repeated. The second moment is never rounded
to 0 where it is not, or a step would be divided by 0. A step is computed from the moments before they are rounded.
Arrays of less than 4096 numbers, and those that no block divides, stay float32.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 64
SMALLEST_ARRAY = 4096
"""Numbers below which an array stays float32."""


class Rounded(NamedTuple):
    """A moment of every array."""

    codes: PyTree
    """Tree of the codes, int8 or uint8 and in the shape of the array; or the moment itself, float32."""
    scales: PyTree
    """Tree of the scales [..., blocks] of the codes; 1 [] for a moment that is not rounded."""


class State(NamedTuple):
    """The state of the optimizer."""

    count: Int[Array, ""]
    first: Rounded
    second: Rounded


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam's direction (Kingma and Ba 2015, algorithm 1), with both moments in eight bits between the steps."""

    def init(params: PyTree) -> State:
        # Zeros of their own for each moment: a training step donates its state, and no buffer can be donated twice.
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        return State(jnp.int32(0), _rounded(zeros(), zeros(), signed=True), _rounded(zeros(), zeros(), signed=False))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, State]:
        count = cast(Array, optax.safe_increment(state.count))
        updates = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, _wide(state.first), updates)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), _wide(state.second), updates)
        bias1, bias2 = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (b1, b2))
        direction = jax.tree.map(lambda m, v: (m / bias1) / (jnp.sqrt(v / bias2) + eps), first, second)
        chances = jax.tree.map(functools.partial(chance, count), updates)
        return direction, State(count, _rounded(first, chances, signed=True), _rounded(second, chances, signed=False))

    return optax.GradientTransformation(init, update)


def chance(count: Int[Array, ""], gradient: Float[Array, "*S"]) -> Float[Array, "*S"]:
    """Returns a number in [0, 1) for each place of an array: a hash of the gradient there, the step and the place."""
    bits = jax.lax.bitcast_convert_type(gradient, jnp.uint32) ^ (count.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    for axis in range(gradient.ndim):
        bits = bits ^ (jax.lax.broadcasted_iota(jnp.uint32, gradient.shape, axis) * np.uint32(_PRIMES[axis % 4]))
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D)  # the finalizer "lowbias32" of Wellons' survey
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B)
    return ((bits ^ (bits >> np.uint32(16))) >> np.uint32(8)).astype(jnp.float32) / np.float32(2**24)


_PRIMES = (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)


def block_of(shape: tuple[int, ...]) -> int | None:
    """Returns the numbers in a block of an array, the largest that divides its last axis; None: it stays float32."""
    if math.prod(shape) < SMALLEST_ARRAY:
        return None
    sizes = range(min(LARGEST_BLOCK, shape[-1]), SMALLEST_BLOCK - 1, -1)
    return next((block for block in sizes if shape[-1] % block == 0), None)


def encode(
    x: Float[Array, "*S D"], chance: Float[Array, "*S D"], block: int, *, signed: bool
) -> tuple[Array, Float[Array, "*S N"]]:
    """Returns the codes of a moment and the scales of its blocks. signed: whether it is the first moment.

    chance: in [0, 1) and evenly distributed. A code of a number between the codes k and k + 1 is rounded up if its
    chance is less than its distance from k.
    """
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = (blocks / jnp.where(scales > 0, scales, 1.0)[..., None]).reshape(x.shape)
    # Of the two codes around a number the one above is right in this share of the cases, if the mean is to be right.
    power, most = (2, 127) if signed else (4, 255)
    size = jnp.abs(share)
    low = jnp.floor(most * size ** (1 / power))
    below, above = (low / most) ** power, ((low + 1) / most) ** power
    code = low + (chance * (above - below) < size - below).astype(jnp.float32)
    code = jnp.minimum(code, most)
    if signed:
        return (jnp.sign(share) * code).astype(jnp.int8), scales
    return jnp.where(size > 0, jnp.maximum(code, 1.0), 0.0).astype(jnp.uint8), scales


def decode(codes: Array, scales: Float[Array, "*S N"]) -> Float[Array, "*S D"]:
    """Returns the moment that codes stand for, float32."""
    blocks = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    if codes.dtype == jnp.int8:
        share = jnp.sign(blocks) * jnp.square(blocks / 127)
    else:
        share = jnp.square(jnp.square(blocks / 255))
    return (share * scales[..., None]).reshape(codes.shape)


def _rounded(moment: PyTree, chances: PyTree, *, signed: bool) -> Rounded:
    leaves, structure = jax.tree.flatten(moment)
    pairs = [
        encode(leaf, chance, block, signed=signed) if block else (leaf, jnp.ones((), jnp.float32))
        for leaf, chance in zip(leaves, jax.tree.leaves(chances), strict=True)
        for block in [block_of(leaf.shape)]
    ]
    return Rounded(*(jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in range(2)))


def _wide(moment: Rounded) -> PyTree:
    return jax.tree.map(lambda codes, scales: decode(codes, scales) if scales.ndim else codes, *moment)
