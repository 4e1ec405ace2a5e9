"""Masks and pixels of inpainting, before and after the model, with NumPy and Pillow alone.

A mask is white where to paint. The painted pixels are pasted onto the original picture. Where the mask, after
`mask_grow`, is 0, the original pixels stay exactly as they were, so the soft edge of `mask_blur` lies inside the mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageFilter

from sdjax.data.images import Size, eight_bits, on_white
from sdjax.draw.settings import LARGEST_SIDE, PictureSettings
from sdjax.errors import ConfigError


class Box(NamedTuple):
    """Part of a picture, in pixels. `right` and `bottom` are one past the last pixel."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The index of the box in an array [H, W, ...]."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


class Frame(NamedTuple):
    """One picture to inpaint: the box of it that is drawn, and how the drawing is pasted back.

    mask: in [0, 1], after `mask_grow`.
    drawn: height and width that the model draws. With only_masked the box is resized to them. Otherwise the box is
    padded to them at the right and below, with copies of its edge.
    """

    original: UInt8[np.ndarray, "H W 3"]
    mask: Float[np.ndarray, "H W"]
    box: Box
    drawn: tuple[int, int]
    settings: PictureSettings

    def canvas(self) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
        """Returns the pixels and the mask that the model draws from, both in [0, 1]."""
        pixels, mask = self.original[self.box.slices], self.mask[self.box.slices]
        if self.settings["only_masked"]:
            height, width = self.drawn
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
            mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
        else:
            edges = [(0, drawn - side) for drawn, side in zip(self.drawn, mask.shape, strict=True)]
            pixels, mask = np.pad(pixels, [*edges, (0, 0)], mode="edge"), np.pad(mask, edges, mode="edge")
        return pixels.astype(np.float32) / 255, np.clip(mask, 0, 1)

    def paste(self, painted: Float[np.ndarray, "h w 3"]) -> Image.Image:
        """Returns the whole picture with the painted pixels, in [0, 1], in their place."""
        original, mask = self.original[self.box.slices], self.mask[self.box.slices]
        height, width = mask.shape
        if self.settings["only_masked"]:
            picture = Image.fromarray(np.round(painted * 255).astype(np.uint8))
            values = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32)
        else:
            values = painted[:height, :width] * np.float32(255)
        weight = soft_edge(mask, self.settings["mask_blur"])[..., None]
        kept = mask == 0
        blended = np.clip(np.round(original + weight * (values - original)), 0, 255).astype(np.uint8)
        whole = self.original.copy()
        whole[self.box.slices] = np.where(kept[..., None], original, blended)
        return Image.fromarray(whole)


