"""Tiled autoencoders, second passes over enlarged pictures, variations of a seed's noise."""

import functools

import numpy as np
import pytest
from pictures import compilations, pixels_of

from sdjax.draw.request import slerp
from sdjax.errors import ConfigError
from sdjax.models.tiling import Tiling, tiled

quickly = {"steps": 3, "progress": False}


def test_tiles_of_a_pointwise_function_give_the_whole():
    values = np.random.default_rng(0).normal(size=(1, 36, 52, 3)).astype(np.float32)
    shapes = set()

    def enlarge(piece):
        shapes.add(piece.shape)
        return np.repeat(np.repeat(2 * piece, 4, 1), 4, 2)

    found = tiled(enlarge, values, Tiling(64, 16), factor=4, encode=False, channels=3)
    np.testing.assert_allclose(found, np.repeat(np.repeat(2 * values, 4, 1), 4, 2), rtol=1e-5, atol=1e-6)
    assert shapes == {(1, 16, 16, 3)}
    back = tiled(lambda piece: piece[:, ::4, ::4] / 2, found, Tiling(64, 16), factor=4, encode=True, channels=3)
    np.testing.assert_allclose(back, values, rtol=1e-5, atol=1e-6)


def test_tiles_are_nearly_the_whole_and_show_no_seam(tiny):
    """The norms' statistics are each tile's own, so tiles differ in colour: side by side they show it, blended not."""
    image = tiny.text2image("cat face", guidance=3.0, height=128, width=128, steps=8, progress=False)[0]
    parts = tiny.with_tiled_vae(tile=64, overlap=24)
    latents = np.asarray(tiny.encode_image([image]))
    error = np.abs(np.asarray(parts.encode_image([image])) - latents)
    whole, blended = np.asarray(tiny.decode_latents(latents)), np.asarray(parts.decode_latents(latents))
    halves = [np.asarray(tiny.decode_latents(latents[:, :, start : start + 16])) for start in (0, 16)]
    beside = np.concatenate(halves, axis=2)

    def seam(decoded):  # the largest step between columns of what is off by, where tiles meet or overlap
        off = (decoded - whole)[0].mean(axis=0) * 255
        return np.abs(np.diff(off, axis=0))[32:96].max()

    print(f"latents within {error.mean():.3f} of {latents.std():.2f} (mean); a seam of {seam(blended):.1f} / 255")
    assert error.mean() < 0.12 * latents.std()
    assert np.abs(blended - whole).mean() * 255 < 4
    assert seam(blended) < seam(beside) / 8


