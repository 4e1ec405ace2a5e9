"""Enlarging pictures: tiles, transparency, sizes, and the upscaler in a call to draw."""

import functools

import jax
import numpy as np
import pytest
from pictures import compilations, pixels_of
from PIL import Image
from upscalers import RRDB, random_rrdb, save_compact

import sdjax
from sdjax.data.images import Size, on_white
from sdjax.draw import upscaling
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import save_png
from sdjax.formats.safetensors_file import save_safetensors

SAMPLES = upscaling._EMBEDDED.parent.parent / "samples"
quickly = {"steps": 2, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    """The file of a random network that enlarges 2 times."""
    return save_compact(tmp_path_factory.mktemp("compact") / "my 2x.safetensors", scale=2)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def test_a_picture_in_tiles_is_the_whole_picture(compact, tmp_path, monkeypatch):
    """Beyond the margin of a tile its neighbour decides. The compact network of four layers reaches 4 pixels, less than
    the margin of 8: within 0.01 of 255 everywhere. The RRDBNet reaches 34 pixels: within 0.2 of 255.
    """
    save_safetensors(tmp_path / "rrdb.safetensors", random_rrdb(**RRDB | {"doublings": 1}))
    upscalers = [upscaling.load(path) for path in (compact, tmp_path / "rrdb.safetensors")]
    pixels = noise(70, 90, 3)
    wholes = [upscaler.applied(pixels) for upscaler in upscalers]
    shapes, compute = set(), upscaling._apply
    monkeypatch.setattr(upscaling, "TILE", 48)
    monkeypatch.setattr(upscaling, "_apply", lambda *args: shapes.add(args[2].shape) or compute(*args))
    for upscaler, whole, most in zip(upscalers, wholes, (0.01, 0.2), strict=True):
        tiled = upscaler.applied(pixels)
        assert tiled.shape == whole.shape == (140, 180, 3)
        error = 255 * np.abs(tiled - whole)
        print(f"{upscaler.name}: error in levels of 255: at most {error.max():.2f}, mean {error.mean():.4f}")
        assert error.max() < most
    assert shapes == {(1, 48, 48, 3)}


def test_the_result_is_resized_to_another_scale(compact):
    image = Image.fromarray((255 * noise(20, 30, 3)).astype(np.uint8))
    plain = sdjax.upscale(image, compact)
    assert plain.size == (60, 40) and plain.mode == "RGB"
    for scale, size in ((1, (30, 20)), (3.5, (105, 70)), (0.01, (1, 1)), (2, (60, 40))):
        resized = sdjax.upscale(image, compact, scale)
        assert resized.size == size
        np.testing.assert_array_equal(resized, plain.resize(size, Image.Resampling.LANCZOS))


def test_arrays_and_images_give_the_same(compact):
    image = Image.fromarray((255 * noise(20, 30, 4)).astype(np.uint8))
    values = np.asarray(image)
    expected = np.asarray(sdjax.upscale(image, compact))
    for given in (values, (values / 255).astype(np.float32), jax.numpy.asarray(values / np.float32(255))):
        np.testing.assert_array_equal(sdjax.upscale(given, compact), expected)
    grey = image.convert("L")
    np.testing.assert_array_equal(sdjax.upscale(grey, compact), sdjax.upscale(grey.convert("RGB"), compact))


def test_transparency_is_apply_and_hidden_colours_are_not_seen(compact):
    values = (255 * noise(24, 24, 4)).astype(np.uint8)
    values[..., 3] = np.where(np.arange(24) < 12, 0, 255)
    pictures = []
    for hidden in (0, 255):
        values[:, :12, :3] = hidden
        pictures.append(sdjax.upscale(Image.fromarray(values), compact))
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].mode == "RGBA" and pictures[0].size == (48, 48)
    alpha = np.asarray(pictures[0].getchannel("A"), np.float32)
    expected = sdjax.upscale(Image.fromarray(values[..., 3]), compact).convert("RGB")
    assert np.abs(alpha - np.asarray(expected.convert("L"), np.float32)).max() <= 1
    values[..., 3] = 255
    assert sdjax.upscale(Image.fromarray(values), compact).mode == "RGB"


def test_a_second_picture_of_one_size_compiles_nothing(compact):
    first, second = ((255 * noise(21, 33, 3, seed=seed)).astype(np.uint8) for seed in (0, 1))
    assert compilations(lambda: sdjax.upscale(first, compact)) == 1
    assert compilations(lambda: sdjax.upscale(second, compact, 3)) == 0


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = save_compact(tmp_path / "a.safetensors", scale=2)
    assert upscaling.load(path) is upscaling.load(str(path))
    assert sdjax.upscale(noise(8, 8, 3), path).size == (16, 16)
    save_compact(path, scale=4)
    assert sdjax.upscale(noise(8, 8, 3), path).size == (32, 32)


@pytest.mark.parametrize(
    ("image", "scale", "message"),
    [
        (None, None, r"image is a NoneType: give a PIL image, or \[H, W, 3 or 4\]"),
        (noise(8, 8, 2), None, r"array of float32 \(8, 8, 2\)"),
        (noise(1, 8, 8, 3), None, r"array of float32 \(1, 8, 8, 3\)"),
        (2 * noise(8, 8, 3), None, "array of float32"),
        (noise(8, 8, 3), 0, "scale = 0.0: expected above 0 and at most 16"),
        (noise(8, 8, 3), 17, "scale = 17.0: expected above 0 and at most 16"),
        (noise(8, 8, 3), "large", "scale = 'large': expected a number"),
        (noise(4, 2000, 3), 10, "upscaled by 10, 2000x4 gives 20000x40 pixels; at most 16384 a side"),
    ],
)
def test_a_wrong_image_or_scale_is_refused(image, scale, message, compact):
    with pytest.raises(ConfigError, match=message):
        sdjax.upscale(image, compact, scale)


