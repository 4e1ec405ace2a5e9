"""Super-resolution: enlarges pictures with a network of the ESRGAN family, in overlapping tiles."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax.data.images import Size, eight_bits, picture
from sdjax.draw.inpainting import filled
from sdjax.draw.settings import LARGEST_SIDE, PictureSettings, UpscaleFactor
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import with_fields
from sdjax.formats.upscaler_file import read_upscaler
from sdjax.models.layers import Compute
from sdjax.models.tiling import Tiling, tiled, tiles
from sdjax.models.upscaler import COLOURS, Network, make_network
from sdjax.runtime.compiled import Program
from sdjax.settings import read_value

TILE, OVERLAP, MARGIN = 192, 24, 8
"""See `Tiling`; in pixels of the picture before it is enlarged."""

_EMBEDDED = Path(__file__).parent.parent / "tiny" / "upscaler" / "model.safetensors"


def upscale(
    image: Image.Image | np.ndarray | Array, model: str | os.PathLike, scale: float | None = None
) -> Image.Image:
    """Enlarges a picture with an upscaler of the ESRGAN family.

    image: a picture, or values [H, W, 3] or [H, W, 4] in [0, 1] or 8 bits. The result of a picture with transparent
    pixels has them too.
    model: "tiny" (embedded, 4 times, made for the pictures of the embedded model), or the file of an RRDBNet or
    SRVGGNetCompact (.pth or .safetensors), such as RealESRGAN_x4plus.pth.
    scale: how many times as long the sides become, above 0 and at most 16; by default as the network makes them.
    Otherwise the network's result is resized (Lanczos).
    The result carries the text in `image.info["parameters"]`, with the upscaler added as A1111 does.
    Raises DataError for a file that is no such upscaler, and ConfigError for a wrong image or scale.
    """
    upscaler, source = load(model), _picture(image)
    size = upscaler.enlarged_size(Size(source.height, source.width), scale)
    enlarged = upscaler.enlarge(source, size)
    if text := source.info.get("parameters"):
        by = f"{upscaler.network.config.scale if scale is None else scale:g}"
        fields = {"Postprocess upscale by": by, "Postprocess upscaler": upscaler.name}
        enlarged.info["parameters"] = with_fields(text, fields)
    return enlarged


@dataclasses.dataclass(frozen=True, eq=False)
class Upscaler:
    """A network with its parameters. name: of its file, for texts."""

    name: str
    network: Network
    params: dict[str, Any]

    def enlarged_size(self, size: Size, scale: float | None) -> Size:
        """The size of a picture after `upscale`. Raises ConfigError for a scale out of range or too large a result."""
        by = read_value(UpscaleFactor, self.network.config.scale if scale is None else scale, "scale")
        enlarged = Size(*(max(1, round(side * by)) for side in size))
        if max(enlarged) > LARGEST_SIDE:
            raise ConfigError(f"upscaled by {by:g}, {size} gives {enlarged} pixels; at most {LARGEST_SIDE} a side")
        return enlarged

    def enlarge(self, image: Image.Image, size: Size) -> Image.Image:
        """Returns the picture enlarged by the network, then resized (Lanczos) if that gives another size."""
        values = np.asarray(eight_bits(image).convert("RGBA"), np.float32) / 255
        pixels, alpha = values[..., :COLOURS], values[..., COLOURS]
        if (alpha == 1).all():
            enlarged = picture(self.applied(pixels))
        else:
            # Pixels that nobody sees may have any colour, which the network would draw into those beside them.
            enlarged = picture(self.applied(filled(pixels, (alpha == 0).astype(np.float32))))
            enlarged.putalpha(picture(self.applied(np.stack([alpha] * COLOURS, axis=-1))).convert("L"))
        if enlarged.size != (size.width, size.height):
            enlarged = enlarged.resize((size.width, size.height), Image.Resampling.LANCZOS)
        return enlarged

    def applied(self, pixels: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
        """Returns the pixels after the network, which sees them in tiles. Values are in [0, 1]."""
        scale = self.network.config.scale
        compute = functools.partial(_apply, self.network, self.params)
        return tiled(compute, pixels[None], self._tiling, factor=scale, encode=False, channels=COLOURS)[0]

    @property
    def _tiling(self) -> Tiling:
        scale = self.network.config.scale
        return Tiling(TILE * scale, OVERLAP * scale, MARGIN * scale)

    def program(self, size: Size, count: int, platform: str) -> Program:
        """Returns the program that enlarges one tile, for so many pictures of a size, on a platform; see `Compute`."""
        network = make_network(self.network.config, Compute(platform=platform))
        rows, columns = (tiles(side, self._tiling, self.network.config.scale) for side in size)
        pixels = jax.ShapeDtypeStruct((1, rows[0][1], columns[0][1], COLOURS), jnp.float32)
        params = jax.eval_shape(lambda: self.params)

        def lower(place: Any) -> Any:
            return _apply.lower(network, *place(params, pixels))

        return Program("upscale a tile", lower, runs=count * len(rows) * len(columns))


def load(model: str | os.PathLike) -> Upscaler:
    """Loads an upscaler; see `upscale`. The last two are kept. Raises DataError."""
    path = _EMBEDDED if model == "tiny" else Path(model)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        choices = "expected a file or tiny; for a second pass also latent or lanczos"
        raise DataError(f"upscaler {str(model)!r}: {reason}; {choices}") from None
    return _load_once(path, "tiny" if model == "tiny" else path.stem, status.st_mtime_ns, status.st_size)


def check(settings: PictureSettings) -> None:
    """Checks the settings of upscalers, and loads these. Raises ConfigError or DataError."""
    if settings["hires_scale"] != 1 and settings["hires_upscaler"] not in ("latent", "lanczos"):
        load(settings["hires_upscaler"])
    if settings["upscale"] is not None:
        sides = (settings[side] or 1 for side in ("height", "width"))
        drawn = Size(*(round(side * settings["hires_scale"]) for side in sides))
        load(settings["upscale"]).enlarged_size(drawn, settings["scale"])
    elif settings["scale"] is not None:
        raise ConfigError("scale is of an upscaler: give upscale too")


@functools.lru_cache(maxsize=2)
def _load_once(path: Path, name: str, changed: int, size: int) -> Upscaler:
    """Loads an upscaler. Another time of change or another size of the file means that it is read again."""
    config, params = read_upscaler(path)
    return Upscaler(name, make_network(config, Compute()), params)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: Network, params: Any, pixels: Float[Array, "1 H W 3"]) -> Float[Array, "1 h w 3"]:
    enlarged: Any = network.apply({"params": params}, pixels)
    return jnp.clip(enlarged, 0.0, 1.0)


def _picture(image: Any) -> Image.Image:
    """The image of what a user gives."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (np.ndarray, Array)) and image.ndim == 3 and image.shape[-1] in (3, 4):
        values = np.asarray(image)
        if values.dtype == np.uint8:
            return Image.fromarray(values)
        if np.issubdtype(values.dtype, np.floating) and values.min() >= 0 and values.max() <= 1:
            return picture(values)
    kind = f"array of {image.dtype} {image.shape}" if hasattr(image, "shape") else type(image).__name__
    raise ConfigError(f"image is a {kind}: give a PIL image, or [H, W, 3 or 4] in [0, 1] or 8 bits")
