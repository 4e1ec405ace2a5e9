"""Reads image files of any kind as RGB pixels of a given shape. A DataError names a file that cannot be used."""

import hashlib
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, ImageColor, ImageOps

from sdjax.errors import DataError

log = logging.getLogger(__name__)

T = TypeVar("T")

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
"""Ends of the names of files that are taken for pictures."""
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MAX_ENLARGEMENT = 8
"""An image that would have to be enlarged more than this many times is refused."""
BORDER_TOLERANCE = 12
"""Difference from the background, of 255, from which a pixel belongs to the subject."""
SUBJECT_SHARE = 0.95
"""Share of the side of a picture that its subject fills if it is framed on it."""
MAX_ASPECT = 8
"""An image whose long side is more than this many times its short side is refused: a crop would show too little."""


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Opens(Protocol):
    """A picture that is not a file of its own. `str` of it is its name for messages."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Returns the picture as a file."""
        ...


Source = str | Path | Opens


class Crop(NamedTuple):
    """The place of a crop in its image, along each axis: 0 is left or top, 1/2 the middle, 1 right or bottom."""

    x: float = 0.5
    y: float = 0.5


def random_crops(count: int, *, seed: int, name: str) -> tuple[Crop, ...]:
    """`count` random crops, each fixed by seed, name and number; for `count` 0, one crop from the middle."""

    def place(number: int) -> Crop:
        digest = hashlib.sha256(f"{seed} {number} {name}".encode()).digest()
        return Crop(*(int.from_bytes(digest[i : i + 4]) / 2**32 for i in (0, 4)))

    return tuple(place(number) for number in range(count)) or (Crop(),)


def read_size(path: Source) -> Size:
    """The size of an image when turned upright, from its header alone. Raises DataError, see `read_image`."""

    def size(image: Image.Image) -> Size:
        # Pillow would decode a whole PNG to search for EXIF data after the pixels, where hardly any file has it.
        searched = image.format != "PNG" or "exif" in image.info
        turned = searched and image.getexif().get(0x0112, 1) >= 5  # orientations with x and y exchanged
        return Size(image.width, image.height) if turned else Size(image.height, image.width)

    return _read(path, size)


def read_image(
    path: Source,
    size: Size,
    background: str = "white",
    crops: Sequence[Crop] = (Crop(),),
    *,
    on_subject: bool = False,
) -> UInt8[np.ndarray, "V H W 3"]:
    """Reads an image, turns it upright (EXIF), fills transparency with `background`, resizes its crops (Lanczos).

    Each crop is as large as the image allows in the shape of `size`. Palette, grey, CMYK and 16-bit images become 8-bit
    RGB. Of an animation, the first frame is taken, with a warning. Raises DataError for a missing, truncated or foreign
    file, for decompression and PNG text bombs (Pillow's limits: 89 million pixels, 1 MB a text chunk), and for images
    that are too small or too narrow (MAX_ENLARGEMENT, MAX_ASPECT).

    on_subject: see `framed_on_subject`; the crops are then those of the square.
    """

    def upright(image: Image.Image) -> Image.Image:
        _mention_frames(path, image)
        turned = eight_bits(ImageOps.exif_transpose(image))
        return framed_on_subject(turned, background) if on_subject else _rgb(turned, background)

    image = _read(path, upright)
    _check_enlargement(path, image, size)
    # Crops begin at whole pixels, so that a crop that is not resized stays sharp.
    return _cut(image, size, crops, Image.Resampling.LANCZOS, whole=True)


