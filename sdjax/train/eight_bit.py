"""Adam with moments of eight bits, a quarter of the memory (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
Quantization").

Each array is divided into blocks of up to 256 numbers along its last axis. A block has one scale, its largest absolute
value, so an outlier spoils only its own block. Between the scale and 0 the codes must be close together near 0, where
most of the numbers lie. The paper looks them up in a table. Here they are powers, which TPUs compute more easily:

    first moment     m = scale * sign(k) (|k| / 127)^2     k = -127 .. 127, rounded to the nearest
    second moment    v = scale * (k / 255)^4               k = 0 .. 255, rounded up

Rounded up, the second moment is never 0 where a gradient has been, so no step is divided by 0. A step is computed from
the moments before they are rounded. Arrays of less than 4096 numbers, and those that no block divides, stay float32.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
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
        return State(jnp.int32(0), _rounded(zeros(), signed=True), _rounded(zeros(), signed=False))

    def update(updates: PyTree, state: State, params: PyTree = None) -> tuple[PyTree, State]:
        count = optax.safe_increment(state.count)
        first, second = _wide(state.first), _wide(state.second)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g.astype(jnp.float32), first, updates)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g.astype(jnp.float32)), second, updates)
        bias1, bias2 = (1 - jnp.float32(b) ** count.astype(jnp.float32) for b in (b1, b2))
        direction = jax.tree.map(lambda m, v: (m / bias1) / (jnp.sqrt(v / bias2) + eps), first, second)
        return direction, State(count, _rounded(first, signed=True), _rounded(second, signed=False))

    return optax.GradientTransformation(init, update)


def block_of(shape: tuple[int, ...]) -> int | None:
    """Returns the numbers in a block of an array, the largest that divides its last axis; None: it stays float32."""
    if math.prod(shape) < SMALLEST_ARRAY:
        return None
    sizes = range(min(LARGEST_BLOCK, shape[-1]), SMALLEST_BLOCK - 1, -1)
    return next((block for block in sizes if shape[-1] % block == 0), None)


def encode(x: Float[Array, "*S D"], block: int, *, signed: bool) -> tuple[Array, Float[Array, "*S N"]]:
    """Returns the codes of a moment and the scales of its blocks. signed: whether it is the first moment."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    share = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    if signed:
        codes = jnp.rint(127 * jnp.sign(share) * jnp.sqrt(jnp.abs(share))).astype(jnp.int8)
    else:
        # Less a little, so that a number that was decoded is not rounded up to the next code.
        codes = jnp.ceil(255 * jnp.sqrt(jnp.sqrt(share)) - 1e-3).clip(0, 255).astype(jnp.uint8)
        codes = jnp.where((share > 0) & (codes == 0), jnp.uint8(1), codes)
    return codes.reshape(x.shape), scales


def decode(codes: Array, scales: Float[Array, "*S N"]) -> Float[Array, "*S D"]:
    """Returns the moment that codes stand for, float32."""
    blocks = codes.reshape(*scales.shape, -1).astype(jnp.float32)
    if codes.dtype == jnp.int8:
        share = jnp.sign(blocks) * jnp.square(blocks / 127)
    else:
        share = jnp.square(jnp.square(blocks / 255))
    return (share * scales[..., None]).reshape(codes.shape)


def _rounded(moment: PyTree, *, signed: bool) -> Rounded:
    leaves, structure = jax.tree.flatten(moment)
    blocks = [block_of(leaf.shape) for leaf in leaves]
    pairs = [
        encode(leaf, block, signed=signed) if block else (leaf, jnp.ones((), jnp.float32))
        for leaf, block in zip(leaves, blocks, strict=True)
    ]
    return Rounded(*(jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in range(2)))


def _wide(moment: Rounded) -> PyTree:
    return jax.tree.map(lambda codes, scales: decode(codes, scales) if scales.ndim else codes, *moment)
