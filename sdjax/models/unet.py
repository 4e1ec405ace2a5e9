"""The conditional U-Net of Stable Diffusion 1.x, 2.x and SDXL (Rombach et al. 2022; Podell et al. 2023), NHWC."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.errors import ConfigError
from sdjax.models.layers import (
    ACTIVATIONS,
    Attention,
    Compute,
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    Resample,
    ResnetBlock,
    remat,
    timestep_embedding,
)
from sdjax.models.split import is_split_over

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type -> has attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: None}

FIXED = {
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "mid_block_only_cross_attention": None,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "attention_type": "default",
    "dropout": 0.0,
}
"""Option of a U-Net's config.json -> the only value that sdjax computes. No Stable Diffusion has another value.

`resnet_out_scale_factor` is not among them: for the blocks of Stable Diffusion, diffusers ignores it too."""


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The options of a U-Net's `config.json`. Those that may differ between blocks have one value for each block."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers: tuple[int, ...] = (1, 1, 1, 1)  # of the down blocks
    up_transformer_layers: tuple[int, ...] = (1, 1, 1, 1)  # of the up blocks, in the order of the up blocks
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: tuple[int, ...] = (768, 768, 768, 768)
    only_cross_attention: tuple[bool, ...] = (False, False, False, False)
    sample_size: int = 64
    use_linear_projection: bool = False
    upcast_attention: bool = False
    norm_num_groups: int | None = 32
    norm_eps: float = 1e-5
    act_fn: str = "silu"
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    center_input_sample: bool = False
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None  # distilled guidance (LCM)
    addition_embed_type: str | None = None  # "text_time" for SDXL
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "UNetConfig":
        """Reads a diffusers `config.json`. Raises ConfigError for an option that sdjax does not compute.

        `attention_head_dim` is the number of heads, despite its name, unless `num_attention_heads` is given.
        """
        for name, only in FIXED.items():
            if config.get(name, only) != only:
                raise ConfigError(f"U-Net config: {name} = {config[name]!r} is not supported; only {only!r} is")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise ConfigError(
                f"U-Net config: addition_embed_type = {config['addition_embed_type']!r}; choices: null, text_time"
            )
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for block in config.get(name, ()):
                if block not in known:
                    raise ConfigError(f"U-Net config: unknown block {block!r} in {name}; choices: {', '.join(known)}")
        if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") not in MID_BLOCKS:
            raise ConfigError(
                f"U-Net config: mid_block_type = {config['mid_block_type']!r}; choices: {list(MID_BLOCKS)}"
            )
        if config.get("act_fn", "silu") not in ACTIVATIONS:
            raise ConfigError(f"U-Net config: act_fn = {config['act_fn']!r}; choices: {', '.join(ACTIVATIONS)}")
        channels = tuple(config.get("block_out_channels", cls.block_out_channels))
        blocks = len(channels)

        def per_block(value):
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * blocks
            if len(values) != blocks:
                raise ConfigError(f"U-Net config: {value!r} has {len(values)} entries for {blocks} blocks")
            return values

        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        depth = config.get("transformer_layers_per_block", 1)
        nested = [d for d in (depth if isinstance(depth, (list, tuple)) else [depth]) if isinstance(d, (list, tuple))]
        if nested:
            raise ConfigError("U-Net config: transformer_layers_per_block with a list inside the list is not supported")
        others = {field.name for field in dataclasses.fields(cls)} & set(config)
        others -= {"block_out_channels", "down_block_types", "up_block_types", "layers_per_block"}
        others -= {"cross_attention_dim", "only_cross_attention"}
        return cls(
            block_out_channels=channels,
            down_block_types=per_block(config.get("down_block_types", cls.down_block_types)),
            up_block_types=per_block(config.get("up_block_types", cls.up_block_types)),
            layers_per_block=per_block(config.get("layers_per_block", 2)),
            transformer_layers=per_block(depth),
            up_transformer_layers=per_block(depth)[::-1],
            heads=per_block(heads),
            cross_attention_dim=per_block(config.get("cross_attention_dim", 1280)),
            only_cross_attention=per_block(config.get("only_cross_attention", False)),
            **{name: config[name] for name in others},
        )


class GEGLU(nn.Module):
    """`a * gelu(b)`, where a and b are the halves of one projection (Shazeer 2020)."""

    features: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:
        @jax.checkpoint  # quick to compute again, and four times as wide as the other activations to keep
        def gated(*projected):
            value, gate = projected if len(projected) == 2 else jnp.split(projected[0], 2, axis=-1)
            return value * ACTIVATIONS["gelu"](gate)

        project = Dense(2 * self.features, self.compute, name="proj")
        # Over the axis tensor of a mesh, a device computes the same places of both halves. It does not need the other
        # places, which a device would have to send if one array with both halves were split.
        return gated(*project(x, parts=2)) if is_split_over("tensor") else gated(project(x))


class FeedForward(nn.Module):
    """Two linear layers with GEGLU between them; the hidden layer is four times as wide as x."""

    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"]) -> Array:
        hidden = GEGLU(4 * x.shape[-1], self.compute, name="net_0")(x)
        return Dense(x.shape[-1], self.compute, name="net_2")(hidden)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention over the context and feed-forward layer, each after a norm and with a residual.

    only_cross_attention: the first attention is over the context too.
    """

    heads: int
    only_cross_attention: bool
    upcast: bool
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S C"], context: Float[Array, "B T D"]) -> Array:
        module = remat(Attention, self.compute, "attention")
        attend = lambda name: module(self.heads, self.compute, upcast=self.upcast, name=name)
        norm = lambda name: LayerNorm(self.compute, name=name)
        x = x + attend("attn1")(norm("norm1")(x), context if self.only_cross_attention else None)
        x = x + attend("attn2")(norm("norm2")(x), context)
        return x + FeedForward(self.compute, name="ff")(norm("norm3")(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, between two projections."""

    config: UNetConfig
    heads: int
    depth: int
    only_cross_attention: bool
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B T D"]) -> Array:
        channels = x.shape[-1]
        if self.config.use_linear_projection:
            project = lambda name: Dense(channels, self.compute, name=name)
        else:
            project = lambda name: Conv(channels, self.compute, size=1, name=name)
        h = project("proj_in")(GroupNorm(self.config.norm_num_groups or 32, 1e-6, self.compute, name="norm")(x))
        h = h.reshape(x.shape[0], -1, channels)
        block = remat(TransformerBlock, self.compute, "blocks", "levels")
        for i in range(self.depth):
            h = block(
                self.heads,
                self.only_cross_attention,
                self.config.upcast_attention,
                self.compute,
                name=f"transformer_blocks_{i}",
            )(h, context)
        return x + project("proj_out")(h.reshape(x.shape))


def low_frequencies(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the part of feature maps with the frequencies 0 and -1 of both axes, float32.

    It is the real part of the inverse Fourier transform of these four coefficients, which FreeU scales.
    """

    def waves(size):
        angle = 2 * np.pi * np.subtract.outer(np.arange(size), np.arange(size)) / size
        second = np.cos(angle) * (size > 1)  # of size 1, the frequency -1 is 0 again
        return (1 + second) / size, np.sin(angle) / size

    def along(rows, columns):
        rows, columns = jnp.asarray(rows, jnp.float32), jnp.asarray(columns, jnp.float32)
        return jnp.einsum("hi,wj,bijc->bhwc", rows, columns, x.astype(jnp.float32), precision="highest")

    (cosines, sines), (cosines_across, sines_across) = waves(x.shape[1]), waves(x.shape[2])
    return along(cosines, cosines_across) - along(sines, sines_across)


def free(x: Array, skip: Array, backbone: Float[Array, " B"], scale: Float[Array, " B"]) -> tuple[Array, Array]:
    """FreeU: Si et al. 2023, "FreeU: Free Lunch in Diffusion U-Net", with the constant backbone factor of its code.

    Multiplies the first half of the channels of x by `backbone`, and the low frequencies of skip by `scale`.
    """
    spread = lambda factor: factor[:, None, None, None]
    half = jnp.arange(x.shape[-1]) < x.shape[-1] // 2
    lower = spread(scale - 1) * low_frequencies(skip)
    return jnp.where(half, spread(backbone).astype(x.dtype) * x, x), (skip + lower).astype(skip.dtype)


class Stack(nn.Module):
    """One level of the U-Net: residual blocks, each followed by a transformer if `attends`.

    On the way up, each residual block also takes one feature map of the way down, from the end of `skips`.
    size: height and width of the result of a level that enlarges. freeu: the factors of `free`.
    Returns the last feature map, and all that the level on the way up takes.
    """

    config: UNetConfig
    features: int
    layers: int
    attends: bool
    heads: int
    depth: int
    only_cross_attention: bool
    compute: Compute
    downsample: bool = False
    upsample: bool = False

    @nn.compact
    def __call__(self, x, time, context, skips: tuple = (), size: tuple[int, int] | None = None, freeu=None):
        config = self.config
        resnet = remat(ResnetBlock, self.compute, "blocks", "levels")
        outputs = []
        for i in range(self.layers):
            if skips:
                skip = skips[-1 - i]
                if freeu is not None:
                    x, skip = free(x, skip, *freeu)
                x = jnp.concatenate([x, skip], axis=-1)
            x = resnet(
                self.features,
                config.norm_num_groups or 32,
                config.norm_eps,
                self.compute,
                config.act_fn,
                name=f"resnets_{i}",
            )(x, time)
            if self.attends:
                x = SpatialTransformer(
                    config, self.heads, self.depth, self.only_cross_attention, self.compute, name=f"attentions_{i}"
                )(x, context)
            outputs.append(x)
        if self.downsample:
            pad = (config.downsample_padding, config.downsample_padding)
            x = Resample(self.compute, 2, (pad, pad), name="downsamplers_0")(x)
            outputs.append(x)
        if self.upsample:
            x = Resample(self.compute, name="upsamplers_0")(x, size)
        return x, tuple(outputs)


class MidBlock(nn.Module):
    """Residual block, transformer, residual block at the smallest size; without `attends` only the first."""

    config: UNetConfig
    attends: bool
    compute: Compute

    @nn.compact
    def __call__(self, x, time, context):
        config = self.config
        resnet = lambda name: ResnetBlock(
            config.block_out_channels[-1],
            config.norm_num_groups or min(config.block_out_channels[-1] // 4, 32),
            config.norm_eps,
            self.compute,
            config.act_fn,
            config.mid_block_scale_factor,
            name=name,
        )
        x = resnet("resnets_0")(x, time)
        if self.attends:
            x = SpatialTransformer(
                config, config.heads[-1], config.transformer_layers[-1], False, self.compute, name="attentions_0"
            )(x, context)
            x = resnet("resnets_1")(x, time)
        return x


class TimestepMLP(nn.Module):
    """Two linear layers with an activation between them, for the embeddings of time and of added conditions."""

    features: int
    compute: Compute
    condition_width: int | None = None
    act_fn: str = "silu"

    @nn.compact
    def __call__(self, x: Float[Array, "B D"], condition: Array | None = None) -> Array:
        if self.condition_width is not None and condition is not None:
            x = x + Dense(x.shape[-1], self.compute, use_bias=False, name="cond_proj")(condition)
        x = ACTIVATIONS[self.act_fn](Dense(self.features, self.compute, name="linear_1")(x))
        return Dense(self.features, self.compute, name="linear_2")(x)


class UNet(nn.Module):
    """Predicts the noise, the velocity or the latents from noised latents, see `diffusion.NoiseSchedule`."""

    config: UNetConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B T D"],
        added: Mapping[str, Array] | None = None,
    ) -> Float[Array, "B h w D"]:
        """Returns the prediction.

        latents: of unit variance, noised. timesteps: those of the noise schedule, or numbers between them. context: of
        the prompts. added: for SDXL `text_embeds` [B, D] and `time_ids` [B, 6] (original size, crop and target size in
        pixels); `timestep_cond` [B, D] for models that are distilled with the guidance as an input (LCM); `freeu`
        [B, 4], the factors b1, b2, s1 and s2 of FreeU, for its two smallest levels.
        """
        config, compute = self.config, self.compute
        added = added or {}
        channels = config.block_out_channels
        x = latents.astype(compute.dtype)
        context = context.astype(compute.dtype)
        if config.center_input_sample:
            x = 2 * x - 1

        def sinusoid(t, width):
            return timestep_embedding(
                t, width, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
            ).astype(compute.dtype)

        width = config.time_embedding_dim or 4 * channels[0]
        mlp = TimestepMLP(width, compute, config.time_cond_proj_dim, config.act_fn, name="time_embedding")
        time = mlp(sinusoid(timesteps, channels[0]), added.get("timestep_cond"))
        if config.addition_embed_type == "text_time":
            ids = sinusoid(added["time_ids"].reshape(-1), config.addition_time_embed_dim).reshape(x.shape[0], -1)
            embeds = jnp.concatenate([added["text_embeds"].astype(compute.dtype), ids], axis=-1)
            time = time + TimestepMLP(width, compute, name="add_embedding")(embeds)

        x = Conv(channels[0], compute, size=config.conv_in_kernel, name="conv_in")(x)
        skips = (x,)
        last = len(channels) - 1
        level = remat(Stack, compute, "levels", static=(5,))  # 5: size
        for i, kind in enumerate(config.down_block_types):
            x, outputs = level(
                config,
                channels[i],
                config.layers_per_block[i],
                DOWN_BLOCKS[kind],
                config.heads[i],
                config.transformer_layers[i],
                config.only_cross_attention[i],
                compute,
                downsample=i < last,
                name=f"down_blocks_{i}",
            )(x, time, context, (), None)
            skips += outputs

        if config.mid_block_type is not None:
            attends = MID_BLOCKS[config.mid_block_type]
            x = MidBlock(config, attends, compute, name="mid_block")(x, time, context)

        for i, kind in enumerate(config.up_block_types):
            j = last - i  # the level on the way down at the same size
            layers = config.layers_per_block[j] + 1
            taken, skips = skips[-layers:], skips[:-layers]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None  # twice the size, or one less if odd
            freeu = (added["freeu"][:, i], added["freeu"][:, 2 + i]) if "freeu" in added and i < 2 else None
            x, _ = level(
                config,
                channels[j],
                layers,
                UP_BLOCKS[kind],
                config.heads[j],
                config.up_transformer_layers[i],
                config.only_cross_attention[j],
                compute,
                upsample=i < last,
                name=f"up_blocks_{i}",
            )(x, time, context, taken, size, freeu)

        if config.norm_num_groups is not None:
            x = GroupNorm(
                config.norm_num_groups, config.norm_eps, compute, silu=config.act_fn == "silu", name="conv_norm_out"
            )(x)
            if config.act_fn != "silu":
                x = ACTIVATIONS[config.act_fn](x)
        return Conv(config.out_channels, compute, size=config.conv_out_kernel, name="conv_out")(x)


def abstract_inputs(config: UNetConfig, batch: int = 1, size: int | None = None, tokens: int = 77) -> tuple:
    """Returns the shapes and dtypes of a U-Net's inputs: latents, timesteps, context, added."""
    size = size or config.sample_size
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    added = {}
    if config.addition_embed_type == "text_time":
        width, time = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        assert width and time, "text_time configs have both"
        embeds = width - 6 * time
        added = {"text_embeds": f32(batch, embeds), "time_ids": f32(batch, 6)}
    if config.time_cond_proj_dim:
        added["timestep_cond"] = f32(batch, config.time_cond_proj_dim)
    context = f32(batch, tokens, config.cross_attention_dim[0])
    return f32(batch, size, size, config.in_channels), f32(batch), context, added or None


@functools.cache
def abstract_params(config: UNetConfig) -> dict:
    """Returns the shapes of the parameters of a U-Net, in their tree. Every call returns the same tree."""
    inputs = abstract_inputs(config, size=2 ** len(config.block_out_channels), tokens=2)
    return jax.eval_shape(UNet(config).init, jax.random.key(0), *inputs)["params"]
