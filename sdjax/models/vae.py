"""The autoencoder between pictures and latents (Kingma and Welling 2014; Rombach et al. 2022), NHWC."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.errors import ConfigError
from sdjax.models.layers import ACTIVATIONS, Attention, Compute, Conv, GroupNorm, Resample, ResnetBlock

EPSILON = 1e-6  # of every norm in this model


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """What an autoencoder's `config.json` says."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int = 512

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads a diffusers `config.json`; ConfigError names an option not computed here."""
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for block in config.get(name, ()):
                if block != only:
                    raise ConfigError(f"VAE config: unknown block {block!r} in {name}; only {only} is supported")
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise ConfigError(f"VAE config: {name} is not supported; only a scalar scaling_factor and shift_factor")
        if config.get("act_fn", "silu") not in ACTIVATIONS:
            raise ConfigError(f"VAE config: act_fn = {config['act_fn']!r}; choices: {', '.join(ACTIVATIONS)}")
        values = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        values["block_out_channels"] = tuple(config.get("block_out_channels", cls.block_out_channels))
        return cls(**values)

    @property
    def factor(self) -> int:
        """Pixels a latent spans, each way."""
        return 2 ** (len(self.block_out_channels) - 1)


class Level(nn.Module):
    """Residual blocks at one size, then a step to the next size where there is one."""

    config: VAEConfig
    features: int
    layers: int
    compute: Compute
    downsample: bool = False
    upsample: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Array:
        resnet = nn.remat(ResnetBlock) if self.compute.remat else ResnetBlock
        for i in range(self.layers):
            config = self.config
            x = resnet(
                self.features, config.norm_num_groups, EPSILON, self.compute, config.act_fn, name=f"resnets_{i}"
            )(x)
        if self.downsample:
            # The encoder pads below and to the right only, as its weights were trained.
            x = Resample(self.compute, 2, ((0, 1), (0, 1)), name="downsamplers_0")(x)
        if self.upsample:
            x = Resample(self.compute, name="upsamplers_0")(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class MidBlock(nn.Module):
    """Residual block, single-head attention over all pixels, residual block."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Array:
        config = self.config
        resnet = lambda name: ResnetBlock(
            x.shape[-1], config.norm_num_groups, EPSILON, self.compute, config.act_fn, name=name
        )
        x = resnet("resnets_0")(x)
        if config.mid_block_add_attention:
            pixels = x.reshape(x.shape[0], -1, x.shape[-1])
            attend = Attention(1, self.compute, bias=True, norm_groups=config.norm_num_groups, name="attentions_0")
            x = (pixels + attend(pixels)).reshape(x.shape)
        return resnet("resnets_1")(x)


class Encoder(nn.Module):
    """Pictures to the moments of the posterior, before the 1x1 convolution that ends the encoder."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        config, compute = self.config, self.compute
        channels = config.block_out_channels
        x = Conv(channels[0], compute, name="conv_in")(x)
        for i, features in enumerate(channels):
            down = i < len(channels) - 1
            level = Level(config, features, config.layers_per_block, compute, downsample=down, name=f"down_blocks_{i}")
            x = level(x)
        x = MidBlock(config, compute, name="mid_block")(x)
        # SiLU whatever act_fn says, as in diffusers, where that is the blocks' alone.
        x = GroupNorm(config.norm_num_groups, EPSILON, compute, silu=True, name="conv_norm_out")(x)
        return Conv(2 * config.latent_channels, compute, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pictures."""

    config: VAEConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        config, compute = self.config, self.compute
        channels = config.block_out_channels[::-1]
        x = Conv(channels[0], compute, name="conv_in")(x)
        x = MidBlock(config, compute, name="mid_block")(x)
        for i, features in enumerate(channels):
            up = i < len(channels) - 1
            level = Level(config, features, config.layers_per_block + 1, compute, upsample=up, name=f"up_blocks_{i}")
            x = level(x)
        x = GroupNorm(config.norm_num_groups, EPSILON, compute, silu=True, name="conv_norm_out")(x)
        return Conv(config.out_channels, compute, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Encoder to a Gaussian over latents, and decoder. Latents here are the model's own; scaling is the caller's."""

    config: VAEConfig
    compute: Compute = Compute()

    def setup(self):
        config, compute = self.config, self.compute
        self.encoder = Encoder(config, compute)
        self.decoder = Decoder(config, compute)
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * config.latent_channels, compute, size=1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(config.latent_channels, compute, size=1)

    def encode(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w 2*c"]:
        """images in [-1, 1] -> mean and log variance of the posterior, side by side on the last axis."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """The model's own (unscaled) latents -> images, about [-1, 1]."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Reconstruction through the posterior's mean."""
        return self.decode(posterior_mean(self.encode(images)))


def posterior_mean(moments: Float[Array, "B h w 2*c"]) -> Float[Array, "B h w c"]:
    """The mean of the posterior."""
    return jnp.split(moments, 2, axis=-1)[0]


def posterior_sample(moments: Float[Array, "B h w 2*c"], noise: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """`mean + std * noise`, the log variance clipped to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)) * noise


def scale_latents(config: VAEConfig, latents: Array) -> Array:
    """The model's own latents -> unit variance, what the U-Net sees."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: VAEConfig, latents: Array) -> Array:
    """The inverse of `scale_latents`."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


def abstract_params(config: VAEConfig) -> dict:
    """The parameter tree an autoencoder of this config has, as shapes: what a file must hold."""
    size = 2 * config.factor
    images = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images)["params"]
