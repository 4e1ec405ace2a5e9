"""Attention on the TPU: the flash kernel that comes with JAX, written in Pallas."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def takes(q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], causal: bool) -> bool:
    """Whether the flash kernel computes this attention: without causal mask, S and T multiples of 512.

    The kernel works on blocks of 128 tokens. Shorter sequences have few blocks, and their scores need little memory.
    """
    return not causal and q.shape[1] % 512 == k.shape[1] % 512 == 0


def attend(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head. causal: always False, see `takes`."""
    from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

    size = q.shape[-1]
    pad = -size % 128  # the kernel works on whole lanes of 128; zeros change no score, and are cut off again
    q, k, v = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, pad))) for x in (q, k, v))
    return flash_attention(q, k, v, sm_scale=1 / math.sqrt(size))[..., :size].swapaxes(1, 2)
