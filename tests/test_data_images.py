"""Image files of every kind, also broken and malicious ones."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdjax.data import images
from sdjax.data.images import (
    Crop,
    Size,
    find_subject,
    framed_on_subject,
    random_crops,
    read_mask,
    read_size,
    size_conditions,
    to_float,
)
from sdjax.data.images import read_image as read_views
from sdjax.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def halves(mode="RGB", size=(32, 32)):
    """An image whose left half is red and whose right half is blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def read_image(path, side, background="white"):
    """The middle square of an image."""
    (image,) = read_views(path, Size(side, side), background)
    return image


def near(pixel, colour, tolerance=3):
    return np.abs(pixel.astype(int) - np.array(colour)).max() <= tolerance


def test_a_plain_image_keeps_its_pixels(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", 16)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, random)
    scaled = to_float(read)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, random / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 32), (32, 64), (33, 47), (8, 20)])
def test_shorter_side_then_centre(tmp_path, size):
    halves(size=size).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", 16)
    assert read.shape == (16, 16, 3)
    assert near(read[8, 2], RED)
    assert near(read[8, 13], BLUE)


SUFFIXES = ["png", "jpg", "webp", "bmp", "gif", "tiff", "avif"]


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(suffix, mode) for suffix in SUFFIXES for mode in ("RGB", "L", "P") if (suffix, mode) != ("jpg", "P")]
    + [("jpg", "CMYK"), ("tiff", "CMYK")],
)
def test_formats_and_modes(tmp_path, suffix, mode):
    path = tmp_path / f"a.{suffix}"
    halves(mode).save(path)
    read = read_image(path, 32)
    if mode == "L":
        assert near(read[16, 4], (76, 76, 76), 8)
    else:
        assert near(read[16, 4], RED, 12)
        assert near(read[16, 28], BLUE, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    upright = Image.new("RGB", (32, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that exif_transpose inverts
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    read = read_image(tmp_path / "a.png", 32)
    assert near(read[4, 4], RED)
    oblong = upright.crop((0, 0, 32, 24))
    stored = oblong if orientation == 1 else oblong.transpose(Image.Transpose(undo[orientation]))
    stored.save(tmp_path / "b.png", exif=exif)
    assert read_size(tmp_path / "b.png") == Size(24, 32)
    assert all(near(read[y, x], WHITE) for y, x in ((4, 28), (28, 4), (28, 28)))


def transparent(mode):
    image = Image.new("RGBA", (16, 16), (0, 255, 0, 255))
    image.paste((9, 9, 9, 0), (8, 0, 16, 16))
    if mode == "P":
        image = Image.new("P", (16, 16), 1)
        image.putpalette([*RED, *GREEN, *BLUE])
        image.paste(0, (8, 0, 16, 16))
        image.info["transparency"] = 0
        return image
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize(("background", "colour"), [("white", WHITE), ("#0000ff", BLUE)])
def test_transparency_lies_on_the_background(tmp_path, mode, background, colour):
    transparent(mode).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", 16, background)
    assert near(read[8, 13], colour)
    assert near(read[8, 2], GREEN if mode != "LA" else (150, 150, 150))


def test_half_transparency_is_blended(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert near(read_image(tmp_path / "a.png", 8)[4, 4], (255, 127, 127))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tiff")
    for name in ("a.png", "a.tiff"):
        read = read_image(tmp_path / name, 16)
        np.testing.assert_allclose(read[..., 0], values / 257, atol=1)
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(DataError, match="not 8 or 16 bits"):
        read_image(tmp_path / "f.tiff", 16)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation_is_read(tmp_path, suffix, caplog):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert near(read_image(path, 16)[8, 8], RED, 12)
    assert "several frames" in caplog.text


def png_bytes(tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "whole.png")
    return (tmp_path / "whole.png").read_bytes()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("empty.png", lambda whole: b""),
        ("text.png", lambda whole: b"this is no image\n" * 20),
        ("half.png", lambda whole: whole[: len(whole) // 2]),
        ("head.png", lambda whole: whole[:20]),
        ("flipped.png", lambda whole: whole[:200] + bytes(b ^ 0xFF for b in whole[200:220]) + whole[220:]),
        ("script.png", lambda whole: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, damage):
    path = tmp_path / name
    path.write_bytes(damage(png_bytes(tmp_path)))
    with pytest.raises(DataError, match=rf"{name}: cannot be read as an image") as error:
        read_image(path, 16)
    assert len(str(error.value).splitlines()) == 1


def test_a_truncated_jpeg_is_named(tmp_path):
    halves(size=(256, 256)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=r"a.jpg: cannot be read"):
        read_image(tmp_path / "a.jpg", 16)


def test_a_vanished_file_or_a_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.png: cannot be read"):
        read_image(tmp_path / "gone.png", 16)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder.png: cannot be read"):
        read_image(tmp_path / "folder.png", 16)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    with pytest.raises(DataError, match=r"bomb.png: .*decompression bomb"):
        read_image(tmp_path / "bomb.png", 64)


def test_a_png_text_bomb_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 50_000_000, zip=True)
    halves().save(tmp_path / "bomb.png", pnginfo=text)
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(DataError, match=r"bomb.png: cannot be read"):
        read_image(tmp_path / "bomb.png", 32)


@pytest.mark.parametrize(
    ("size", "message"),
    [((1, 1), "too small"), ((7, 7), "too small"), ((20, 1000), "too narrow"), ((1000, 20), "too narrow")],
)
def test_hopeless_shapes_are_refused(tmp_path, size, message):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a.png: {size[0]}x{size[1]} is {message}"):
        read_image(tmp_path / "a.png", 64)


def gradients(path, size=(48, 16)):
    """An image whose red grows to the right and whose green grows downwards, by 5 a pixel."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    Image.fromarray(np.stack([5 * x, 5 * y, 0 * x], axis=-1).astype(np.uint8)).save(path)
    return path


def test_crops_of_any_shape(tmp_path):
    path = gradients(tmp_path / "a.png")
    left, middle, right, third = read_views(path, Size(16, 16), crops=[Crop(0), Crop(), Crop(1), Crop(1 / 4)])
    for image, start in ((left, 0), (middle, 16), (right, 32), (third, 8)):
        np.testing.assert_allclose(image[0, :, 0], 5 * np.arange(start, start + 16), atol=2)
        np.testing.assert_allclose(image[:, 0, 1], 5 * np.arange(16), atol=2)
    top, bottom = read_views(path, Size(4, 48), crops=[Crop(y=0), Crop(y=1)])
    assert top.shape == (4, 48, 3)
    np.testing.assert_allclose(top[:, 0, 1], 5 * np.arange(4), atol=2)
    np.testing.assert_allclose(bottom[:, 0, 1], 5 * np.arange(12, 16), atol=2)
    (smaller,) = read_views(path, Size(8, 8))  # scaled by half
    np.testing.assert_allclose(smaller[0, 2:6, 0], 5 * (16.5 + 2 * np.arange(2, 6)), atol=3)


def test_the_size_conditions_say_where_a_view_begins(tmp_path):
    """The colours of this image are the coordinates of its pixels."""
    image = np.zeros((30, 50, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:30, :50]
    Image.fromarray(image).save(tmp_path / "image.png")
    crops = (Crop(), Crop(0.0, 1.0), Crop(1.0, 0.2))
    for size in (Size(30, 20), Size(10, 50)):  # neither is resized
        views = read_views(tmp_path / "image.png", size, crops=crops)
        rows = size_conditions(Size(30, 50), size, crops, flip=True)
        assert rows.shape == (6, 6) and (rows[:, :2] == (30, 50)).all() and (rows[:, 4:] == size).all()
        for view, plain, mirrored in zip(views, rows[::2], rows[1::2], strict=True):
            assert (view[0, 0, :2] == plain[2:4]).all()
            assert (view[0, -1, :2] == (mirrored[2], 49 - mirrored[3])).all()


def test_the_size_conditions_measure_the_resized_image():
    rows = size_conditions(Size(60, 100), Size(40, 40), flip=True)
    np.testing.assert_array_equal(rows, [[60, 100, 0, 13, 40, 40]] * 2)  # 20 of 100 pixels, at 2/3 of their size
    np.testing.assert_array_equal(size_conditions(Size(10, 10), Size(40, 40))[0], [10, 10, 0, 0, 40, 40])


def test_random_crops_depend_on_seed_name_and_number_alone():
    first = random_crops(3, seed=1, name="a.png")
    assert random_crops(5, seed=1, name="a.png")[:3] == first
    assert len({*first, *random_crops(3, seed=2, name="a.png"), *random_crops(3, seed=1, name="b.png")}) == 9
    places = np.array(random_crops(2000, seed=0, name="c"))
    assert (places >= 0).all()
    assert (places <= 1).all()
    np.testing.assert_allclose(places.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(places.std(0), 12**-0.5, atol=0.02)
    assert random_crops(0, seed=1, name="a") == (Crop(),)


def test_too_small_for_an_oblong(tmp_path):
    Image.new("RGB", (100, 15)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"100x15 is too small for 64x128 pixels; at least 8x16"):
        read_views(tmp_path / "a.png", Size(128, 64))


def test_a_size_is_read_from_the_header_alone(tmp_path):
    halves(size=(40, 24)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:60])
    assert read_size(tmp_path / "a.png") == Size(24, 40)
    (tmp_path / "a.png").write_bytes(content[:10])
    with pytest.raises(DataError, match=r"a.png: cannot be read"):
        read_size(tmp_path / "a.png")


def test_a_mask_is_averaged_over_areas(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[:4, :4] = 255
    mask[4:8, 4:6] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    (read,) = read_mask(tmp_path / "a.png", Size(4, 4))
    expected = np.zeros((4, 4, 1), np.float32)
    expected[0, 0], expected[1, 1] = 1, 0.5
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, expected, atol=1e-6)


def test_a_mask_of_another_size_covers_the_image(tmp_path):
    """A smaller mask and one as large as the image show the same in every crop."""
    large = Image.new("L", (64, 32), 0)
    large.paste(255, (32, 0, 64, 16))
    large.save(tmp_path / "large.png")
    large.resize((16, 8), Image.Resampling.NEAREST).convert("RGB").save(tmp_path / "small.webp", lossless=True)
    crops = [Crop(), Crop(1, 1), Crop(3 / 4)]
    a, b = (read_mask(tmp_path / name, Size(4, 4), crops) for name in ("large.png", "small.webp"))
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(a[1][:, :, 0], [[1] * 4] * 2 + [[0] * 4] * 2, atol=1e-6)


def test_black_masks_are_refused_if_nothing_is_left(tmp_path):
    Image.new("L", (16, 16), 0).save(tmp_path / "black.png")
    with pytest.raises(DataError, match=r"black.png: the mask is all black"):
        read_mask(tmp_path / "black.png", Size(4, 4))
    edge = Image.new("L", (64, 16), 0)
    edge.paste(255, (60, 0, 64, 16))
    edge.save(tmp_path / "edge.png")
    with pytest.raises(DataError, match=r"edge.png: the mask is all black in the crops"):
        read_mask(tmp_path / "edge.png", Size(4, 4))
    assert read_mask(tmp_path / "edge.png", Size(4, 4), [Crop(), Crop(1)]).max() == 1


def test_the_alpha_channel_as_a_mask(tmp_path):
    transparent("RGBA").save(tmp_path / "a.png")
    (read,) = read_mask(tmp_path / "a.png", Size(4, 4), alpha=True)
    np.testing.assert_allclose(read[..., 0], [[1, 1, 0, 0]] * 4)
    halves().save(tmp_path / "opaque.png")
    with pytest.raises(DataError, match=r"opaque.png: has no alpha channel .*data.mask_path"):
        read_mask(tmp_path / "opaque.png", Size(4, 4), alpha=True)


def test_a_picture_is_read_whole_with_its_transparency(tmp_path, caplog):
    """The reader of drawing has the guards of training, but takes any shape."""
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(path)
    assert np.asarray(images.read_picture(path)).tolist() == [[0, 100, 255]]
    Image.new("RGBA", (90, 3), (1, 2, 3, 4)).save(path)
    assert images.read_picture(path).getpixel((0, 0)) == (1, 2, 3, 4)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert images.read_picture(tmp_path / "a.gif").convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert "holds several frames: the first is taken" in caplog.text


@pytest.mark.parametrize("kind", ["bomb", "postscript"])
def test_a_picture_to_draw_from_is_guarded(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "bomb":
        Image.new("1", (10_000, 10_000)).save(path)
    else:  # would be handed to Ghostscript
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image"):
        images.read_picture(path)


def test_deep_grey_is_not_clipped_in_the_library():
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert images.on_white(deep).getpixel((0, 0)) == (100, 100, 100)


def spot(colour=RED, background=WHITE, box=(10, 20, 30, 25), size=(64, 48)):
    """A rectangle on a plain background."""
    image = Image.new("RGB", size, background)
    image.paste(colour, box)
    return image


@pytest.mark.parametrize("colours", [(RED, WHITE), (WHITE, BLUE), (BLUE, GREEN)])
def test_the_subject_is_what_differs_from_the_border(colours):
    found = find_subject(spot(*colours))
    assert found[:4] == (10, 20, 30, 25)
    assert (found.length, found.background) == (20, colours[1])


@pytest.mark.parametrize("image", [spot(WHITE, (250, 250, 250)), Image.new("RGB", (8, 8), RED)])
def test_hardly_any_difference_is_no_subject(image):
    assert find_subject(image) is None


def test_transparency_is_the_background():
    image = Image.new("RGBA", (64, 48))
    image.paste((255, 255, 255, 255), (10, 20, 30, 25))  # as white as what is put behind it
    found = find_subject(image, "white")
    assert found[:4] == (10, 20, 30, 25)
    assert find_subject(image, "blue").background == BLUE


def test_a_photograph_has_no_plain_border_and_stays_whole(tmp_path):
    random = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert find_subject(random) is None
    assert framed_on_subject(random).tobytes() == random.tobytes()
    random.save(tmp_path / "a.png")
    (read,) = read_views(tmp_path / "a.png", Size(16, 16), on_subject=True)
    np.testing.assert_array_equal(read, np.asarray(random))


@pytest.mark.parametrize("box", [(40, 80, 120, 100), (0, 0, 80, 80), (176, 64, 256, 176), (20, 80, 256, 96)])
def test_a_framed_subject_fills_the_square_and_is_in_its_middle(box):
    framed = framed_on_subject(spot(background=GREEN, box=box, size=(256, 192)))
    length = max(box[2] - box[0], box[3] - box[1])
    assert framed.width == framed.height == max(round(length / 0.95), length)
    found = find_subject(framed)
    assert (found.length, found.background) == (length, GREEN)
    assert abs(found.left + found.right - framed.width) <= 1
    assert abs(found.top + found.bottom - framed.height) <= 1


def test_an_image_is_read_on_its_subject(tmp_path):
    spot(box=(10, 20, 29, 39)).save(tmp_path / "a.png")
    (read,) = read_views(tmp_path / "a.png", Size(20, 20), on_subject=True)
    assert (read == np.asarray(spot(box=(0, 0, 19, 19), size=(20, 20)))).all()
    (whole,) = read_views(tmp_path / "a.png", Size(20, 20))
    assert (whole != read).any()
