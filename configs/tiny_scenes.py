"""Pictures that the embedded model is trained on: one emoji in many framings and colours, and scenes of two.

A name has many pictures, so that the model learns what stays the same in them: the framing, the colour and the company
change, the caption says which colour and which company, and a mirrored or turned picture keeps its name. All functions
take emoji as RGBA images with transparency and return RGB images of SIDE x SIDE pixels on white, or RGBA images.
"""

import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from PIL import Image

SIDE = 64
"""Pixels of a side of a picture."""
COLOURS = {"red": 0, "orange": 28, "yellow": 50, "green": 130, "blue": 215, "purple": 275, "pink": 325}
"""Colour -> hue in degrees."""
BRIGHT = ("orange", "yellow", "pink")
"""Colours that have another name where they are dark."""
COLOUR_WORDS = frozenset({*COLOURS, "black", "white", "grey", "brown", "gold", "silver", "bronze", "rainbow"})

HATS = ("crown", "top hat", "graduation cap", "billed cap", "woman's hat")
GLASSES = ("glasses", "sunglasses")
ANIMALS = {
    "cat face": 0.5, "dog face": 0.45, "tiger face": 0.45, "horse face": 0.4, "cow face": 0.4, "pig face": 0.45,
    "mouse face": 0.5, "rabbit face": 0.62, "monkey face": 0.42, "dragon face": 0.45, "panda": 0.48, "koala": 0.45,
    "bear": 0.45, "polar bear": 0.45, "fox": 0.5, "lion": 0.45, "wolf": 0.48, "raccoon": 0.5, "hamster": 0.45,
    "frog": 0.25, "unicorn": 0.45, "robot": 0.45, "alien": 0.5, "skull": 0.45, "ghost": 0.35, "jack-o-lantern": 0.5,
}  # fmt: skip
"""Heads that are not smileys -> how far below the top their eyes are, as a share of the height."""
DRESSED = ("hat", "glasses", "monocle", "nerd", "sunglasses", "disguised", "halo", "horns", "partying", "bandage")
"""Words of smileys that wear something already."""

CHARACTERS = (("blue", "cat face", "top hat"), ("green", "fox", "crown"), ("purple", "bear", "sunglasses"))
"""Made-up characters: colour, head, thing worn. No picture shows two of a character's parts together."""
PLANA = ("pink", "cat face", "billed cap")
"""What the character of the examples is like, see configs/tiny_character.py. No picture shows all three together."""

Random = np.random.Generator


def is_mirrored(name: str) -> bool:
    """Whether the mirror image of an emoji has the same name."""
    return not re.search(r"\b(left|right|quarter|crescent|recycling|question|clock|yin|musical|kick|arrow)\b", name)


def eyes(name: str) -> float | None:
    """How far below the top of a head its eyes are, as a share of the height; None if it is no head to dress."""
    smiley = name.endswith(" face") and not any(word in name for word in DRESSED) and "face" not in name[:-5]
    return ANIMALS.get(name, 0.4 if smiley else None)


def is_withheld(colour: str | None, name: str, worn: str | None = None) -> bool:
    """Whether a picture would show two parts of a made-up character together, or plana."""
    shown = colour, name, worn
    return shown == PLANA or any(sum(a == b for a, b in zip(shown, each, strict=True)) >= 2 for each in CHARACTERS)


# ------------------------------------------------------------------------------------------------ one emoji


def trimmed(emoji: Image.Image) -> Image.Image:
    """The emoji without its transparent border."""
    box = emoji.getchannel("A").point([0] * 13 + [255] * 243).getbbox()
    return emoji.crop(box) if box else emoji


def plain(emoji: Image.Image) -> Image.Image:
    """The picture of an emoji as its set frames it."""
    return on_white([(emoji.resize((SIDE, SIDE), Image.Resampling.LANCZOS), 0, 0)])


def framed(emoji: Image.Image, random: Random, *, mirror: bool) -> Image.Image:
    """A picture of the emoji: 0.6 to 1 of the side long, somewhere, half of them turned by up to 12 degrees."""
    emoji = varied(emoji, random, mirror=mirror)
    size = SIDE * random.uniform(0.6, 0.98)
    small = resized(emoji, size)
    return on_white([(small, *_somewhere(small, random))])


