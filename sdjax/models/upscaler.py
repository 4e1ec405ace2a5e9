"""The networks of the ESRGAN family, which enlarge pictures, NHWC.

Sources: Wang et al. 2018 (ESRGAN) and 2021 (Real-ESRGAN) for `RRDBNet`; BasicSR's SRVGGNetCompact for `CompactNet`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from sdjax.models.kernels.upsampling import interleave, upsample_nearest
from sdjax.models.layers import Compute, Conv, parameter

COLOURS = 3
_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)


@dataclasses.dataclass(frozen=True)
class RRDBConfig:
    """The structure of an `RRDBNet`.

    growth: features that each convolution of a dense block adds. doublings: of the sides, after the blocks.
    unshuffle: side of the squares of pixels that become channels, before the blocks.
    """

    features: int = 64
    growth: int = 32
    blocks: int = 23
    doublings: int = 2
    unshuffle: int = 1

    @property
    def scale(self) -> int:
        """By how much the network enlarges the sides of a picture."""
        return 2**self.doublings // self.unshuffle


@dataclasses.dataclass(frozen=True)
class CompactConfig:
    """The structure of a `CompactNet`. layers: convolutions from features to features."""

    features: int = 64
    layers: int = 16
    scale: int = 4


class DenseBlock(nn.Module):
    """Five convolutions, each of the input and all results before it, with a residual connection."""

    features: int
    growth: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        maps = x
        for i in range(1, 5):
            new = _leaky_relu(Conv(self.growth, self.compute, name=f"conv{i}")(maps))
            maps = jnp.concatenate([maps, new], axis=-1)
        return x + 0.2 * Conv(self.features, self.compute, name="conv5")(maps)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks with a residual connection around them."""

    features: int
    growth: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        y = x
        for i in range(1, 4):
            y = DenseBlock(self.features, self.growth, self.compute, name=f"rdb{i}")(y)
        return x + 0.2 * y


class RRDBNet(nn.Module):
    """The generator of ESRGAN and Real-ESRGAN."""

    config: RRDBConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        """Returns the enlarged pictures. Values are about in [0, 1], also those of the result."""
        config = self.config
        conv = functools.partial(Conv, config.features, self.compute)
        height, width = pixels.shape[1:3]
        # Repeats the last rows and columns of sides that are no multiples of `unshuffle`.
        rest = ((0, -height % config.unshuffle), (0, -width % config.unshuffle))
        x = unshuffled(jnp.pad(pixels, ((0, 0), *rest, (0, 0)), mode="edge"), config.unshuffle)
        first = x = conv(name="conv_first")(x)
        for i in range(config.blocks):
            x = RRDB(config.features, config.growth, self.compute, name=f"body_{i}")(x)
        x = first + conv(name="conv_body")(x)
        for i in range(1, config.doublings + 1):
            doubled = upsample_nearest(x, 2 * x.shape[1], 2 * x.shape[2])
            x = _leaky_relu(conv(name=f"conv_up{i}")(doubled, x))
        x = _leaky_relu(conv(name="conv_hr")(x))
        x = Conv(COLOURS, self.compute, name="conv_last")(x)
        return x[:, : height * config.scale, : width * config.scale]


class PReLU(nn.Module):
    """Values below 0 times a slope for each channel (He et al. 2015)."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        slope = parameter(self, "scale", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.where(x >= 0, x, slope.astype(x.dtype) * x)


class CompactNet(nn.Module):
    """A chain of convolutions at the size of the input; its result is added to the input's nearest pixels."""

    config: CompactConfig
    compute: Compute

    @nn.compact
    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        """Returns the enlarged pictures. Values are about in [0, 1], also those of the result."""
        config = self.config
        x = pixels
        for i in range(config.layers + 1):
            x = Conv(config.features, self.compute, name=f"body_{2 * i}")(x)
            x = PReLU(name=f"body_{2 * i + 1}")(x)
        x = Conv(COLOURS * config.scale**2, self.compute, name=f"body_{2 * config.layers + 2}")(x)
        _, height, width, _ = pixels.shape
        nearest = upsample_nearest(pixels, height * config.scale, width * config.scale)
        return shuffled(x, config.scale) + nearest.astype(x.dtype)


Network = RRDBNet | CompactNet


def make_network(config: RRDBConfig | CompactConfig, compute: Compute) -> Network:
    """Returns the module of a structure."""
    return RRDBNet(config, compute) if isinstance(config, RRDBConfig) else CompactNet(config, compute)


@functools.cache
def abstract_params(config: RRDBConfig | CompactConfig) -> dict[str, dict]:
    """Returns the parameter tree with jax.ShapeDtypeStruct leaves."""
    network = make_network(config, Compute())
    side = config.unshuffle if isinstance(config, RRDBConfig) else 1
    pixels = jax.ShapeDtypeStruct((1, side, side, COLOURS), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), pixels)["params"]


def unshuffled(x: Float[Array, "B n*H n*W C"], n: int) -> Float[Array, "B H W C*n*n"]:
    """Returns squares of n x n pixels as channels: channel `n n c + n i + j` is channel c at row i, column j."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // n, n, width // n, n, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // n, width // n, channels * n * n)


def shuffled(x: Float[Array, "B H W C*n*n"], n: int) -> Float[Array, "B n*H n*W C"]:
    """Returns channels as squares of n x n pixels: the inverse of `unshuffled`."""
    return interleave([[x[..., n * i + j :: n * n] for j in range(n)] for i in range(n)])
