"""The layers that the U-Net, the autoencoder and the text models are made of.

`Dense` and `Conv` look for their LoRA adapter in the Flax collection `lora`, at the path of their parameters in the
collection `params`, and let `lora.adapted` add it. No other code of a forward pass knows of adapters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax import lora, quantization
from sdjax.models.kernels.attention import attention
from sdjax.models.kernels.convolution import Padding, convolution
from sdjax.models.kernels.norms import group_norm, layer_norm
from sdjax.models.kernels.upsampling import upsample_nearest
from sdjax.models.split import is_stored_in_parts, whole
from sdjax.settings import RematPolicy


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes. Every layer gets this record.

    dtype: of activations and matrix products. Norm statistics and softmax stay in float32.
    platform: "cpu", "gpu" or "tpu", for which `models.kernels` chooses the fastest way; None: JAX's default backend.
    remat: what the backward pass computes again, in place of keeping its activations. None: nothing.
    """

    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    platform: str | None = None
    remat: RematPolicy | None = None

    @property
    def target(self) -> str:
        """The platform: "cpu", "gpu", "tpu", or the name of another backend of JAX."""
        backend = self.platform or jax.default_backend()
        return "gpu" if backend in ("cuda", "rocm") else backend


ModuleT = TypeVar("ModuleT", bound=type[nn.Module])


def remat(module: ModuleT, compute: Compute, *policies: RematPolicy, static: tuple[int, ...] = ()) -> ModuleT:
    """Returns the module, computed again in the backward pass if one of these policies is in use.

    static: places of arguments of its call that are no arrays, counted from `self`.
    """
    return nn.remat(module, static_argnums=static) if compute.remat in policies else module


def variables(params: Any, *, lora: Any = None, rows: Any = None) -> dict[str, Any]:
    """Returns the Flax variable collections that a model is applied with.

    params: the weights. lora: an adapter tree. rows: the vectors [K, D] of new words, for a text model.
    """
    collections = {"params": params}
    if lora is not None:
        collections["lora"] = lora
    if rows is not None:
        collections["placeholder"] = {"embeddings": {"token_embedding": {"rows": rows}}}
    return collections


def parameter(module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]) -> Array:
    """Returns a parameter of a module that is being applied, or makes it while the module is initialised.

    `Module.param` traces the initializer each time the module is applied, to compare shapes. That made the tracing of
    a U-Net 40 % longer. Shapes are compared once, when weights are loaded (`formats.parameter_names.load_params`).
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, initializer, shape)


def _kernel(module: nn.Module, shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns the kernel of a layer, with its steps if it is in int8."""
    layer = {"kernel": parameter(module, "kernel", nn.initializers.lecun_normal(), shape)}
    if module.has_variable("params", quantization.STEP):
        layer[quantization.STEP] = module.get_variable("params", quantization.STEP)
    return layer


def _adapter(module: nn.Module) -> Any:
    """Returns the LoRA adapter of a layer, or an empty dict."""
    return jax.tree.map(whole, module.variables.get("lora", {}))


def _applied(apply: Callable[[Array, Array], Array], x: Array, kernel: dict[str, Array], dtype: Any) -> Array:
    """Returns `apply(x, W)` with the weights W of a kernel, see `quantization.applied`.

    Weights that are stored in parts are put together in the number type of the computation, and in the backward pass
    again: kept from the forward pass, those of all layers would lie whole on each device.
    """

    def gathered(x: Array, kernel: dict[str, Array]) -> Array:
        narrow = kernel if quantization.STEP in kernel else {"kernel": kernel["kernel"].astype(dtype)}
        return quantization.applied(apply, x, {name: whole(leaf) for name, leaf in narrow.items()}, dtype)

    if is_stored_in_parts():
        return jax.checkpoint(gathered)(x, kernel)
    return quantization.applied(apply, x, kernel, dtype)


class Dense(nn.Module):
    """Linear layer, `[..., in] -> [..., features]`, with its LoRA adapter."""

    features: int
    compute: Compute
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B ... C"], parts: int = 1) -> Any:
        """Returns `[..., features]`; or, if parts > 1, a list of so many arrays, which are computed one by one."""
        dtype = self.compute.dtype
        kernel = _kernel(self, (x.shape[-1], self.features))
        bias = whole(parameter(self, "bias", nn.initializers.zeros, (self.features,))) if self.use_bias else None
        x = x.astype(dtype)

        def layer(kernel, bias, adapter):
            y = _applied(jnp.matmul, x, kernel, dtype)
            y = lora.adapted(adapter, x, y, quantization.weights(kernel))
            return y if bias is None else y + bias.astype(dtype)

        adapter = _adapter(self)
        if parts == 1:
            return layer(kernel, bias, adapter)

        cut = lambda leaf: jnp.split(leaf, parts, axis=-1)
        kernels = [dict(zip(kernel, pieces, strict=True)) for pieces in zip(*map(cut, kernel.values()), strict=True)]
        biases = [None] * parts if bias is None else cut(bias)
        adapters = lora.outputs(adapter, parts) if adapter else [adapter] * parts
        return list(map(layer, kernels, biases, adapters))