class Framing(NamedTuple):
    """Where the subject of a picture on a plain background is. The values are in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    background: tuple[int, int, int]
    """The colour of the border."""

    @property
    def length(self) -> int:
        """The longer side of the subject."""
        return max(self.right - self.left, self.bottom - self.top)


def find_subject(image: Image.Image, background: str = "white") -> Framing | None:
    """Finds the smallest box that holds everything that differs from the background.

    The background is what is transparent. If nothing is, it is the colour of the border, from which BORDER_TOLERANCE of
    255 is no difference. Returns None for a picture without such a border (most photographs), or without a subject.
    """
    if image.has_transparency_data:
        other = np.asarray(image.convert("RGBA").getchannel("A")) > BORDER_TOLERANCE
        colour = np.array(ImageColor.getrgb(background)[:3])
    else:
        values = np.asarray(image.convert("RGB"), np.int16)
        border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
        colour = np.median(border, axis=0).round().astype(np.int16)
        other = np.max(np.abs(values - colour), axis=-1) > BORDER_TOLERANCE
        differs = np.max(np.abs(border - colour), axis=-1) > BORDER_TOLERANCE
        if np.mean(differs) > 0.25:  # a subject may touch the border
            return None
    if not other.any():
        return None
    rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
    ends = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    return Framing(*ends, background=(int(colour[0]), int(colour[1]), int(colour[2])))


def framed_on_subject(image: Image.Image, background: str = "white") -> Image.Image:
    """Cuts a square around the subject, which then fills SUBJECT_SHARE of its side; what lies outside is background.

    Without a plain background the picture is returned whole, on `background` where it is transparent.
    """
    found, flat = find_subject(image, background), _rgb(image, background)
    if found is None:
        return flat
    side = max(round(found.length / SUBJECT_SHARE), found.length)
    square = Image.new("RGB", (side, side), found.background)
    square.paste(flat, ((side - found.left - found.right) // 2, (side - found.top - found.bottom) // 2))
    return square


def size_conditions(
    image: Size, size: Size, crops: Sequence[Crop] = (Crop(),), *, flip: bool = False
) -> Float32[np.ndarray, "V 6"]:
    """SDXL's size conditions of the views that `read_image` makes of an image (Podell et al. 2023, section 2.2).

    They are the height and width of the image, the top and left of the crop, and the height and width of `size`. The
    crop is measured in pixels of the image after it was resized, and after it was mirrored. flip: each crop is followed
    by its mirror image.
    """
    rows = [
        [*image, round(top * size.height / (bottom - top)), round(beside * size.width / (right - left)), *size]
        for left, top, right, bottom in _boxes(image, size, crops, whole=True)
        for beside in ((left, image.width - right) if flip else (left,))
    ]
    return np.asarray(rows, np.float32)


def read_picture(path: Source) -> Image.Image:
    """Reads an image whole, turned upright, in 8 bits, with its transparency. See `read_image` for what is refused.

    Images that are too small or too narrow for training are taken.
    """

    def upright(image: Image.Image) -> Image.Image:
        _mention_frames(path, image)
        return eight_bits(ImageOps.exif_transpose(image))

    return _read(path, upright, any_shape=True)


def read_mask(
    path: Source, size: Size, crops: Sequence[Crop] = (Crop(),), *, alpha: bool = False
) -> Float32[np.ndarray, "V H W 1"]:
    """Crops of a mask's brightness (or of an image's alpha channel), 0 to 1, averaged over areas down to `size`.

    A mask of another size than its image is in effect stretched over the image, because a crop's place is relative.
    Raises DataError for the files that `read_image` refuses (but not for small ones), for an image without an alpha
    channel, and for a mask that is black in every crop.
    """

    def channel(image: Image.Image) -> Image.Image:
        image = ImageOps.exif_transpose(image)
        if alpha and not image.has_transparency_data:
            raise DataError("has no alpha channel to use as a mask; give masks in data.mask_path")
        return image.convert("RGBA").getchannel("A") if alpha else _rgb(image, "black").convert("L")

    # In floats, because 8 bits would round the averages.
    mask = _cut(_read(path, channel).convert("F"), size, crops, Image.Resampling.BOX, whole=False)[..., None]
    if not mask.any():
        raise DataError(f"{path}: the mask is all black in the crops of the image: nothing would be learned")
    return np.clip(mask / np.float32(255), 0, 1)


def to_float(image: UInt8[np.ndarray, "*S"]) -> Float32[np.ndarray, "*S"]:
    """Scales 0..255 to -1..1, the range that the VAE takes."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1)


