"""Attention on the GPU: cuDNN's fused kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sdjax.runtime.chips import compute_capability


def takes(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], causal: bool) -> bool:
    """Whether cuDNN can compute this attention and its gradient.

    cuDNN wants a GPU from Ampere on, so not a T4, half precision, and a head size D that is a multiple of 8 and at most
    128. (On newer GPUs, from Hopper on, it also takes up to 256.) `attend` pads odd lengths.
    """
    if (capability := compute_capability()) is not None and capability < (8, 0):
        return False
    half = q.dtype in (jnp.float16, jnp.bfloat16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128


def attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head.

    The backward pass of cuDNN refuses odd lengths, such as a context of 77 tokens. These get one more row, and cuDNN
    the true lengths.
    """
    batch, queries = q.shape[:2]
    queries_used = keys_used = None  # all
    if queries % 2 or k.shape[1] % 2:
        queries_used, keys_used = (jnp.full(batch, length, jnp.int32) for length in (queries, k.shape[1]))
        q, k, v = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=queries_used,
        key_value_seq_lengths=keys_used,
        implementation="cudnn",
    )
    return out[:, :queries]
