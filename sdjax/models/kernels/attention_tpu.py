"""Attention on the TPU: one kernel written in Pallas for the result, and one for all gradients.

Both compute flash attention (Dao et al. 2022, algorithms 1 and 4) of one head at a time, and hold its keys and values
in fast memory. In memory a head is [D, S]:

- XLA's projections write [D, S] as cheaply as [S, D], where a row of D = 40 numbers fills 128 lanes.
- Scores are [T, S]. What the softmax keeps of each query is then a row [1, S], and a sum over keys adds registers.
- In `v^T p^T` and in three products of the gradients the matrix unit passes over D rows, otherwise over 128 or more.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

BLOCK = 512
"""Queries in a step of a kernel. S and T are multiples of it."""
KEYS = 256
"""Keys in a block of scores. By the instructions that the compiler schedules for a v5e, 4096 queries and keys of 32
heads of 40 take 1.7 million cycles, and the gradients 3.1. JAX's flash attention takes 2.5 and 7.7. Around it XLA takes
4.4 more in that transformer of SD1.5's U-Net: for [S, D], and because JAX copies each number of a query to 128 lanes.
"""
HELD = 9 << 20
"""Bytes that a kernel holds of keys, values and their gradients. Programs may use 16 MB of fast memory."""
OVER_QUERIES = (((1,), (1,)), ((), ()))
"""The product of [D, S] and [T, S]."""


def takes(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], causal: bool) -> bool:
    """Whether the kernels compute this attention: without causal mask, S and T multiples of 512, D of 8.

    Shorter sequences have few blocks, and their scores need little memory.
    """
    return not causal and q.shape[1] % BLOCK == k.shape[1] % BLOCK == q.shape[3] % 8 == 0


def attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head, softmax in float32. causal: always False, see `takes`."""
    q, k, v = (x.transpose(0, 2, 3, 1) for x in (q, k, v))
    return _attend(q, k, v).transpose(0, 3, 1, 2)