class Conv(nn.Module):
    """2-D convolution, NHWC, with its LoRA adapter."""

    features: int
    compute: Compute
    size: int = 3
    stride: int = 1
    padding: Padding | None = None  # ((top, bottom), (left, right)); None: size // 2 on every side

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], half: Float[Array, "B H//2 W//2 C"] | None = None
    ) -> Float[Array, "B h w D"]:
        """half: x before `upsample_nearest` doubled its sides, if it did."""
        dtype = self.compute.dtype
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = _kernel(self, shape)
        bias = whole(parameter(self, "bias", nn.initializers.zeros, (self.features,)))
        margin = (self.size // 2, self.size // 2)
        padding = self.padding or (margin, margin)
        x = x.astype(dtype)

        def convolve(x, kernel, half=None):
            return convolution(x, kernel.astype(dtype), self.stride, padding, self.compute.target, half)

        y = _applied(functools.partial(convolve, half=half), x, kernel, dtype)
        y = lora.adapted(_adapter(self), x, y, quantization.weights(kernel), convolve)
        return y + bias.astype(dtype)


class GroupNorm(nn.Module):
    """Group normalisation over `[B, H, W, C]` (Wu and He 2018) with statistics in float32, then SiLU if `silu`."""

    groups: int
    epsilon: float
    compute: Compute
    silu: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        scale = whole(parameter(self, "scale", nn.initializers.ones, (x.shape[-1],)))
        bias = whole(parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)))
        y = group_norm(x, scale, bias, self.groups, self.epsilon, self.silu, self.compute.target)
        return jnp.asarray(y, self.compute.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016) with statistics in float32."""

    compute: Compute
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        scale = whole(parameter(self, "scale", nn.initializers.ones, (x.shape[-1],)))
        bias = whole(parameter(self, "bias", nn.initializers.zeros, (x.shape[-1],)))
        y = layer_norm(x, scale, bias, self.epsilon, self.compute.target)
        return jnp.asarray(y, self.compute.dtype)


class Embed(nn.Module):
    """The rows of a table `[V, D]` at integer ids.

    Ids from V on stand for the rows of new words, `[K, D]`, or `[B, K, D]` with other rows for each example. These rows
    are in the collection `placeholder`, not in the table. So training them does not change the table, and needs no
    gradient by it.
    """

    rows: int
    width: int
    compute: Compute

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        table = parameter(self, "embedding", nn.initializers.normal(0.02), (self.rows, self.width))
        vectors = jnp.take(table, ids, axis=0, mode="clip").astype(self.compute.dtype)
        if not self.has_variable("placeholder", "rows"):
            return vectors
        rows = self.get_variable("placeholder", "rows")
        places = jnp.maximum(ids - self.rows, 0)
        if rows.ndim == 3:
            new = jnp.take_along_axis(rows, places[..., None], axis=1, mode="clip")
        else:
            new = jnp.take(rows, places, axis=0, mode="clip")
        return jnp.where((ids >= self.rows)[..., None], new.astype(self.compute.dtype), vectors)


def timestep_embedding(
    timesteps: Float[Array, " B"], width: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "B D"]:
    """Returns sinusoidal embeddings of timesteps or numbers between them (Ho et al. 2020; Vaswani et al. 2017, 3.5)."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    embedding = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width % 2)))


ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    # By erf, as in PyTorch. JAX's gelu computes erfc, which takes twice as long on the CPU.
    "gelu": lambda x: x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class ResnetBlock(nn.Module):
    """Two convolutions with a residual connection; the time embedding is added between the two."""

    features: int
    groups: int
    epsilon: float
    compute: Compute
    act_fn: str = "silu"
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], time: Float[Array, "B D"] | None = None) -> Array:
        act = ACTIVATIONS[self.act_fn]
        fused = self.act_fn in ("silu", "swish")

        def normalised(x, name):
            y = GroupNorm(self.groups, self.epsilon, self.compute, silu=fused, name=name)(x)
            return y if fused else act(y)

        h = Conv(self.features, self.compute, name="conv1")(normalised(x, "norm1"))
        if time is not None:
            h = h + Dense(self.features, self.compute, name="time_emb_proj")(act(time))[:, None, None, :]
        h = Conv(self.features, self.compute, name="conv2")(normalised(h, "norm2"))
        if x.shape[-1] != self.features:
            x = Conv(self.features, self.compute, size=1, name="conv_shortcut")(x)
        h = x + h
        return h if self.scale == 1.0 else h / jnp.asarray(self.scale, h.dtype)


class Resample(nn.Module):
    """A convolution that changes the size of a map: of stride 2 on the way down, of the enlarged map on the way up."""

    compute: Compute
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], size: tuple[int, int] | None = None) -> Array:
        """size: height and width to which x is enlarged before the convolution."""
        conv = Conv(x.shape[-1], self.compute, stride=self.stride, padding=self.padding, name="conv")
        if size is None:
            return conv(x)
        doubled = size == (2 * x.shape[1], 2 * x.shape[2])
        return conv(upsample_nearest(x, *size), x if doubled else None)


class Attention(nn.Module):
    """Multi-head attention of x over a context, or over x itself, with projections of the inputs and the result."""

    heads: int
    compute: Compute
    bias: bool = False  # of to_q, to_k and to_v
    upcast: bool = False  # whether q, k and v are turned to float32 first
    norm_groups: int | None = None  # groups of a normalisation of x; None: no normalisation

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
