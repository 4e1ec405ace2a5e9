"""The variational autoencoder (VAE) that turns pictures into latents and back, NHWC.

Sources: Kingma and Welling 2014; Rombach et al. 2022.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.errors import ConfigError
from sdjax.models.layers import ACTIVATIONS, Attention, Compute, Conv, GroupNorm, Resample, ResnetBlock, remat

EPSILON = 1e-6  # of all norms


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The options of an autoencoder's `config.json`."""

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
        """Reads a diffusers `config.json`. Raises ConfigError for an option that sdjax does not compute."""
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
        """The side of the square of pixels that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


class Level(nn.Module):
    """Residual blocks at one size, then a step to the next size if `downsample` or `upsample`."""

    config: VAEConfig
    features: int
    layers: int
    compute: Compute
    downsample: bool = False
    upsample: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Array:
        resnet = remat(ResnetBlock, self.compute, "blocks", "levels")
        for i in range(self.layers):
            config = self.config
            x = resnet(
                self.features, config.norm_num_groups, EPSILON, self.compute, config.act_fn, name=f"resnets_{i}"
            )(x)
        if self.downsample:
            # The weights were trained with padding below and to the right only.
            x = Resample(self.compute, 2, ((0, 1), (0, 1)), name="downsamplers_0")(x)
        if self.upsample:
            x = Resample(self.compute, name="upsamplers_0")(x, (2 * x.shape[1], 2 * x.shape[2]))
        return x


class MidBlock(nn.Module):
    """Residual block, attention of one head over all pixels, residual block."""

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
    """Turns pictures into the moments of the posterior, before the last 1x1 convolution (`quant_conv`)."""

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
        # SiLU for any act_fn: as in diffusers, act_fn is for the residual blocks only.
        x = GroupNorm(config.norm_num_groups, EPSILON, compute, silu=True, name="conv_norm_out")(x)
        return Conv(2 * config.latent_channels, compute, name="conv_out")(x)


class Decoder(nn.Module):
    """Turns latents into pictures, after the first 1x1 convolution (`post_quant_conv`)."""

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
    """The encoder from pictures to a Gaussian over latents, and the decoder; the latents are not scaled yet."""

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
        """Returns mean and log variance of the posterior, side by side on the last axis. images: in [-1, 1]."""
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        return moments.astype(jnp.float32)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W C"]:
        """Returns images, about in [-1, 1], of latents that are not scaled."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Returns the images decoded from the mean of their posterior."""
        return self.decode(posterior_mean(self.encode(images)))


def posterior_mean(moments: Float[Array, "B h w 2*c"]) -> Float[Array, "B h w c"]:
    """Returns the mean of the posterior."""
    return jnp.split(moments, 2, axis=-1)[0]


def posterior_sample(moments: Float[Array, "B h w 2*c"], noise: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """Returns `mean + std * noise`, with the log variance clipped to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean + jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)) * noise


def scale_latents(config: VAEConfig, latents: Array) -> Array:
    """Returns latents of the autoencoder scaled to about unit variance, as the U-Net takes them."""
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def unscale_latents(config: VAEConfig, latents: Array) -> Array:
    """Returns the latents before `scale_latents`."""
    return latents / config.scaling_factor + (config.shift_factor or 0.0)


@functools.cache
def abstract_params(config: VAEConfig) -> dict:
    """Returns the shapes of the parameters of an autoencoder, in their tree. Every call returns the same tree."""
    size = 2 * config.factor
    images = jax.ShapeDtypeStruct((1, size, size, config.in_channels), jnp.float32)
    return jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images)["params"]
