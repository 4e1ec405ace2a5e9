"""The recipe of the embedded upscaler: pairs of crops, the file that training writes, and the measures."""

import jax
import numpy as np
import tiny_upscaler
from PIL import Image
from tiny_upscaler import CONFIG, CROP, Pairs

from sdjax.draw.upscaling import _EMBEDDED
from sdjax.formats.upscaler_file import read_upscaler


def pairs(count=3, versions=2):
    """Random small pictures, and large ones of the same pixels."""
    small = np.random.default_rng(0).integers(256, size=(count, 64, 64, 3)).astype(np.uint8)
    return Pairs(small.repeat(4, axis=1).repeat(4, axis=2), np.stack([small] * versions))


def test_crops_show_the_same_place_in_the_same_way():
    small, large = next(tiny_upscaler.batches([pairs(), pairs(2, 1)], 16, seed=0))
    assert small.shape == (16, CROP, CROP, 3) and large.shape == (16, 4 * CROP, 4 * CROP, 3)
    np.testing.assert_array_equal(small.repeat(4, axis=1).repeat(4, axis=2), large)
    assert len({picture.tobytes() for picture in small}) == 16
    again, _ = next(tiny_upscaler.batches([pairs(), pairs(2, 1)], 16, seed=0))
    np.testing.assert_array_equal(small, again)


def test_training_writes_a_file_that_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_upscaler, "CONFIG", CONFIG.__class__(features=4, layers=1, scale=4))
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        tiny_upscaler.train([pairs()], tmp_path / "a.safetensors", steps=50, batch=2, seed=0)
    config, params = read_upscaler(tmp_path / "a.safetensors")
    assert config == tiny_upscaler.CONFIG
    assert np.abs(params["body_4"]["kernel"]).max() > 0  # it began as 0


def test_the_embedded_upscaler_has_the_structure_of_the_recipe():
    assert read_upscaler(_EMBEDDED)[0] == CONFIG


def test_measures():
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(200, size=(32, 32, 3)).astype(np.uint8))
    brighter = Image.fromarray(np.asarray(picture) + np.uint8(5))
    assert abs(tiny_upscaler.ssim(picture, picture) - 1) < 1e-9
    assert abs(tiny_upscaler.psnr(picture, brighter) - 20 * np.log10(255 / 5)) < 1e-6
    noisy = Image.fromarray((np.asarray(picture) * 0.5 + random.integers(100, size=(32, 32, 3))).astype(np.uint8))
    assert tiny_upscaler.ssim(picture, noisy) < tiny_upscaler.ssim(picture, brighter) < 1
