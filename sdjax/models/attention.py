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
        return _plain(q, k, v, causal) if causal else _blockwise(q, k, v)
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
# first, and computed again in the backward pass from the log-sum-exp of each row (Dao et al. 2022, algorithms 1
# and 4, with whole rows instead of tiles). Products that sum over queries are formed as [D, T]: Eigen is four times
# faster at those than at [T, D].


@jax.custom_vjp
def _blockwise(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"]) -> Array:
    return _blockwise_forward(q, k, v)[0]


def _blockwise_forward(q, k, v):
    batch = q.shape[0]
    q, k, v = _by_head(q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)), _by_head(k), _by_head(v)
    heads, chunk = _blocks(q, k)

    def rows(q, k, v):
        scores = jnp.einsum("gsd,gtd->gst", q, k, preferred_element_type=jnp.float32)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("gst,gtd->gsd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (out / total).astype(v.dtype), largest + jnp.log(total)

    def some_heads(q, k, v):
        out = _map(lambda q: rows(q, k, v), _split(q, chunk, axis=1))
        return tuple(_join(x, axis=1) for x in out)

    out, log_total = _map(some_heads, *(_split(x, heads, axis=0) for x in (q, k, v)))
    out, log_total = _join(out, axis=0), _join(log_total, axis=0)
    return _from_heads(out, batch), (q, k, v, out, log_total)


def _blockwise_backward(saved, d_out):
    q, k, v, out, log_total = saved
    batch = d_out.shape[0]
    d_out = _by_head(d_out)
    heads, chunk = _blocks(q, k)

    def some_heads(q, k, v, out, log_total, d_out):
        correction = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)

        def rows(sums, row):
            q, log_total, correction, d_out = row
            scores = jnp.einsum("gsd,gtd->gst", q, k, preferred_element_type=jnp.float32)
            weights = jnp.exp(scores - log_total)
            d_weights = jnp.einsum("gsd,gtd->gst", d_out, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - correction)).astype(q.dtype)
            d_q = jnp.einsum("gst,gtd->gsd", d_scores, k)
            d_k = jnp.einsum("gsd,gst->gdt", q, d_scores, preferred_element_type=jnp.float32)
            d_v = jnp.einsum("gsd,gst->gdt", d_out, weights.astype(q.dtype), preferred_element_type=jnp.float32)
            return (sums[0] + d_k, sums[1] + d_v), d_q

        zeros = jnp.zeros((k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
        chunks = tuple(_split(x, chunk, axis=1) for x in (q, log_total, correction, d_out))
        (d_k, d_v), d_q = jax.lax.scan(rows, (zeros, zeros), chunks)
        d_k, d_v = jax.lax.optimization_barrier((d_k, d_v))  # else XLA turns the products back into [T, D] ones
        return _join(d_q, axis=1), d_k.swapaxes(1, 2).astype(k.dtype), d_v.swapaxes(1, 2).astype(v.dtype)

    gradients = _map(some_heads, *(_split(x, heads, axis=0) for x in (q, k, v, out, log_total, d_out)))
    d_q, d_k, d_v = (_from_heads(_join(x, axis=0), batch) for x in gradients)
    return d_q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype), d_k, d_v


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _blocks(q, k) -> tuple[int, int]:
    """Heads and queries to take at a time: all, or divisors of them so that a block has at most BLOCK scores."""
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if heads * queries * keys <= 2 * BLOCK:
        return heads, queries  # no loop: its overhead is more than what smaller blocks gain
    if queries * keys <= BLOCK:
        return max(n for n in range(1, heads + 1) if heads % n == 0 and n * queries * keys <= BLOCK), queries
    chunk = max(n for n in range(1, max(2, BLOCK // keys + 1)) if queries % n == 0)
    return 1, chunk if chunk >= 32 else queries  # a prime number of queries is better taken whole


def _by_head(x: Float[Array, "B S N D"]) -> Float[Array, "BN S D"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _from_heads(x: Float[Array, "BN S D"], batch: int) -> Float[Array, "B S N D"]:
    return x.reshape(batch, -1, *x.shape[1:]).swapaxes(1, 2)


def _split(x: Array, size: int, *, axis: int) -> Array:
    """Pieces of `size` along an axis, stacked in front."""
    pieces = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(pieces, axis, 0)


def _join(pieces: Array, *, axis: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(pieces, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _map(function, *stacked: Array):
    """`lax.map`, without a loop for a single piece."""
    if stacked[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*(x[0] for x in stacked)))
    return jax.lax.map(lambda pieces: function(*pieces), stacked)


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
