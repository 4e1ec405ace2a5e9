"""How near drawn pictures are to true ones, and what is said about their framing."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdjax.train import likeness


def disc(radius=20, centre=(32, 32), colour="red", side=64):
    """A disc on white."""
    image = Image.new("RGB", (side, side), "white")
    (x, y), pen = centre, ImageDraw.Draw(image)
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    return image


def broken(image):
    """The same colours in another order: the parts of the picture exchanged."""
    parts = np.asarray(image).reshape(4, 16, 4, 16, 3).transpose(0, 2, 1, 3, 4).reshape(16, 16, 16, 3)
    mixed = np.random.default_rng(0).permutation(parts).reshape(4, 4, 16, 16, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(mixed.reshape(64, 64, 3))


def test_the_distance_of_a_picture_from_itself_is_zero():
    assert likeness.distance([disc()], [disc()]) == 0


def test_place_and_size_hardly_count_and_colour_and_shape_do():
    true = disc()
    moved = likeness.distance([disc(radius=14, centre=(20, 40))], [true])
    recoloured = likeness.distance([disc(colour="blue")], [true])
    assert moved < 0.3 * recoloured
    assert moved < 0.3 * likeness.distance([broken(true)], [true])


def test_the_distance_is_the_mean_over_pictures():
    far = likeness.distance([disc(colour="blue")], [disc()])
    assert likeness.distance([disc(), disc(colour="blue")], [disc(), disc()]) == pytest.approx(far / 2)


def test_small_subjects_are_mentioned_with_their_share_and_what_helps():
    small, large = [disc(radius=10)] * 3, [disc(radius=30)] * 3
    said = likeness.framing_advice(small, large)
    assert "33%" in said and "95%" in said and "data.crop = 'subject'" in said
    assert likeness.framing_advice(large, large) is None
    assert likeness.framing_advice(large, small) is None


def test_nothing_is_said_of_pictures_without_a_plain_background():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert likeness.framing_advice([noise, noise, disc(radius=5)], [disc(radius=30)]) is None
    assert likeness.framing_advice([disc(radius=5)], [noise]) is None