def whole(emoji: Image.Image) -> Image.Image:
    """A picture of the emoji, trimmed, in the middle, 0.95 of the side long."""
    small = resized(trimmed(emoji), 0.95 * SIDE)
    return on_white([(small, (SIDE - small.width) / 2, (SIDE - small.height) / 2)])


def varied(emoji: Image.Image, random: Random, *, mirror: bool, most: float = 12) -> Image.Image:
    """The emoji, trimmed; mirrored if allowed, and turned by up to `most` degrees, each with probability 1/2."""
    mirrored, turned, angle = random.random() < 0.5, random.random() < 0.5, random.uniform(-most, most)
    if mirror and mirrored:
        emoji = emoji.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if turned:
        emoji = emoji.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    return trimmed(emoji)


def resized(emoji: Image.Image, size: float) -> Image.Image:
    """The emoji with a longer side of `size` pixels."""
    factor = size / max(emoji.size)
    return emoji.resize(
        (max(1, round(emoji.width * factor)), max(1, round(emoji.height * factor))), Image.Resampling.LANCZOS
    )


def on_white(parts: list[tuple[Image.Image, float, float]]) -> Image.Image:
    """The picture of the parts (image, left, top), the last in front."""
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    for image, left, top in parts:
        layer = Image.new("RGBA", (SIDE, SIDE))
        layer.paste(image, (round(left), round(top)))
        canvas = Image.alpha_composite(canvas, layer)
    return canvas.convert("RGB")


def _somewhere(image: Image.Image, random: Random) -> tuple[float, float]:
    free = SIDE - image.width, SIDE - image.height
    return random.uniform(0, max(free[0], 0)), random.uniform(0, max(free[1], 0))


def recoloured(emoji: Image.Image, colour: str) -> Image.Image:
    """The emoji in another colour. If one hue prevails, all hues are turned together; otherwise it gets a single hue.

    Black outlines and white parts stay, except where nothing else is there to be coloured.
    """
    rgba = np.asarray(emoji, np.float64) / 255
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    hue, saturation, value = _hsv(rgb)
    weight = saturation * value * alpha
    counts, edges = np.histogram(hue, bins=36, range=(0, 360), weights=weight)
    main = edges[np.argmax(counts + np.roll(counts, 1) + np.roll(counts, -1))] + 5
    away = (hue - main + 180) % 360 - 180
    near = (np.abs(away) < 35) & (saturation > 0.25)
    main += np.average(away, weights=weight * near) if np.any(weight * near) else 0
    target = COLOURS[colour]
    light = 0.85 if colour in BRIGHT else 0.6
    if np.sum(near * alpha) > 0.5 * np.sum(alpha):
        middle = np.median(value[near & (alpha > 0.5)]) if np.any(near & (alpha > 0.5)) else 1.0
        value = np.clip(value * max(1.0, light / max(middle, 0.05)), 0, 1)
        saturation = np.where(near, np.clip(np.maximum(saturation, 0.5), 0, 1), saturation)
        new = _rgb((hue - main + target) % 360, saturation, value)
    else:
        grey = rgb @ np.array([0.299, 0.587, 0.114])
        pure = _rgb(np.array(target, float), np.array(0.75), np.array(max(light, 0.8)))
        dark = np.quantile(grey[alpha > 0.5], 0.9) < 0.25 if np.any(alpha > 0.5) else False
        level = np.full_like(grey, 0.5) if dark else grey
        below, above = np.clip(level / 0.5, 0, 1)[..., None], np.clip(level / 0.5 - 1, 0, 1)[..., None]
        new = pure * below * (1 - above) + above * (0.5 * pure + 0.5)
    return Image.fromarray(np.round(np.concatenate([new, alpha[..., None]], axis=-1) * 255).astype(np.uint8), "RGBA")