def test_tiles_share_one_program_whatever_the_picture(tiny):
    parts = tiny.with_tiled_vae(tile=32, overlap=8)
    rng = np.random.default_rng(0)
    picture = lambda height, width: rng.uniform(size=(1, height, width, 3)).astype(np.float32)
    from sdjax.draw import pipeline

    before = pipeline._decode_latents._cache_size(), pipeline._encode_image._cache_size()
    for size in ((64, 64), (48, 104)):
        parts.decode_latents(parts.encode_image(picture(*size)))
    after = pipeline._decode_latents._cache_size(), pipeline._encode_image._cache_size()
    assert all(b - a <= 1 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("how", [(8, 0), (64, 33), (64, -1)])
def test_tiles_that_cannot_be_are_told(tiny, how):
    with pytest.raises(ConfigError, match="overlap"):
        tiny.with_tiled_vae(*how)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_enlarges_the_first(tiny, upscaler):
    how = {"guidance": 3.0, "seed": 5, "progress": False, "height": 64, "width": 64, "steps": 8}
    small = tiny.text2image("red heart", **how)[0]
    how |= {"hires_scale": 1.3, "hires_strength": 0.4, "hires_upscaler": upscaler}
    large = tiny.text2image("red heart", **how)[0]
    assert large.size == (80, 80)
    text = large.info["parameters"]
    assert "Size: 64x64" in text and "Denoising strength: 0.4, Hires upscale: 1.3, Hires upscaler: " in text
    nearness = np.corrcoef(pixels_of([large.resize((64, 64))]).ravel(), pixels_of([small]).ravel())[0, 1]
    assert nearness > 0.6
    change = how | {"hires_strength": 0.8, "hires_steps": 5, "seed": 6}
    assert compilations(lambda: tiny.text2image("red heart", **change)) == 0


def test_prompts_count_on_in_the_second_pass(tiny):
    """As in A1111: steps go on from the first pass's, and 1.5 is half of the second."""
    how = {"guidance": 3.0, "progress": False}
    draw = functools.partial(
        tiny.text2image, steps=6, hires_scale=1.25, hires_strength=0.5, hires_steps=8, hires_upscaler="lanczos", **how
    )
    first = tiny.text2image("red heart", steps=6, **how)
    for prompt, of_an_image in (
        ("red heart", "red heart"),
        ("[red heart:taco:6]", "taco"),
        ("[red heart:taco:1.0]", "taco"),
        ("[red heart:taco:8]", "[red heart:taco:2]"),
        ("[red heart:taco:1.5]", "[red heart:taco:2]"),  # 8 * 0.5 steps run
    ):
        wanted = tiny.img2img(of_an_image, first, steps=8, strength=0.5, height=80, width=80, **how)
        np.testing.assert_array_equal(pixels_of(draw(prompt)), pixels_of(wanted), err_msg=prompt)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"hires_scale": 0.5}, "hires_scale = 0.5: expected at least 1 and at most 8"),
        ({"hires_scale": 2.0, "hires_upscaler": "magic"}, "hires_upscaler = 'magic': expected one of latent, lanczos"),
        ({"hires_scale": 2.0, "hires_strength": 0.0}, "hires_strength = 0.0: expected above 0"),
        ({"hires_scale": 2.0, "hires_steps": 5000}, "hires_steps = 5000: expected at least 1 and at most 1000"),
        ({"hires_scale": 2.0, "hires_steps": 1}, "strength 0.5 of 1 steps leaves none to run"),
        ({"variation_strength": 2.0}, "variation_strength = 2.0: expected at least 0 and at most 1"),
        ({"seed": [1, 2]}, "seed: 2 for 1 pictures"),
    ],
)
def test_bad_settings_are_told_before_anything_is_drawn(tiny, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.text2image("taco", progress=False, **how)


def test_slerp_keeps_noise_noise():
    start, end = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(slerp(start, end, 0.0), start, atol=1e-5)
    np.testing.assert_allclose(slerp(start, end, 1.0), end, atol=1e-5)
    np.testing.assert_allclose(slerp(start, start, 0.3), start, atol=1e-5)
    assert 0.9 < float(np.std(slerp(start, end, 0.5))) < 1.1


def test_variations_are_of_one_seed(tiny):
    """At strength 0 the seed's picture, at 1 the other's; between, the second seed counts up."""
    draw = lambda **how: tiny.text2image("red heart", guidance=3.0, **(quickly | how))
    three = draw(seed=5, variation_seed=9, variation_strength=0.4, num_images=3)
    for i, picture in enumerate(three):
        assert "Seed: 5," in picture.info["parameters"]
        assert f"Variation seed: {9 + i}, Variation seed strength: 0.4" in picture.info["parameters"]
        (alone,) = draw(seed=5, variation_seed=9 + i, variation_strength=0.4)
        assert np.abs(pixels_of([picture]) - pixels_of([alone])).max() <= 1
    assert np.abs(pixels_of(three[:1]) - pixels_of(three[1:2])).max() > 10
    other = draw(seed=5, variation_seed=9, variation_strength=1.0)
    assert np.abs(pixels_of(other) - pixels_of(draw(seed=9))).max() <= 1
    mixed = draw(seed=[9, 4], num_images=2)
    assert np.abs(pixels_of(mixed[:1]) - pixels_of(draw(seed=9))).max() <= 1


def test_nothing_is_compiled_within_a_shape(tiny):
    """Seeds, variations, settings of both passes and prompts that change by step are numbers, not programs."""
    parts = tiny.with_tiled_vae(tile=32, overlap=8)
    draw = lambda **how: parts.text2image(**({"prompt": "red heart"} | quickly | how))
    twice = {"hires_scale": 1.25}
    begin = [{"variation_strength": 0.2}, twice, twice | {"hires_upscaler": "lanczos", "variation_strength": 0.2}]
    for how in begin:
        draw(**how)
    for how in (
        {"seed": 9},
        {"variation_strength": 0.7, "seed": 3, "variation_seed": 8},
        {"sampler": "heun", "karras": True, "guidance": 2.0, "guidance_rescale": 0.5},
        {"prompt": "[taco|(heart:1.2)|dog]", "negative_prompt": "[cat:2]"},
        twice | {"hires_strength": 0.8, "hires_steps": 5, "seed": 6, "sampler": "euler_a"},
        twice | {"prompt": "[red heart:(taco:1.3):1.5]", "variation_strength": 0.4, "hires_upscaler": "lanczos"},
    ):
        assert compilations(lambda how=how: draw(**how)) == 0, how