def test_a_missing_upscaler_is_named():
    for name in ("none.pth", "a\0b"):
        with pytest.raises(DataError, match=r"upscaler .* expected a file or tiny"):
            sdjax.upscale(noise(8, 8, 3), name)


# ------------------------------------------------------------------------------------------------ the embedded one


def test_the_embedded_upscaler_is_better_than_lanczos():
    """On pictures that it has not seen, in another style: 64 pixels, and 16 made from them."""
    gains = []
    for file in sorted(SAMPLES.glob("*.png")):
        large = on_white(Image.open(file))
        small = large.resize((16, 16), Image.Resampling.BOX)
        error = lambda image, large=large: np.mean(np.square(np.asarray(image, np.float64) - np.asarray(large)))
        lanczos, ours = small.resize((64, 64), Image.Resampling.LANCZOS), sdjax.upscale(small, "tiny")
        gains.append(10 * np.log10(error(lanczos) / error(ours)))
    print(f"PSNR above Lanczos in dB: mean {np.mean(gains):.2f}, least {np.min(gains):.2f}")
    assert np.mean(gains) > 0.5


# ------------------------------------------------------------------------------------------------ drawing


def test_the_finished_picture_is_apply_and_says_so(tiny, compact):
    plain = tiny.text2image("red heart", **quickly)[0]
    drawn = tiny.text2image("red heart", upscale=compact.as_posix(), scale=3, **quickly)[0]
    assert drawn.size == (192, 192)
    np.testing.assert_array_equal(drawn, sdjax.upscale(plain, compact, 3))
    added = "Version: sdjax, Postprocess upscale by: 3, Postprocess upscaler: my 2x"
    assert drawn.info["parameters"] == plain.info["parameters"].replace("Version: sdjax", added)
    whole = tiny.text2image("red heart", upscale="tiny", **quickly)[0]
    assert whole.size == (256, 256)
    assert whole.info["parameters"].endswith("Postprocess upscale by: 4, Postprocess upscaler: tiny")
    redrawn = tiny.img2img("red heart", plain, upscale="tiny", strength=0.5, **quickly)[0]
    assert redrawn.size == (256, 256)


def test_text_of_a_picture_is_kept(tmp_path, compact):
    image = Image.new("RGB", (8, 8))
    assert "parameters" not in sdjax.upscale(image, compact).info
    image.info["parameters"] = "a cat\nSteps: 3"
    save_png(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        enlarged = sdjax.upscale(read, compact)
    added = "Postprocess upscale by: 2, Postprocess upscaler: my 2x"
    assert enlarged.info["parameters"] == f"a cat\nSteps: 3, {added}"


def test_the_second_pass_starts_from_the_upscaled_picture(tiny, compact):
    draw = functools.partial(tiny.text2image, "red heart", hires_scale=1.25, hires_strength=0.5, **quickly)
    first = tiny.text2image("red heart", **quickly)[0]
    for name, label in (("tiny", "tiny"), (str(compact), "my 2x")):
        drawn = draw(hires_upscaler=name)[0]
        assert f"Hires upscale: 1.25, Hires upscaler: {label}," in drawn.info["parameters"]
        start = sdjax.upscale(first, name, 1.25)
        assert start.size == (80, 80)
        expected = tiny.img2img("red heart", start, strength=0.5, **quickly)[0]
        assert np.abs(pixels_of([drawn]) - pixels_of([expected])).max() <= 1
        assert compilations(lambda name=name: draw(hires_upscaler=name)) == 0
    assert np.abs(pixels_of([drawn]) - pixels_of(draw(hires_upscaler="lanczos"))).max() > 10


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"upscale": "none.pth"}, DataError, "upscaler 'none.pth': no such file"),
        ({"upscale": "tiny", "scale": 20}, ConfigError, "scale = 20.0: expected above 0 and at most 16"),
        ({"scale": 2}, ConfigError, "scale is of an upscaler: give upscale too"),
        ({"upscale": "tiny", "scale": 16, "hires_scale": 8, "width": 1024}, ConfigError, "at most 16384 a side"),
        ({"upscale": ""}, ConfigError, "upscale = '': expected not empty"),
        ({"hires_scale": 2, "hires_upscaler": "latnet"}, DataError, "upscaler 'latnet': .* also latent or lanczos"),
    ],
)
def test_upscalers_are_checked_before_anything_is_drawn(tiny, settings, kind, message, monkeypatch):
    monkeypatch.setattr("sdjax.draw.loop.sample_latents", None)
    with pytest.raises(kind, match=message):
        tiny.text2image("red heart", **quickly, **settings)


def test_the_program_of_a_tile_is_that_of_the_platform():
    """A TPU's kernels divide a convolution into several, also where the program is traced on a machine without one."""
    tile = functools.partial(upscaling.load("tiny").program, Size(64, 64), 1)
    count = lambda platform: tile(platform).lower(lambda *arrays: arrays).as_text().count("convolution(")
    assert count("tpu") > count("cpu") > 0