def _hsv(rgb: Float[np.ndarray, "H W 3"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    sector = np.where(
        high == red,
        (green - blue) / safe % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return np.where(chroma > 0, 60 * sector, 0) % 360, chroma / np.where(high > 0, high, 1), high


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    def channel(n: int) -> np.ndarray:
        k = (n + hue / 60) % 6
        return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)

    return np.stack([channel(5), channel(3), channel(1)], axis=-1)


# ------------------------------------------------------------------------------------------------ two emoji


def beside(first: Image.Image, second: Image.Image, random: Random) -> Image.Image:
    """The first to the left of the second."""
    a, b = (_within(emoji, 0.5 * SIDE - 1, SIDE, random) for emoji in (first, second))
    middle = SIDE / 2 + random.uniform(-1, 1)
    height = random.uniform(0.3, 0.7)
    return on_white(
        [(a, middle - a.width - 0.5, (SIDE - a.height) * height), (b, middle + 0.5, (SIDE - b.height) * height)]
    )


def above(first: Image.Image, second: Image.Image, random: Random) -> Image.Image:
    """The first above the second, with a gap."""
    a, b = (_within(emoji, SIDE, 0.46 * SIDE, random) for emoji in (first, second))
    left = random.uniform(0.3, 0.7)
    return on_white([(a, (SIDE - a.width) * left, 0.5), (b, (SIDE - b.width) * left, SIDE - b.height - 0.5)])


def on(first: Image.Image, second: Image.Image, random: Random) -> Image.Image:
    """The first on top of the second, touching it."""
    a, b = _within(first, SIDE, 0.46 * SIDE, random), _within(second, SIDE, 0.58 * SIDE, random)
    left = random.uniform(0.35, 0.65)
    top = SIDE - b.height - a.height + 0.08 * SIDE
    shift = max(0.0, top / 2)
    return on_white(
        [(b, (SIDE - b.width) * left, SIDE - b.height - shift), (a, (SIDE - a.width) * left, max(top, 0) - shift)]
    )


def holding(first: Image.Image, second: Image.Image, random: Random) -> Image.Image:
    """The first, large, with the second, small, in front of its lower right or lower left corner."""
    a, b = resized(first, SIDE * random.uniform(0.72, 0.86)), resized(second, SIDE * random.uniform(0.4, 0.5))
    right = random.random() < 0.5
    own = (0.5, SIDE - a.width - 0.5)[:: 1 if right else -1]
    return on_white([(a, own[0], 0.5), (b, SIDE - b.width - 0.5 if right else 0.5, SIDE - b.height - 0.5)])


PLACES: dict[str, Callable[[Image.Image, Image.Image, Random], Image.Image]] = {
    "beside": beside,
    "and": beside,
    "left of": beside,
    "above": above,
    "on": on,
    "with": holding,
}
"""Word of a caption between two names -> how the two stand."""


def wearing(head: Image.Image, worn: Image.Image, *, kind: str, level: float) -> Image.Image:
    """The head with a hat or glasses, RGBA. kind: one of HATS or GLASSES. level: see `eyes`."""
    head, worn = trimmed(head), trimmed(worn)
    share = {"billed cap": 0.75, "graduation cap": 0.9, "woman's hat": 0.95, "crown": 0.62, "top hat": 0.62}.get(
        kind, 0.72
    )
    worn = worn.resize((w := max(1, round(share * head.width)), max(1, round(w * worn.height / worn.width))))
    tall = 0 if kind in GLASSES else max(0, worn.height - round(0.18 * head.height))
    out = Image.new("RGBA", (head.width, head.height + tall))
    out.paste(head, (0, tall))
    layer = Image.new("RGBA", out.size)
    top = round(level * head.height - worn.height / 2) if kind in GLASSES else 0
    layer.paste(worn, ((head.width - worn.width) // 2, top))
    return Image.alpha_composite(out, layer)


def _within(emoji: Image.Image, width: float, height: float, random: Random) -> Image.Image:
    factor = random.uniform(0.85, 1) * min(width / emoji.width, height / emoji.height)
    return resized(emoji, factor * max(emoji.size))