@jax.custom_vjp
def _attend(q: Float[Array, "B N D S"], k: Float[Array, "B N D T"], v: Float[Array, "B N D T"]) -> Array:
    """Returns the attention as [B, N, D, S]."""
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    size, each = q.shape[2], q.dtype.itemsize
    block = _queries(size * each)
    held = _held(k.shape[3], 2 * 2 * size * each + _lanes(size) * each)  # two of each, to read ahead; keys as [T, D]
    by_query = lambda rows: pl.BlockSpec((None, None, rows, block), lambda b, n, i, j: (b, n, 0, i))
    by_key = pl.BlockSpec((None, None, size, held), lambda b, n, i, j: (b, n, 0, j))
    numbers = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
    rows = (1, 1, size, KEYS, KEYS)
    out, log_total = pl.pallas_call(
        functools.partial(_forward_kernel, scale=_scale(size)),
        grid=(*q.shape[:2], q.shape[3] // block, k.shape[3] // held),
        in_specs=[by_query(size), by_key, by_key],
        out_specs=[by_query(size), by_query(1)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), numbers],
        scratch_shapes=[pltpu.VMEM((held, size), k.dtype), *(pltpu.VMEM((n, block), jnp.float32) for n in rows)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        name="attention",
    )(q, k, v)
    return out, (q, k, v, out, log_total)


def _forward_kernel(q, k, v, out, log_total, keys, largest, total, sums, even, odd, *, scale: float):
    """Adds the held keys to the result of some queries.

    The matrix unit computes the scores of a block (`even` or `odd`) while the block before goes through the softmax.
    """
    step, part, last = pl.program_id(2), pl.program_id(3), pl.num_programs(3) - 1

    @pl.when((step == 0) | (last > 0))
    def _():
        keys[...] = k[...].T

    @pl.when(part == 0)
    def _():
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...], sums[...] = jnp.zeros_like(total), jnp.zeros_like(sums)

    def score(block, scores):
        scores[...] = jnp.dot(keys[_at(block), :], q[...], preferred_element_type=jnp.float32)
        return jnp.max(scores[...], axis=0, keepdims=True)

    def add(block, scores, highest, state):
        before, total, sums = state
        largest = jnp.maximum(before, highest)
        weights = jnp.exp2((scores[...] - largest) * scale)
        fade = jnp.exp2((before - largest) * scale)
        total = fade * total + jnp.sum(weights, axis=0, keepdims=True)
        sums = fade * sums + jnp.dot(v[:, _at(block)], weights.astype(v.dtype), preferred_element_type=jnp.float32)
        return largest, total, sums

    blocks = keys.shape[0] // KEYS
    unroll = _unroll(blocks)

    def add_some(first, carry, ahead=unroll):
        highest, state = carry
        for i in range(unroll):
            here, there = (even, odd) if i % 2 == 0 else (odd, even)
            following = score(first + i + 1, there) if i < ahead else highest
            highest, state = following, add(first + i, here, highest, state)
        return highest, state

    carry = score(0, even), (largest[...], total[...], sums[...])
    if blocks > unroll:
        carry = jax.lax.fori_loop(0, blocks // unroll - 1, lambda i, carry: add_some(i * unroll, carry), carry)
    state = add_some(blocks - unroll, carry, ahead=unroll - 1)[1]
    largest[...], total[...], sums[...] = state

    @pl.when(part == last)
    def _():
        out[...] = (sums[...] / total[...]).astype(out.dtype)
        log_total[...] = largest[...] * scale + jnp.log2(total[...])


def _backward(saved, d_out):
    q, k, v, out, log_total = saved
    size, each = q.shape[2], q.dtype.itemsize
    block = _queries(size * each)
    held = _held(k.shape[3], 2 * 4 * size * each + 2 * _lanes(size) * each + 2 * size * 4)
    parts = k.shape[3] // held
    by_query = lambda rows: pl.BlockSpec((None, None, rows, block), lambda b, n, j, i: (b, n, 0, i))
    by_key = pl.BlockSpec((None, None, size, held), lambda b, n, j, i: (b, n, 0, j))
    by_part = pl.BlockSpec((None, None, None, size, block), lambda b, n, j, i: (j, b, n, 0, i))
    part = jax.ShapeDtypeStruct((parts, *q.shape), q.dtype if parts == 1 else jnp.float32)
    d_q, d_k, d_v = pl.pallas_call(
        functools.partial(_backward_kernel, scale=_scale(size)),
        grid=(*q.shape[:2], parts, q.shape[3] // block),
        in_specs=[by_query(size), by_key, by_key, by_query(size), by_query(1), by_query(size)],
        out_specs=[by_part, by_key, by_key],
        out_shape=[part, jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch_shapes=[
            *(pltpu.VMEM((held, size), k.dtype) for _ in range(2)),
            *(pltpu.VMEM((size, held), jnp.float32) for _ in range(2)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        name="attention_gradients",
    )(q, k, v, out, log_total, d_out)
    return d_q.sum(0).astype(q.dtype), d_k, d_v


_attend.defvjp(_forward, _backward)


def _backward_kernel(q, k, v, out, log_total, d_out, d_q, d_k, d_v, keys, values, k_sums, v_sums, *, scale: float):
    """Adds some queries to the gradients by the held keys and values, and gives what these add to that by queries."""
    step, last = pl.program_id(3), pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        keys[...], values[...] = k[...].T, v[...].T
        k_sums[...], v_sums[...] = jnp.zeros_like(k_sums), jnp.zeros_like(v_sums)

    # The term of the softmax's gradient that all keys of a query share.
    shared = jnp.sum(out[...].astype(jnp.float32) * d_out[...].astype(jnp.float32), axis=0, keepdims=True)
    product = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    over_queries = functools.partial(
        jax.lax.dot_general, dimension_numbers=OVER_QUERIES, preferred_element_type=jnp.float32
    )

    def add(block, sums):
        at = _at(block)
        weights = jnp.exp2(product(keys[at, :], q[...]) * scale - log_total[...])
        d_weights = product(values[at, :], d_out[...])
        d_scores = (weights * (d_weights - shared)).astype(q.dtype)
        # In this order: with the other, the gradients take 3.5 million cycles in place of 3.1.
        v_sums[:, at] += over_queries(d_out[...], weights.astype(q.dtype))
        k_sums[:, at] += over_queries(q[...], d_scores)
        return sums + product(k[:, at], d_scores)

    blocks = keys.shape[0] // KEYS
    unroll = _unroll(blocks)

    def add_some(i, sums):
        for j in range(unroll):
            sums = add(i * unroll + j, sums)
        return sums

    sums = jax.lax.fori_loop(0, blocks // unroll, add_some, jnp.zeros(q.shape, jnp.float32))
    factor = scale * math.log(2)
    d_q[...] = (sums * factor).astype(d_q.dtype)

    @pl.when(step == last)
    def _():
        d_k[...] = (k_sums[...] * factor).astype(d_k.dtype)
        d_v[...] = v_sums[...].astype(d_v.dtype)


def _at(block):
    """Returns the place of a block of keys."""
    return pl.ds(pl.multiple_of(block * KEYS, KEYS), KEYS)


def _scale(size: int) -> float:
    """Returns the factor of the scores of heads of this size, for weights that are powers of 2."""
    return math.log2(math.e) / math.sqrt(size)


def _lanes(size: int) -> int:
    """Returns how many lanes are filled by `size` numbers."""
    return -(-size // 128) * 128


def _queries(each: int) -> int:
    """Returns how many queries, of so many bytes each, a step of a kernel takes."""
    return BLOCK if each <= 1024 else BLOCK // 2


def _held(tokens: int, each: int) -> int:
    """Returns how many keys, of so many bytes each, a kernel holds: a divisor of `tokens`."""
    step = BLOCK if BLOCK * each <= HELD else KEYS
    return max(n for n in range(step, max(step, HELD // each) + 1, step) if tokens % n == 0)


def _unroll(blocks: int) -> int:
    """Returns how many blocks of keys an iteration takes: an even number or all. More would be much code."""
    return 4 if blocks % 4 == 0 else 2 if blocks % 2 == 0 else blocks
