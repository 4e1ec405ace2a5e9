"""Shapes of about the same area, and the images that are trained at each shape."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax.data.buckets import assign, sizes
from sdjax.data.images import Size
from sdjax.data.records import scan


def test_the_shapes_of_512():
    assert [str(size) for size in sizes(512, step=64, max_aspect=2)] == [
        "384x640",
        "448x576",
        "512x512",
        "576x448",
        "640x384",
    ]
    assert Size(1024, 1024) in sizes(1024, step=64, max_aspect=2)
    assert Size(832, 1216) in sizes(1024, step=64, max_aspect=2)  # as in SDXL's own list


@given(st.integers(1, 128).map(lambda n: 8 * n), st.sampled_from([8, 16, 64]), st.floats(1, 8))
@settings(deadline=None)
def test_every_shape_fits_and_cannot_grow(resolution, step, aspect):
    shapes = sizes(resolution, step=step, max_aspect=aspect)
    assert len(set(shapes)) == len(shapes)
    assert [size.width / size.height for size in shapes] == sorted(size.width / size.height for size in shapes)
    assert set(shapes) == {Size(*reversed(size)) for size in shapes}
    if shapes == (Size(resolution, resolution),):
        return
    for size in shapes:
        assert size.height % step == size.width % step == 0
        assert max(size) <= aspect * min(size)
        assert size.height * size.width <= resolution**2
        assert (size.height + step) * size.width > resolution**2
        assert size.height * (size.width + step) > resolution**2


def test_a_step_too_coarse_leaves_the_square():
    assert sizes(128, step=256, max_aspect=2) == (Size(128, 128),)
    assert sizes(72, step=64, max_aspect=1) == (Size(64, 64),)


def test_images_go_to_the_nearest_shape(tmp_path):
    shapes = {"square": (100, 99), "wide": (300, 210), "very": (700, 100), "tall": (60, 80)}
    for name, shape in shapes.items():
        Image.new("RGB", shape).save(tmp_path / f"{name}.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (80, 60)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"no image")
    buckets = assign(scan(tmp_path, caption="x"), sizes(512, step=64, max_aspect=2))
    assert {str(size): [record.name for record in members] for size, members in buckets.items()} == {
        "448x576": ["tall.png", "turned.jpg"],
        "512x512": ["broken.png", "square.png"],
        "576x448": ["wide.png"],
        "640x384": ["very.png"],
    }


@pytest.mark.parametrize("aspect", [0.5, 0.9, 1.0, 1.2, 1.5, 3.0])
def test_nearest_is_by_the_ratio_of_ratios(tmp_path, aspect):
    Image.new("RGB", (round(600 * aspect), 600)).save(tmp_path / "a.png")
    choices = sizes(256, step=32, max_aspect=3)
    (chosen,) = assign(scan(tmp_path, caption="x"), choices)
    distance = {size: abs(math.log(size.width / size.height / aspect)) for size in choices}
    assert distance[chosen] == min(distance.values())
