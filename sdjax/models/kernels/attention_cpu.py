"""Attention: one function with the fast path of each platform, and the layers built on it."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.models.layers import Compute, Dense, GroupNorm

BLOCK = 1 << 21  # scores the CPU's path holds at a time: 8 MB


def attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    target: str,
    causal: bool = False,
) -> Float[Array, "B S N D"]:
    """Scaled dot-product attention `softmax(q k^T / sqrt(D)) v`, softmax in float32 (Vaswani et al. 2017, eq. 1).

    target: "cpu", "gpu" or "tpu". The fast path of each is taken where its rules allow, else XLA's own lowering:
    the CPU works through long query axes in chunks, recomputing the scores in the backward pass; the GPU uses cuDNN's
    fused kernel in half precision; the TPU uses the Pallas flash kernel on long sequences.
    """
    if target == "gpu" and _cudnn_takes(q, k):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    if target == "tpu" and _flash_takes(q, k, causal):
        return _flash_tpu(q, k, v)
    if target == "cpu":
        return _plain(q, k, v, causal) if causal else _on_cpu(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def _cudnn_takes(q, k) -> bool:
    """cuDNN's rules: half precision, head size a multiple of 8 and at most 128 (256 from Hopper on is not assumed).

    Its backward pass also refuses odd lengths, such as a context of 77 tokens, where there is little to gain anyway.
    """
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    return q.dtype in (jnp.float16, jnp.bfloat16) and even and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _flash_takes(q, k, causal) -> bool:
    """The Pallas kernel wants blocks of 128 on both sequence axes; short contexts are faster without it."""
    return not causal and q.shape[1] % 512 == 0 and k.shape[1] % 512 == 0


def _flash_tpu(q, k, v):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    size = q.shape[-1]
    pad = -size % 128  # the kernel works on whole lanes; zeros change no score and are cut off again
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    return flash_attention(q, k, v, sm_scale=1 / math.sqrt(size))[..., :size].swapaxes(1, 2)


def _plain(q, k, v, causal):
    """Everything at once, scores and all; for the text models' short sequences."""
    scores = jnp.einsum("bsnd,btnd->bnst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnst,btnd->bsnd", weights.astype(v.dtype), v)


# The CPU's path. XLA there writes out every score it is asked for, so they are asked for a block at a time, heads
# first, and again in the backward pass. Where one head's fill a block (`_by_rows`), their log-sum-exp is kept for that
# (Dao et al. 2022, algorithms 1 and 4, with whole rows instead of tiles). Else (`_by_heads`) the maximum is asked for
# again too: XLA makes product, maximum and exponential one operation, and where there is but one block it is the
# forward pass's. Products that sum over queries are formed as [D, T]: Eigen is four times faster at those than at
# [T, D].


def _on_cpu(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"]) -> Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype), k, v))
    heads, scores = q.shape[0] * q.shape[1], q.shape[2] * k.shape[2]
    if heads * scores <= 2 * BLOCK:
        return _by_heads(q, k, v).swapaxes(1, 2)
    flat = tuple(x.reshape(heads, *x.shape[2:]) for x in (q, k, v))
    if scores > BLOCK:
        out = _by_rows(*flat)
    else:
        some = max(n for n in range(1, BLOCK // scores + 1) if heads % n == 0)
        out = jax.lax.map(lambda qkv: _by_heads(*qkv), tuple(_split(x, some, axis=0) for x in flat))
    return out.reshape(q.shape).swapaxes(1, 2)


def _weights(q: Float[Array, "*G S D"], k: Float[Array, "*G T D"]):
    """Not divided by their total `[*G, S, T]`, that total and the largest score `[*G, S, 1]`."""
    scores = jnp.einsum("...sd,...td->...st", q, k, preferred_element_type=jnp.float32)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    return weights, jnp.sum(weights, axis=-1, keepdims=True), largest


def _weighted(weights: Float[Array, "*G S T"], total: Float[Array, "*G S 1"], v: Float[Array, "*G T D"]) -> Array:
    out = jnp.einsum("...st,...td->...sd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)


def _correction(out: Float[Array, "*G S D"], d_out: Float[Array, "*G S D"]) -> Float[Array, "*G S 1"]:
    return jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)


def _gradients(q, k, v, weights: Float[Array, "*G S T"], correction: Float[Array, "*G S 1"], d_out):
    """Of some queries `[*G, S, D]`, and what they add to those of k and v `[*G, D, T]`.

    weights: divided by their total, or else d_out is.
    """
    d_weights = jnp.einsum("...sd,...td->...st", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - correction)).astype(q.dtype)
    d_q = jnp.einsum("...st,...td->...sd", d_scores, k)
    d_k = jnp.einsum("...sd,...st->...dt", q, d_scores, preferred_element_type=jnp.float32)
    d_v = jnp.einsum("...sd,...st->...dt", d_out, weights.astype(q.dtype), preferred_element_type=jnp.float32)
    return d_q, d_k, d_v


def _transposed(d_k: Float[Array, "*G D T"], d_v: Float[Array, "*G D T"], dtype) -> tuple[Array, Array]:
    d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))  # else XLA turns the products back into [T, D] ones
    return d_k.swapaxes(-1, -2).astype(dtype), d_v.swapaxes(-1, -2).astype(dtype)


