"""Calls to draw: a prompt and a seed for each picture, sizes, noise, second passes and variations."""

import dataclasses
import functools

import numpy as np
import pytest
from pictures import compilations, pixels_of
from PIL import Image

from sdjax.draw.request import img2img_request, inpaint_request, slerp, text2image_request
from sdjax.errors import ConfigError

QUICKLY = {"steps": 3, "progress": False}


def test_a_request_has_a_prompt_and_a_seed_for_each_picture(outline):
    request = text2image_request(outline, ["a", "b"], ["x", "y"], {"num_images": 2, "seed": 5, "variation_seed": 9})
    assert (request.prompts, request.negatives) == (("a", "a", "b", "b"), ("x", "x", "y", "y"))
    assert (request.seeds, request.variation_seeds) == ((5, 6, 7, 8), (9, 10, 11, 12))
    varied = text2image_request(outline, "a", "", {"num_images": 3, "seed": 5, "variation_strength": 0.1})
    assert (varied.seeds, varied.variation_seeds) == ((5, 5, 5), (0, 1, 2))
    listed = text2image_request(outline, ["a", "b"], "", {"seed": [7, 3]})
    assert (listed.negatives, listed.seeds) == (("", ""), (7, 3))
    with pytest.raises(ConfigError, match="seed = 4294967296: expected at least 0 and at most 4294967295"):
        text2image_request(outline, ["a", "b"], "", {"seed": 2**32 - 1})


def test_the_size_is_that_of_the_model_the_latents_or_the_image(outline):
    assert text2image_request(outline, "a", "", {}).size == (64, 64)
    assert text2image_request(outline, "a", "", {"height": 96, "width": 32}).size == (96, 32)
    latents = np.zeros((1, 10, 12, 4), np.float32)
    assert text2image_request(outline, "a", "", {"latents": latents}).size == (40, 48)
    image = Image.new("RGB", (70, 45))
    request, images = img2img_request(outline, ["a", "b"], "", image, {"width": 80}, strength=0.5)
    assert request.size == (40, 80) and request.strength == 0.5 and images == [image]
    request, (frame,) = inpaint_request(outline, "a", "", image, Image.new("L", (7, 4), 255), {}, strength=1)
    assert request.size == frame.drawn == (48, 72) and frame.original.shape == (45, 70, 3)  # padded, then cut


def test_noise_depends_on_the_seed_alone(outline):
    noise = lambda **settings: np.asarray(text2image_request(outline, "a", "", settings).noise(outline))
    three = noise(seed=5, num_images=3)
    assert three.shape == (3, 16, 16, 4) and 0.9 < three.std() < 1.1
    # In a batch of another size XLA may round the inverse error function of the normal distribution differently.
    np.testing.assert_allclose(three[1:2], noise(seed=6, steps=3), rtol=0, atol=1e-6)
    np.testing.assert_allclose(noise(seed=5, variation_seed=6, variation_strength=1.0), three[1:2], atol=1e-5)
    request = text2image_request(outline, "a", "", {"seed": 5})
    assert np.abs(np.corrcoef(request.second_noise(outline).ravel(), three[0].ravel())[0, 1]) < 0.1
    given = text2image_request(outline, "a", "", {"latents": three[:1]})
    np.testing.assert_array_equal(given.noise(outline), three[:1])
    with pytest.raises(ConfigError, match=r"latents have shape \(3, 16, 16, 4\); this call needs \(1, 16, 16, 4\)"):
        text2image_request(outline, "a", "", {"latents": three}).noise(outline)


def test_guidance_is_that_of_the_model_unless_given(outline):
    guidance = lambda outline, **given: text2image_request(outline, "a", "", given).guidance
    assert guidance(outline) == guidance(outline, guidance=None) == 3.0
    assert (guidance(outline, guidance=0), guidance(outline, guidance=7)) == (0.0, 7.0)
    index = lambda **settings: dataclasses.replace(outline.folder, model_index=settings)
    assert guidance(dataclasses.replace(outline, folder=index())) == 7.5
    with pytest.raises(ConfigError, match="tiny: _guidance_scale = '3': expected a number"):
        guidance(dataclasses.replace(outline, folder=index(_guidance_scale="3")))


def test_the_second_pass_has_a_larger_size_and_its_own_steps(outline):
    settings = {"hires_scale": 1.3, "hires_strength": 0.4, "steps": 8, "seed": 5}
    assert text2image_request(outline, "a", "", {"steps": 8}).second_pass(outline) is None
    first = text2image_request(outline, "a", "", settings)
    second = first.second_pass(outline)
    assert (first.size, first.strength, first.earlier_steps) == ((64, 64), 1.0, 0)
    assert (second.size, second.strength, second.earlier_steps) == ((80, 80), 0.4, 8)
    assert (second.settings["steps"], second.seeds) == (8, (5,)) and second.second_pass(outline) is None
    other = text2image_request(outline, "a", "", settings | {"hires_steps": 5}).second_pass(outline)
    assert (other.settings["steps"], other.earlier_steps) == (5, 8)


