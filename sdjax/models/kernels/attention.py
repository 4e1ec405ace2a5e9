"""Attention: the definition, and the choice of a faster way to compute it.

Each faster way is a module with two functions. `takes(q, k, causal)` says whether it can compute an attention of these
shapes and dtypes; `attend(q, k, v, causal)` computes it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sdjax.models.kernels import attention_cpu, attention_gpu


def attention(
    q: Float[Array, "B S N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
    *,
    target: str,
    causal: bool = False,
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head, softmax in float32 (Vaswani et al. 2017, eq. 1).

    target: "cpu", "gpu" or "tpu". causal: whether query i sees the keys 0..i only, as in the text models.
    """
    # CPU: all attention but that of the text models, whose sequences are short. On 2 cores, 4096 queries and keys of 8
    # heads of 40 take 0.27 s and 27 MB, by the definition 1.3 s and 1.1 GB; with gradients 1.0 s and 56 MB, by the
    # definition 3.3 s and 2.2 GB. From 256 queries and keys down both take the same time.
    if target == "cpu" and attention_cpu.takes(q, k, causal):
        return attention_cpu.attend(q, k, v, causal)
    # GPU: whenever cuDNN can, because its kernel keeps no scores in memory. Never measured: sdjax has not run on a GPU.
    if target == "gpu" and attention_gpu.takes(q, k, causal):
        return attention_gpu.attend(q, k, v, causal)
    # TPU: long sequences, for the same reason. Never measured: sdjax has not run on a TPU. The compiler cannot divide a
    # kernel written in Pallas over a mesh, so each device computes its examples and heads.
    if target == "tpu":
        from sdjax.models.kernels import attention_tpu  # here, because Pallas takes 0.4 s to import

        if attention_tpu.takes(q, k, causal):
            return by_example(lambda q, k, v: attention_tpu.attend(q, k, v, causal), q, k, v)
    if target == "cpu":
        return definition(q, k, v, causal)
    # The same definition as JAX writes it, with the precisions that GPU and TPU need in half precision.
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def definition(
    q: Float[Array, "B S N D"], k: Float[Array, "B T N D"], v: Float[Array, "B T N D"], causal: bool
) -> Float[Array, "B S N D"]:
    """Returns `softmax(q k^T / sqrt(D)) v` for each head, with all scores in memory at once."""
    scores = jnp.einsum("bsnd,btnd->bnst", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bnst,btnd->bsnd", weights.astype(v.dtype), v)


def by_example(
    attend: Callable[[Array, Array, Array], Array],
    q: Float[Array, "B S N D"],
    k: Float[Array, "B T N D"],
    v: Float[Array, "B T N D"],
) -> Float[Array, "B S N D"]:
    """Returns `attend(q, k, v)`, computed on each device of the mesh for the examples and heads that are there.

    The mesh is the abstract mesh in use while the program is traced (see `train.parallel`). Without one, or under
    `pmap`, this is a plain call. The heads are split over its axis `tensor`, the examples over the others. An axis that
    the devices do not divide is computed whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind is AxisType.Auto)
    if math.prod(mesh.shape[name] for name in axes) == 1:
        return attend(q, k, v)

    def split(length: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
        return names if length % math.prod(mesh.shape[name] for name in names) == 0 else None

    examples = split(q.shape[0], tuple(name for name in axes if name != "tensor"))
    heads = split(q.shape[2], tuple(name for name in axes if name == "tensor"))
    each = P(examples, None, heads)
    return jax.shard_map(attend, mesh=mesh, in_specs=each, out_specs=each, check_vma=False)(q, k, v)