def on_white(image: Image.Image) -> Image.Image:
    """The image in RGB, on white where it is transparent."""
    image = eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def pixels(image: Image.Image, size: Size) -> Float32[np.ndarray, "H W 3"]:
    """The image as values in [0, 1], on white where it is transparent, resized (Lanczos) if it has another size."""
    image = on_white(image)
    if image.size != (size.width, size.height):
        image = image.resize((size.width, size.height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def picture(values: Float[np.ndarray, "H W 3"]) -> Image.Image:
    """An image from values in [0, 1]."""
    return Image.fromarray(np.round(np.asarray(values) * 255).astype(np.uint8))


def eight_bits(image: Image.Image) -> Image.Image:
    """The image; one of deeper grey is converted to 8 bits. Raises DataError for grey that is not of 16 bits."""
    return _from_deep_grey(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else image


def _mention_frames(path: Source, image: Image.Image) -> None:
    # The second frame of a phone's MPO is a preview.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        log.warning("%s holds several frames: the first is taken", path)


def _read(path: Source, use: Callable[[Image.Image], T], *, any_shape: bool = False) -> T:
    """Returns `use` of the opened image. Every error becomes a DataError that names the file.

    any_shape: take images that are narrower than MAX_ASPECT allows.
    """
    try:
        with warnings.catch_warnings(), (Path(path) if isinstance(path, str) else path).open("rb") as file:
            # Pillow only warns of a bomb just below its limit for errors. Other warnings (of odd EXIF) do not matter.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _open(file)
            # Checked before decoding, which an image of a wrong shape does not need.
            if not any_shape and max(image.size) > MAX_ASPECT * min(image.size):
                raise DataError(f"{image.width}x{image.height} is too narrow; at most {MAX_ASPECT}:1")
            return use(image)
    except DataError as e:
        raise DataError(f"{path}: {e}") from None
    except MemoryError:
        raise
    except Exception as e:  # a malformed file makes Pillow raise nearly anything
        reason = str(e).partition(" <_io.")[0]  # Pillow names the object that it reads from
        raise DataError(f"{path}: cannot be read as an image: {reason or type(e).__name__}") from e


def _open(file: BinaryIO) -> Image.Image:
    Image.init()
    return Image.open(file, formats=[f for f in FORMATS if f in Image.OPEN])


def _check_enlargement(path: Source, image: Image.Image, size: Size) -> None:
    if max(size.width / image.width, size.height / image.height) > MAX_ENLARGEMENT:
        least = Size(*(-(-side // MAX_ENLARGEMENT) for side in size))
        raise DataError(f"{path}: {image.width}x{image.height} is too small for {size} pixels; at least {least}")


def _cut(
    image: Image.Image, size: Size, crops: Sequence[Crop], resampling: Image.Resampling, *, whole: bool
) -> np.ndarray:
    """The crops, resized to `size`: `[V, H, W]`, or `[V, H, W, C]` for several channels.

    whole: crops begin at whole pixels.
    """
    boxes = _boxes(Size(image.height, image.width), size, crops, whole=whole)
    return np.stack([np.asarray(image.resize((size.width, size.height), resampling, box=box)) for box in boxes])


def _boxes(image: Size, size: Size, crops: Sequence[Crop], *, whole: bool) -> list[tuple[float, float, float, float]]:
    """The crops as left, top, right and bottom in an image: as large as the image allows, in the shape of `size`."""
    scale = min(image.width / size.width, image.height / size.height)
    width, height = size.width * scale, size.height * scale
    boxes = []
    for crop in crops:
        left, top = (image.width - width) * crop.x, (image.height - height) * crop.y
        if whole:
            left, top = min(round(left), image.width - width), min(round(top), image.height - height)
        # Rounding errors must not lead out of the image.
        boxes.append((left, top, min(left + width, image.width), min(top + height, image.height)))
    return boxes


def _rgb(image: Image.Image, background: str) -> Image.Image:
    image = eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(canvas, image).convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Converts 16-bit grey to 8 bits. Pillow's conversion would clip all values above 255 to white."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F" or values.max(initial=0) > 65535 or values.min(initial=0) < 0:
        raise DataError(f"grey values of mode {image.mode} are not 8 or 16 bits")
    return Image.fromarray((values / 257).round().astype(np.uint8))