@pytest.mark.parametrize("upscaler", ["latent", "lanczos"])
def test_a_second_pass_enlarges_the_first(tiny, upscaler):
    settings = {"guidance": 3.0, "seed": 5, "progress": False, "height": 64, "width": 64, "steps": 8}
    small = tiny.text2image("red heart", **settings)[0]
    settings |= {"hires_scale": 1.3, "hires_strength": 0.4, "hires_upscaler": upscaler}
    large = tiny.text2image("red heart", **settings)[0]
    assert large.size == (80, 80)
    text = large.info["parameters"]
    assert "Size: 64x64" in text and "Denoising strength: 0.4, Hires upscale: 1.3, Hires upscaler: " in text
    nearness = np.corrcoef(pixels_of([large.resize((64, 64))]).ravel(), pixels_of([small]).ravel())[0, 1]
    assert nearness > 0.6
    changed = settings | {"hires_strength": 0.8, "hires_steps": 5, "seed": 6}
    assert compilations(lambda: tiny.text2image("red heart", **changed)) == 0


def test_prompts_count_on_in_the_second_pass(tiny):
    """As in A1111, step numbers of a prompt go on from those of the first pass, and 1.5 is half of the second pass."""
    settings = {"guidance": 3.0, "progress": False}
    twice = {"hires_scale": 1.25, "hires_strength": 0.5, "hires_steps": 8, "hires_upscaler": "lanczos"}
    draw = functools.partial(tiny.text2image, steps=6, **twice, **settings)
    first = tiny.text2image("red heart", steps=6, **settings)
    for prompt, of_img2img in (
        ("red heart", "red heart"),
        ("[red heart:taco:6]", "taco"),
        ("[red heart:taco:1.0]", "taco"),
        ("[red heart:taco:8]", "[red heart:taco:2]"),
        ("[red heart:taco:1.5]", "[red heart:taco:2]"),  # 8 * 0.5 steps are run
    ):
        expected = tiny.img2img(of_img2img, first, steps=8, strength=0.5, height=80, width=80, **settings)
        np.testing.assert_array_equal(pixels_of(draw(prompt)), pixels_of(expected), err_msg=prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hires_scale": 0.5}, "hires_scale = 0.5: expected at least 1 and at most 8"),
        ({"hires_scale": 2.0, "hires_upscaler": ""}, "hires_upscaler = '': expected not empty"),
        ({"hires_scale": 2.0, "hires_strength": 0.0}, "hires_strength = 0.0: expected above 0"),
        ({"hires_scale": 2.0, "hires_steps": 5000}, "hires_steps = 5000: expected at least 1 and at most 1000"),
        ({"hires_scale": 2.0, "hires_steps": 1}, "strength 0.5 of 1 steps leaves none to run"),
        ({"variation_strength": 2.0}, "variation_strength = 2.0: expected at least 0 and at most 1"),
        ({"seed": [1, 2]}, "seed: 2 for 1 pictures"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny.text2image("taco", progress=False, **settings)


def test_slerp_keeps_the_variance_of_noise():
    start, end = np.random.default_rng(0).normal(size=(2, 3, 8, 8, 4)).astype(np.float32)
    np.testing.assert_allclose(slerp(start, end, 0.0), start, atol=1e-5)
    np.testing.assert_allclose(slerp(start, end, 1.0), end, atol=1e-5)
    np.testing.assert_allclose(slerp(start, start, 0.3), start, atol=1e-5)
    assert 0.9 < float(np.std(slerp(start, end, 0.5))) < 1.1


def test_variations_are_of_one_seed(tiny):
    """Strength 0 gives the picture of the seed, 1 that of the variation seed. Only the variation seed counts up."""
    draw = lambda **settings: tiny.text2image("red heart", guidance=3.0, **(QUICKLY | settings))
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
    """One program takes all seeds, variations, settings of both passes, and prompts that change by step."""
    in_tiles = tiny.with_tiled_vae(tile=32, overlap=8)
    draw = lambda **settings: in_tiles.text2image(**({"prompt": "red heart"} | QUICKLY | settings))
    twice = {"hires_scale": 1.25}
    first = [{"variation_strength": 0.2}, twice, twice | {"hires_upscaler": "lanczos", "variation_strength": 0.2}]
    for settings in first:
        draw(**settings)
    for settings in (
        {"seed": 9},
        {"variation_strength": 0.7, "seed": 3, "variation_seed": 8},
        {"sampler": "heun", "karras": True, "guidance": 2.0, "guidance_rescale": 0.5},
        {"prompt": "[taco|(heart:1.2)|dog]", "negative_prompt": "[cat:2]"},
        twice | {"hires_strength": 0.8, "hires_steps": 5, "seed": 6, "sampler": "euler_a"},
        twice | {"prompt": "[red heart:(taco:1.3):1.5]", "variation_strength": 0.4, "hires_upscaler": "lanczos"},
    ):
        assert compilations(lambda settings=settings: draw(**settings)) == 0, settings
