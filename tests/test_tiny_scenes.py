"""Pictures for the embedded model: framing, colours, and scenes of two."""

import colorsys

import numpy as np
import pytest
import tiny_scenes as scenes
from PIL import Image, ImageDraw


def emoji(colour: str, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """An emoji that fills the middle of its square, darker on its left side."""
    image = Image.new("RGBA", size)
    pen = ImageDraw.Draw(image)
    pen.rectangle([16, 16, size[0] - 17, size[1] - 17], colour)
    pen.rectangle([16, 40, 30, 80], "black")
    return image


def inked(picture: Image.Image) -> np.ndarray:
    return np.argwhere(np.asarray(picture.convert("RGB")).min(-1) < 240)


def box(picture: Image.Image) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of what is not white."""
    found = inked(picture)
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    return int(top), int(left), int(bottom), int(right)


def where(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """The mean place (y, x) of a colour."""
    return np.argwhere(np.abs(np.asarray(picture, int) - colour).max(-1) < 40).mean(0)


def test_an_emoji_is_framed_whole_in_many_places_and_sizes():
    boxes = []
    for seed in range(40):
        picture = scenes.framed(emoji("red"), np.random.default_rng(seed), mirror=True)
        top, left, bottom, right = box(picture)
        assert picture.size == (64, 64) and 36 <= max(bottom - top, right - left) <= 64
        boxes.append((top, left, bottom, right))
    assert len(set(boxes)) > 20
    sides = [max(b - t, r - left) for t, left, b, r in boxes]
    assert min(sides) < 46 and max(sides) > 56


def test_it_is_mirrored_only_where_the_name_allows():
    def dark_side(mirror: bool) -> set[bool]:
        pictures = [scenes.framed(emoji("red"), np.random.default_rng(seed), mirror=mirror) for seed in range(20)]
        return {bool(where(p, (0, 0, 0))[1] < np.mean(box(p)[1::2])) for p in pictures}

    assert dark_side(True) == {True, False} and dark_side(False) == {True}
    assert scenes.is_mirrored("cat face")
    assert not scenes.is_mirrored("first quarter moon") and not scenes.is_mirrored("right arrow")


@pytest.mark.parametrize("colour", scenes.COLOURS)
@pytest.mark.parametrize("given", ["#f5a623", "#8a5a2b", "#777777", "#101010", "#ffffff"])
def test_a_recoloured_emoji_has_the_colour(given, colour):
    """Also if it was grey, black or white. Orange, yellow and pink are light: dark they have other names."""
    out = np.asarray(scenes.recoloured(emoji(given), colour), float)[64, 100]
    hue, saturation, value = colorsys.rgb_to_hsv(*(out[:3] / 255))
    assert out[3] == 255
    assert abs((hue * 360 - scenes.COLOURS[colour] + 180) % 360 - 180) < 6
    assert saturation > 0.25 and value > (0.7 if colour in scenes.BRIGHT else 0.4)


def test_transparency_and_black_outlines_survive_recolouring():
    before, after = (np.asarray(each) for each in (emoji("#f5a623"), scenes.recoloured(emoji("#f5a623"), "blue")))
    assert (before[..., 3] == after[..., 3]).all()
    assert after[60, 20, :3].max() < 40


@pytest.mark.parametrize(
    ("place", "expected"), [("beside", "left"), ("left of", "left"), ("and", "left"), ("above", "up"), ("on", "up")]
)
def test_two_stand_where_the_word_says(place, expected):
    red, blue = scenes.trimmed(emoji("red", (128, 90))), scenes.trimmed(emoji("blue"))
    for seed in range(10):
        picture = scenes.PLACES[place](red, blue, np.random.default_rng(seed))
        difference = where(picture, (0, 0, 255)) - where(picture, (255, 0, 0))
        assert abs(difference[0 if expected == "left" else 1]) < 24
        assert difference[1 if expected == "left" else 0] > 15
        top, left, bottom, right = box(picture)
        assert bottom - top > 24 and right - left > 24


def test_above_leaves_a_gap_and_on_touches():
    red, blue = scenes.trimmed(emoji("red")), scenes.trimmed(emoji("blue"))
    for place, gap in (("above", True), ("on", False)):
        rows = np.unique(inked(scenes.PLACES[place](red, blue, np.random.default_rng(0)))[:, 0])
        assert (np.diff(rows).max() > 1) == gap


def test_a_hat_stands_on_the_head_and_glasses_on_the_eyes():
    head, worn = emoji("red"), emoji("blue", (128, 112))
    tall = scenes.wearing(head, worn, kind="crown", level=0.45)
    blue, red = (where(tall.convert("RGB"), colour) for colour in ((0, 0, 255), (255, 0, 0)))
    assert blue[0] < red[0] and tall.height > tall.width
    flat = scenes.wearing(head, worn, kind="glasses", level=0.45)
    assert flat.size == scenes.trimmed(head).size
    assert where(flat.convert("RGB"), (0, 0, 255))[0] == pytest.approx(0.45 * flat.height, abs=3)


def test_which_heads_are_dressed():
    assert scenes.eyes("grinning face") and scenes.eyes("cat face") and scenes.eyes("panda")
    for name in ("cowboy hat face", "nerd face", "smiling face with sunglasses", "rocket", "cat"):
        assert scenes.eyes(name) is None


def test_no_two_parts_of_a_character_are_shown_together():
    for colour, head, worn in scenes.CHARACTERS:
        assert scenes.is_withheld(colour, head) and scenes.is_withheld(None, head, worn)
        assert scenes.is_withheld("red", head, worn) and scenes.is_withheld(colour, head, "glasses")
        assert scenes.is_withheld(colour, "dog face", worn)
        assert not scenes.is_withheld(None, head) and not scenes.is_withheld(colour, "dog face")
