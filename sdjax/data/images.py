"""One image file -> one square RGB array, whatever the file holds; DataError names what cannot be used."""

import logging
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageColor, ImageOps

from sdjax.errors import DataError

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_ENLARGEMENT = 8
"""An image is refused if it had to be enlarged more than this many times."""
MAX_ASPECT = 8
"""An image is refused if its long side is more than this many times its short one: the crop would show too little."""


def read_image(path: str | Path, resolution: int, background: str = "white") -> UInt8[np.ndarray, "R R 3"]:
    """Read, turn upright (EXIF), put transparency on `background`, crop the middle square, resize (Lanczos).

    Palette, grey, CMYK and 16-bit images become 8-bit RGB; of an animation the first frame is taken, with a warning.
    Raises DataError for a missing, truncated or foreign file, for decompression and PNG text bombs (Pillow's limits:
    89 million pixels, 1 MB a text chunk), and for images too small or too narrow (MAX_ENLARGEMENT, MAX_ASPECT).
    """
    try:
        with warnings.catch_warnings(), Path(path).open("rb") as file:
            # A bomb just below Pillow's error limit only warns; other warnings (odd EXIF, say) do not matter here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(file, path)
            image = _rgb(ImageOps.exif_transpose(image), background)
    except DataError as e:
        raise DataError(f"{path}: {e}") from None
    except Exception as e:  # a malformed file makes Pillow raise nearly anything
        raise DataError(f"{path}: cannot be read as an image: {str(e) or type(e).__name__}") from e
    side = min(image.size)
    if side * MAX_ENLARGEMENT < resolution:
        raise DataError(
            f"{path}: {image.width}x{image.height} is too small for {resolution} pixels; "
            f"its shorter side must be at least {-(-resolution // MAX_ENLARGEMENT)}"
        )
    left, top = (image.width - side) / 2, (image.height - side) / 2
    square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
    return np.asarray(square)


def to_float(image: UInt8[np.ndarray, "*S"]) -> Float32[np.ndarray, "*S"]:
    """0..255 -> -1..1, the range the VAE takes."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _open(file: BinaryIO, path: str | Path) -> Image.Image:
    Image.init()
    image = Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])
    # Before decoding: a wrong shape need not be decoded to be refused.
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise DataError(f"{image.width}x{image.height} is too narrow; at most {MAX_ASPECT}:1")
    # A phone's MPO holds a preview beside the picture, which is no animation.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        log.warning("%s holds several frames: the first is taken", path)
    return image


def _rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits; Pillow's own conversion would clip everything above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.max(initial=0) > 65535 or values.min(initial=0) < 0:
        raise DataError(f"grey values of mode {image.mode} are not 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(np.uint8))