@jax.custom_vjp
def _by_heads(q: Float[Array, "*G S D"], k: Float[Array, "*G T D"], v: Float[Array, "*G T D"]) -> Array:
    """Attention of all heads at once."""
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
def _by_rows(q: Float[Array, "G S D"], k: Float[Array, "G T D"], v: Float[Array, "G T D"]) -> Float[Array, "G S D"]:
    """Attention, some queries of one head at a time."""
    return _by_rows_forward(q, k, v)[0]


def _by_rows_forward(q, k, v):
    chunk = _chunk(q.shape[1], k.shape[1])

    def rows(q, k, v):
        weights, total, largest = _weights(q, k)
        return _weighted(weights, total, v), largest + jnp.log(total)

    def head(qkv):
        q, k, v = qkv
        return tuple(_join(x, axis=1) for x in jax.lax.map(lambda q: rows(q, k, v), _split(q, chunk, axis=1)))

    out, log_total = (_join(x, axis=0) for x in jax.lax.map(head, tuple(_split(x, 1, axis=0) for x in (q, k, v))))
    return out, (q, k, v, out, log_total)


def _by_rows_backward(saved, d_out):
    chunk = _chunk(saved[0].shape[1], saved[1].shape[1])

    def head(arrays):
        q, k, v, out, log_total, d_out = arrays

        def rows(sums, row):
            q, log_total, correction, d_out = row
            scores = jnp.einsum("gsd,gtd->gst", q, k, preferred_element_type=jnp.float32)
            d_q, d_k, d_v = _gradients(q, k, v, jnp.exp(scores - log_total), correction, d_out)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
        chunks = tuple(_split(x, chunk, axis=1) for x in (q, log_total, _correction(out, d_out), d_out))
        (d_k, d_v), d_q = jax.lax.scan(rows, (zeros, zeros), chunks)
        return _join(d_q, axis=1), *_transposed(d_k, d_v, k.dtype)

    gradients = jax.lax.map(head, tuple(_split(x, 1, axis=0) for x in (*saved, d_out)))
    return tuple(_join(x, axis=0) for x in gradients)


_by_rows.defvjp(_by_rows_forward, _by_rows_backward)


def _chunk(queries: int, keys: int) -> int:
    """Queries of a head to take at a time: a divisor of them so that a block has at most BLOCK scores."""
    chunk = max(n for n in range(1, max(2, BLOCK // keys + 1)) if queries % n == 0)
    return chunk if chunk >= 32 else queries  # a prime number of queries is better taken whole


def _split(x: Array, size: int, *, axis: int) -> Array:
    """Pieces of `size` along an axis, stacked in front."""
    pieces = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(pieces, axis, 0)


def _join(pieces: Array, *, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(pieces, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


class Attention(nn.Module):
    """Multi-head attention of x `[B, S, C]` over a context `[B, T, D]` (itself when None), projections included."""

    heads: int
    compute: Compute
    bias: bool = False  # of to_q, to_k and to_v
    upcast: bool = False  # scores in float32 even when computing in half precision
    norm_groups: int | None = None  # normalise x by group first

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B T D"] | None = None) -> Array:
        width = x.shape[-1]
        if self.norm_groups is not None:
            x = GroupNorm(self.norm_groups, 1e-6, self.compute, name="group_norm")(x)
        context = x if context is None else context
        project = functools.partial(Dense, width, self.compute, use_bias=self.bias)
        q = project(name="to_q")(x)
        k = project(name="to_k")(context)
        v = project(name="to_v")(context)
        q, k, v = (y.reshape(*y.shape[:2], self.heads, -1) for y in (q, k, v))
        if self.upcast:
            q, k, v = (y.astype(jnp.float32) for y in (q, k, v))
        out = attention(q, k, v, target=self.compute.target).reshape(*x.shape[:2], width)
        return Dense(width, self.compute, name="to_out_0")(out)
