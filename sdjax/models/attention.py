"""Attention: one function with the fast path of each platform, and the layers built on it."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.models.layers import Compute, Dense, GroupNorm

CHUNK = 256  # queries at a time on the CPU, where XLA would write out the whole score matrix


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
        return _heads_first(q, k, v, causal)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def _cudnn_takes(q, k) -> bool:
    """cuDNN's rules: half precision, head size a multiple of 8 and at most 128 (256 from Hopper on is not assumed)."""
    return q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def _flash_takes(q, k, causal) -> bool:
    """The Pallas kernel wants blocks of 128 on both sequence axes; short contexts are faster without it."""
    return not causal and q.shape[1] % 512 == 0 and k.shape[1] % 512 == 0


def _flash_tpu(q, k, v):
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    size = q.shape[-1]
    pad = -size % 128  # the kernel works on whole lanes; zeros change no score and are cut off again
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    return flash_attention(q, k, v, sm_scale=1 / math.sqrt(size))[..., :size].swapaxes(1, 2)


def _heads_first(q, k, v, causal):
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    queries, keys = q.shape[2], k.shape[2]
    if causal:
        mask = jnp.tril(jnp.ones((queries, keys), bool))
        out = _softmax_average(q, k, v, mask)
    elif queries * keys <= 1 << 20 or queries % CHUNK:
        out = _softmax_average(q, k, v)
    else:
        chunks = jnp.moveaxis(q.reshape(*q.shape[:2], -1, CHUNK, q.shape[3]), 2, 0)
        out = jax.lax.map(jax.checkpoint(lambda chunk: _softmax_average(chunk, k, v)), chunks)
        out = jnp.moveaxis(out, 0, 2).reshape(q.shape)
    return out.swapaxes(1, 2)


def _softmax_average(q, k, v, mask=None):
    scores = jnp.einsum("bnsd,bntd->bnst", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnst,bntd->bnsd", weights.astype(v.dtype), v)


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