def make_frame(
    image: Image.Image,
    mask: Image.Image | None,
    settings: PictureSettings,
    *,
    size: tuple[int, int] | None,
    native: int,
    multiple: int,
) -> Frame:
    """Prepares a picture and its mask.

    mask: of any size, stretched over the image. Without a mask the transparent part of the image is painted, and the
    image is put on white.
    size: height and width. The image is resized to them or, with only_masked, the crop around the mask is drawn at
    them. None keeps the size of the image and pads its sides to multiples of `multiple` for drawing; a crop is then
    drawn with sides of `native`.
    Raises ConfigError for a mask that is no image or black everywhere, and for an image with neither a mask nor
    transparency.
    """
    if mask is None and not image.has_transparency_data:
        raise ConfigError("no mask is given, and the image has no transparent part to paint")
    if mask is not None and not isinstance(mask, Image.Image):
        raise ConfigError(f"the mask is a {type(mask).__name__}: give a PIL image, white where to paint")
    grey = _transparency(image) if mask is None else _brightness(mask)
    picture = on_white(image)
    if size is not None and not settings["only_masked"] and picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    if grey.size != picture.size:
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    if grey.getbbox() is None:
        raise ConfigError("the mask is black all over: nothing is to be painted; white is where to paint")
    for _ in range(settings["mask_grow"]):
        grey = grey.filter(ImageFilter.MaxFilter(3))
    drawn = size or (native, native)
    box = Box(0, 0, *picture.size)
    if settings["only_masked"]:
        box = _around(Box(*(grey.getbbox() or box)), settings["padding"], drawn[1] / drawn[0], picture.size)
    elif size is None:
        drawn = (-(-picture.height // multiple) * multiple, -(-picture.width // multiple) * multiple)
    return Frame(np.asarray(picture), np.asarray(grey, np.float32) / 255, box, drawn, settings)


def make_frames(
    images: Sequence[Image.Image],
    masks: Sequence[Image.Image | None],
    settings: PictureSettings,
    *,
    size: tuple[int | None, int | None],
    native: int,
    multiple: int,
) -> list[Frame]:
    """Prepares pictures with `make_frame`, all to be drawn at one size. masks: one for all images, or one each."""
    height, width = size
    if height or width:
        default = (native, native) if settings["only_masked"] else (images[0].height, images[0].width)
        drawn = (height or default[0] // multiple * multiple, width or default[1] // multiple * multiple)
    else:
        drawn = None
    pairs = zip(images, list(masks) * (len(images) // len(masks)), strict=True)
    frames = [make_frame(*pair, settings, size=drawn, native=native, multiple=multiple) for pair in pairs]
    if len({frame.drawn for frame in frames}) > 1:
        raise ConfigError("images of several sizes: give height and width to draw them at, or one call each")
    return frames


def outpainted(
    image: Image.Image, mask: Image.Image | None = None, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """Returns a picture with more pixels at each side, and the mask that paints the new pixels and those of `mask`.

    The new pixels are copies of the picture's edge. Drawing starts from them if the strength is below 1.
    Raises ConfigError unless a side is above 0 and none is negative.
    """
    sides = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(sides.values()) < 0 or not any(sides.values()):
        given = ", ".join(map(str, sides.values()))
        raise ConfigError(f"outpaint = {given}: pixels at the left, top, right and bottom, 0 or more, one above 0")
    size = Size(top + image.height + bottom, left + image.width + right)
    if max(size) > LARGEST_SIDE:
        raise ConfigError(f"outpaint makes a picture of {size} pixels: at most {LARGEST_SIDE} at a side")
    edges = [(top, bottom), (left, right)]
    inner = np.zeros((image.height, image.width), np.uint8)
    if mask is not None:
        inner = np.asarray(_brightness(mask).resize(image.size, Image.Resampling.BILINEAR))
    wider = np.pad(np.asarray(on_white(image)), [*edges, (0, 0)], mode="edge")
    return Image.fromarray(wider), Image.fromarray(np.pad(inner, edges, constant_values=255))


def soft_edge(mask: Float[np.ndarray, "H W"], width: int) -> Float[np.ndarray, "H W"]:
    """Returns the mask with a ramp of `width` pixels inside its edge.

    It is 0 only where the mask is 0, and it reaches the value of the mask in the middle of every masked part. A part
    that is thinner than the ramp gets a narrower ramp. The border of the picture is not an edge.
    """
    level = Image.fromarray((mask > 0).astype(np.uint8))
    depth = (mask > 0).astype(np.uint16)
    for _ in range(width):
        level = level.filter(ImageFilter.MinFilter(3))
        depth += np.asarray(level)
    deepest = depth
    for axis in (0, 1):
        reach = np.pad(deepest, [(width, width) if a == axis else (0, 0) for a in (0, 1)])
        deepest = np.lib.stride_tricks.sliding_window_view(reach, 2 * width + 1, axis=axis).max(axis=-1)
    return mask * depth / np.maximum(deepest, 1).astype(np.float32)


def spread(values: Float[np.ndarray, "H W C"], known: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, "H W C"]:
    """Spreads the values of the known pixels smoothly over all pixels. At least one pixel must be known.

    Each pixel is an average of known pixels nearby, from a large radius to ever smaller ones.
    """
    weights = known[..., None].astype(np.float32)
    result = np.broadcast_to(values[known].mean(axis=0), values.shape).astype(np.float32)
    radius = max(known.shape) // 2
    while radius >= 1:
        share = _averaged(weights, radius)
        nearby = _averaged(values * weights, radius) / np.maximum(share, 1e-6)
        result = result + np.minimum(4 * share, 1) * (nearby - result)
        radius //= 2
    return result


def filled(pixels: Float[np.ndarray, "H W 3"], mask: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W 3"]:
    """Returns the picture with the surroundings blurred into the masked region."""
    kept = mask == 0
    return np.where(kept[..., None], pixels, spread(pixels, kept)) if kept.any() else np.full_like(pixels, 0.5)


def cells(mask: Float[np.ndarray, "B H W"], factor: int) -> Float[np.ndarray, "B h w 1"]:
    """Returns the mask on the grid of the latents. A cell has the largest value of its pixels."""
    batch, height, width = mask.shape
    blocks = mask.reshape(batch, height // factor, factor, width // factor, factor)
    return blocks.max(axis=(2, 4))[..., None]


def _brightness(mask: Image.Image) -> Image.Image:
    """Returns the brightness of a mask in 8 bits. Transparent pixels count as black."""
    if mask.mode == "F":
        raise ConfigError("the mask has mode F: give an image of 8 or 16 bits, white where to paint")
    mask = eight_bits(mask)
    if mask.has_transparency_data:
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
    return mask.convert("L")


def _transparency(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A").point(lambda alpha: 255 - alpha)


def _around(region: Box, padding: int, aspect: float, size: tuple[int, int]) -> Box:
    """Returns the region with padding, enlarged to an aspect (width / height) as far as the picture reaches."""
    left, right = max(region.left - padding, 0), min(region.right + padding, size[0])
    top, bottom = max(region.top - padding, 0), min(region.bottom + padding, size[1])
    width = max(right - left, round((bottom - top) * aspect))
    height = max(bottom - top, round((right - left) / aspect))
    left, right = _lengthened(left, right, width, size[0])
    top, bottom = _lengthened(top, bottom, height, size[1])
    return Box(left, top, right, bottom)


def _lengthened(start: int, end: int, length: int, most: int) -> tuple[int, int]:
    length = min(length, most)
    start = min(max(start - (length - (end - start)) // 2, 0), most - length)
    return start, start + length


def _averaged(values: Float[np.ndarray, "H W C"], radius: int) -> Float[np.ndarray, "H W C"]:
    """Applies a box blur twice in each direction. The picture is continued with copies of its edge."""
    for axis in (0, 1, 0, 1):
        edges = [(radius + 1, radius) if a == axis else (0, 0) for a in range(3)]
        sums = np.cumsum(np.pad(values, edges, mode="edge"), axis=axis, dtype=np.float64)
        first, last = (np.take(sums, start + np.arange(values.shape[axis]), axis) for start in (0, 2 * radius + 1))
        values = ((last - first) / (2 * radius + 1)).astype(np.float32)
    return values
