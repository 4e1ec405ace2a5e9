"""Attention on the CPU, a block of scores at a time.

XLA's CPU backend writes every score to memory. So this module asks for the scores one block at a time, with the heads
as the first axis, and computes them again in the backward pass. A block holds the scores of some heads (`_by_heads`),
or of some queries of one head where one head has too many scores (`_by_queries`; Dao et al. 2022, algorithms 1 and 4,
with all keys of a query in one block).

- `_by_queries` keeps the log-sum-exp of each query's scores for the backward pass, so that one exponential gives the
  weights. `_by_heads` computes the largest score again: XLA makes one operation of product, maximum and exponential,
  and where there is only one block the forward pass has computed it already.
- Products that sum over queries are formed as [D, T], not [T, D], because Eigen is four times as fast at them.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 1 << 21
"""Scores in a block: 8 MB. The backward pass of 4096 queries and keys, 8 heads of 40, then takes 0.32 s, with 4 MB
0.35 s."""


def takes(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], causal: bool) -> bool:
    """Whether this module computes the attention: without causal mask."""
    return not causal


def attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head, softmax in float32. causal: always False, see `takes`."""
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype), k, v))
    heads, scores = q.shape[0] * q.shape[1], q.shape[2] * k.shape[2]
    if heads * scores <= 2 * BLOCK:
        return _by_heads(q, k, v).swapaxes(1, 2)
    flat = tuple(x.reshape(heads, *x.shape[2:]) for x in (q, k, v))
    if scores > BLOCK:
        out = _by_queries(*flat)
    else:
        count = max(n for n in range(1, BLOCK // scores + 1) if heads % n == 0)
        out = jax.lax.map(lambda qkv: _by_heads(*qkv), tuple(_split(x, count, axis=0) for x in flat))
    return out.reshape(q.shape).swapaxes(1, 2)


def _weights(q: Float[Array, "*G S D"], k: Float[Array, "*G T D"]):
    """Returns the weights before division by their total `[*G, S, T]`, the total and the largest score `[*G, S, 1]`."""
    scores = jnp.einsum("...sd,...td->...st", q, k, preferred_element_type=jnp.float32)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    return weights, jnp.sum(weights, axis=-1, keepdims=True), largest


def _weighted(weights: Float[Array, "*G S T"], total: Float[Array, "*G S 1"], v: Float[Array, "*G T D"]) -> Array:
    """Returns the mean of v by these weights, of the given total."""
    out = jnp.einsum("...st,...td->...sd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)


def _correction(out: Float[Array, "*G S D"], d_out: Float[Array, "*G S D"]) -> Float[Array, "*G S 1"]:
    """Returns the term of the softmax's gradient that all keys of a query share."""
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)


def _gradients(q, k, v, weights: Float[Array, "*G S T"], correction: Float[Array, "*G S 1"], d_out):
    """Returns the gradient by some queries `[*G, S, D]`, and what they add to the gradients by k and v `[*G, D, T]`.

    Either the weights or d_out are divided by the total of the weights.
    """
    d_weights = jnp.einsum("...sd,...td->...st", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - correction)).astype(q.dtype)
    d_q = jnp.einsum("...st,...td->...sd", d_scores, k)
    d_k = jnp.einsum("...sd,...st->...dt", q, d_scores, preferred_element_type=jnp.float32)
    d_v = jnp.einsum("...sd,...st->...dt", d_out, weights.astype(q.dtype), preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


def _transposed(d_k: Float[Array, "*G D T"], d_v: Float[Array, "*G D T"], dtype) -> tuple[Array, Array]:
    """Returns the gradients by k and v as [T, D]."""
    # Without the barrier XLA turns the products back into [T, D] ones.
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))
    return d_k.swapaxes(-1, -2).astype(dtype), d_v.swapaxes(-1, -2).astype(dtype)


@jax.custom_vjp
def _by_heads(q: Float[Array, "*G S D"], k: Float[Array, "*G T D"], v: Float[Array, "*G T D"]) -> Array:
    """Returns the attention of all the heads given, their scores at once."""
    return _by_heads_forward(q, k, v)[0]


def _by_heads_forward(q, k, v):
    weights, total, _ = _weights(q, k)
    out = _weighted(weights, total, v)
    return out, (q, k, v, out)


def _by_heads_backward(saved, d_out):
    q, k, v, out = saved
    weights, total, _ = _weights(q, k)
    d_out = (d_out.astype(jnp.float32) / total).astype(d_out.dtype)
    d_q, d_k, d_v = _gradients(q, k, v, weights, _correction(out, d_out), d_out)
    return d_q, *_transposed(d_k, d_v, k.dtype)


_by_heads.defvjp(_by_heads_forward, _by_heads_backward)


@jax.custom_vjp
def _by_queries(q: Float[Array, "G S D"], k: Float[Array, "G T D"], v: Float[Array, "G T D"]) -> Float[Array, "G S D"]:
    """Returns the attention of each head, the scores of some of its queries at a time."""
    return _by_queries_forward(q, k, v)[0]


def _by_queries_forward(q, k, v):
    count = _queries_in_block(q.shape[1], k.shape[1])

    def block(q, k, v):
        weights, total, largest = _weights(q, k)
        return _weighted(weights, total, v), largest + jnp.log(total)

    def head(qkv):
        q, k, v = qkv
        return tuple(_join(x, axis=1) for x in jax.lax.map(lambda q: block(q, k, v), _split(q, count, axis=1)))

    out, log_total = (_join(x, axis=0) for x in jax.lax.map(head, tuple(_split(x, 1, axis=0) for x in (q, k, v))))
    return out, (q, k, v, out, log_total)


def _by_queries_backward(saved, d_out):
    count = _queries_in_block(saved[0].shape[1], saved[1].shape[1])

    def head(arrays):
        q, k, v, out, log_total, d_out = arrays

        def block(sums, queries):
            q, log_total, correction, d_out = queries
            scores = jnp.einsum("gsd,gtd->gst", q, k, preferred_element_type=jnp.float32)
            d_q, d_k, d_v = _gradients(q, k, v, jnp.exp(scores - log_total), correction, d_out)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
        blocks = tuple(_split(x, count, axis=1) for x in (q, log_total, _correction(out, d_out), d_out))
        (d_k, d_v), d_q = jax.lax.scan(block, (zeros, zeros), blocks)
        return _join(d_q, axis=1), *_transposed(d_k, d_v, k.dtype)

    gradients = jax.lax.map(head, tuple(_split(x, 1, axis=0) for x in (*saved, d_out)))
    return tuple(_join(x, axis=0) for x in gradients)


_by_queries.defvjp(_by_queries_forward, _by_queries_backward)


def _queries_in_block(queries: int, keys: int) -> int:
    """The number of queries of one head in a block: a divisor of all of them, so that a block has at most BLOCK scores.

    Where the largest such divisor is below 32, as for a prime number of queries, all queries form one block.
    """
    count = max(n for n in range(1, max(2, BLOCK // keys + 1)) if queries % n == 0)
    return count if count >= 32 else queries


def _split(x: Array, size: int, *, axis: int) -> Array:
    """Returns pieces of `size` along an axis, stacked along a new first axis."""
    pieces = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(pieces, axis, 0)


def _join(pieces: Array, *, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(pieces, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
