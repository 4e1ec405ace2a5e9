"""Attention on the TPU: the flash kernel that comes with JAX, written in Pallas."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 512
"""Queries in a block; S and T are multiples of it. By the instructions that the compiler schedules for a v5e, 4096
queries and keys of 32 heads of 40 take 2.5 million cycles, and the backward pass 7.6. With JAX's own blocks of 128 they
take 14.4 and 30.6, while all else in that transformer of SD1.5's U-Net takes 1.1.
"""
HELD = 1 << 20
"""Bytes of keys, and of values, that a kernel holds in fast memory at once."""


def takes(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], causal: bool) -> bool:
    """Whether the flash kernel computes this attention: without causal mask, S and T multiples of 512.

    Shorter sequences have few blocks, and their scores need little memory.
    """
    return not causal and q.shape[1] % BLOCK == k.shape[1] % BLOCK == 0


def attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head. causal: always False, see `takes`."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

    size = q.shape[-1]
    pad = -size % 128 if size > 128 else 0  # larger heads must fill whole lanes; zeros change no score
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    held = HELD // (max(q.shape[-1], 128) * q.dtype.itemsize)
    few = min(BLOCK, held // 2)
    queries, keys = (x.shape[2] for x in (q, k))
    some = _largest(keys, min(held // 2, 1024), few)
    blocks = BlockSizes(
        block_b=1,
        block_q=few,
        block_k_major=_largest(keys, held, some),
        block_k=some,
        # The gradients by keys and values: the kernel holds some keys and reads all queries.
        block_q_major_dkv=_largest(queries, held // 2, few),
        block_q_dkv=few,
        block_k_major_dkv=some,
        block_k_dkv=some,
        # The gradient by queries. JAX copies a number of each query as often as there are keys in the block.
        block_q_dq=_largest(queries, max(held // 4, few), few),
        block_k_major_dq=few,
        block_k_dq=few,
    )
    out = flash_attention(q, k, v, sm_scale=1 / math.sqrt(size), block_sizes=blocks)
    return out[..., :size].swapaxes(1, 2)


def _largest(tokens: int, most: int, step: int) -> int:
    """Returns the largest multiple of `step` that divides `tokens` and is at most `most`."""
    return max(n for n in range(step, most + 1, step) if tokens % n == 0)
