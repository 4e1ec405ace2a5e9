"""Drawing from Python: seeds, batches, compiled programs, LoRAs, and errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import compilations, pixels_of, start, text_and_unet_lora
from PIL import Image

import sdjax
from sdjax import lora
from sdjax.draw.settings import SAMPLER_LABELS
from sdjax.errors import ConfigError, TrainingStopped

quickly = {"steps": 3, "progress": False}


def test_the_same_seed_draws_the_same_picture_whatever_its_batch(tiny):
    """Picture i of a call has seed + i, alone or among others, also with samplers that draw noise at every step."""
    for sampler in ("dpmpp_2m", "euler_a"):
        three = tiny.text2image("a red heart", seed=5, num_images=3, sampler=sampler, **quickly)
        assert len(three) == 3
        for i, picture in enumerate(three):
            alone = tiny.text2image("a red heart", seed=5 + i, sampler=sampler, **quickly)[0]
            assert np.abs(pixels_of([picture]) - pixels_of([alone])).max() <= 1
        assert np.abs(pixels_of(three[:1]) - pixels_of(three[1:2])).max() > 30


def test_a_picture_does_not_depend_on_its_neighbours_prompts(tiny):
    """Nor on how many chunks the longest of these prompts takes."""
    prompts = ["a red heart", "joker, " * 12, "taco"]
    negatives = ["", "grey", "hot dog " * 10]
    assert tiny.model.outline.tokenizers["tokenizer"].chunks(prompts[1]) > 1
    together = tiny.text2image(prompts, negatives, seed=3, **quickly)
    for i in range(3):
        alone = tiny.text2image(prompts[i], negatives[i], seed=3 + i, **quickly)[0]
        assert np.abs(pixels_of(together[i : i + 1]) - pixels_of([alone])).max() <= 1


def test_prompts_and_images_are_paired_in_order(tiny):
    four = tiny.text2image(["a red heart", "taco"], num_images=2, seed=1, **quickly)
    for i, prompt in enumerate(["a red heart", "a red heart", "taco", "taco"]):
        text = four[i].info["parameters"]
        assert text.startswith(prompt)
        assert f"Seed: {1 + i}," in text
    start_images = tiny.text2image(["a red heart", "taco"], **quickly)
    two = tiny.img2img("joker", start_images, num_images=2, strength=0.4, **quickly)
    for i, image in enumerate(start_images):
        alone = tiny.img2img("joker", image, seed=i, strength=0.4, **quickly)[0]
        assert np.abs(pixels_of([two[i]]) - pixels_of([alone])).max() <= 1


def test_a_refiner_that_is_the_same_model_changes_nothing(tiny):
    """For a method without history, in every way to draw, with a prompt that changes on the way."""
    refined = tiny.with_refiner("tiny", 0.5)
    how = {"steps": 4, "sampler": "ddim", "progress": False}
    image, mask = Image.new("RGB", (64, 64), "orange"), Image.new("L", (64, 64), 128)
    for draw in (
        lambda sd: sd.text2image(["a [red:blue:3] heart", "taco"], **how),
        lambda sd: sd.text2image("taco", hires_scale=1.25, **how),
        lambda sd: sd.img2img("taco", image, strength=0.75, **how),
        lambda sd: sd.inpaint("taco", image, mask, **how),
    ):
        drawn = draw(refined)
        np.testing.assert_array_equal(pixels_of(drawn), pixels_of(draw(tiny)))
        assert "Refiner: tiny, Refiner switch at: 0.5" in drawn[0].info["parameters"]


def test_a_refiner_needs_a_step(tiny):
    refined = tiny.with_refiner("tiny", 0.99)
    with pytest.raises(ConfigError, match=r"refiner switch 0\.99: none of 3 steps is left"):
        refined.text2image("taco", **quickly)


def test_there_is_one_program_for_each_shape(tiny):
    """Another seed, guidance, strength, prompt, sampler, spacing, number of steps or LoRA compiles nothing."""
    draw = functools.partial(tiny.text2image, progress=False)
    jax.clear_caches()
    assert compilations(lambda: draw("a red heart", "grey", steps=2)) > 0
    changes = [
        {"seed": 123456},
        {"guidance": 2.5},
        {"guidance": 0.0},
        {"guidance_rescale": 0.5},
        {"negative_prompt": "grey and blurry"},
        {"negative_prompt": ""},
        {"steps": 7},
        {"height": tiny.model.outline.native_size},
        {"latents": start(1, tiny.model.outline.unet.config.sample_size)},
        {"karras": True},
        {"spacing": "sgm_uniform", "sampler": "dpmpp_sde"},
        {"spacing": "trailing", "sampler": "ddim"},
        *({"sampler": sampler} for sampler in SAMPLER_LABELS),
    ]
    for change in changes:
        assert compilations(lambda change=change: draw("cyclone", **({"steps": 3} | change))) == 0, change
    assert compilations(lambda: draw("cyclone", steps=2, freeu=(1.3, 1.4, 0.9, 0.2))) > 0  # an input of its own
    assert compilations(lambda: draw("taco", steps=3, freeu=(1.1, 1.2, 0.6, 0.4))) == 0
    # Without guidance there is no negative prompt, so the batch is half as large: another shape.
    few = {"guidance": 1.0, "steps": 2}
    assert compilations(lambda: draw("cyclone", **few)) > 0
    for change in ({"negative_prompt": "grey"}, {"sampler": "lcm"}, {"sampler": "euler", "spacing": "trailing"}):
        assert compilations(lambda change=change: draw("cyclone", **(few | change))) == 0, change
    picture = draw("taco", steps=2)[0]
    redraw = functools.partial(tiny.img2img, "taco", picture, progress=False)
    redraw(strength=0.5, steps=4)
    for change in ({"strength": 0.8}, {"strength": 1.0}, {"steps": 6}, {"seed": 9}, {"sampler": "ddim"}):
        assert compilations(lambda change=change: redraw(**({"strength": 0.5, "steps": 4} | change))) == 0, change
    adapted = tiny.with_lora(text_and_unet_lora(tiny))
    assert compilations(lambda: adapted.text2image("taco", steps=2, progress=False)) == 0
    assert compilations(lambda: draw("taco", steps=2, height=32)) > 0  # the counter works


def test_a_model_is_left_as_it_is(tiny):
    before = pixels_of(tiny.text2image("taco", **quickly))
    adapted = tiny.with_lora(text_and_unet_lora(tiny), 0.5)
    assert np.abs(pixels_of(adapted.text2image("taco", **quickly)) - before).max() > 10
    np.testing.assert_array_equal(pixels_of(tiny.text2image("taco", **quickly)), before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.model = adapted.model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_nearly_the_same(tiny, dtype):
    half = sdjax.load("tiny", dtype)
    expected, drawn = (pixels_of(sd.text2image("a red heart", **quickly)) for sd in (tiny, half))
    assert np.abs(expected - drawn).mean() < 6
    assert half.params["unet"]["conv_in"]["kernel"].dtype == dtype


def test_transparent_and_grey_images_are_read(tiny):
    """Transparent pixels count as white, and grey as three equal channels."""
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    white, grey = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64), 128)
    draw = functools.partial(tiny.img2img, "taco", strength=0.5, **quickly)
    np.testing.assert_array_equal(pixels_of(draw(clear)), pixels_of(draw(white)))
    np.testing.assert_array_equal(pixels_of(draw(grey)), pixels_of(draw(grey.convert("RGB"))))
    assert draw(Image.new("RGB", (70, 45)))[0].size == (64, 40)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sampler": "magic"}, "sampler = 'magic': expected one of ddim, ddpm, pndm"),
        ({"steps": 0}, "steps = 0: expected at least 1 and at most 1000"),
        ({"negative_prompt": [5]}, r"negative_prompt = \[5\]: expected a text, or a list of texts"),
        ({"num_images": "2"}, "num_images = '2': expected a whole number"),
        ({"height": 60}, "height = 60: expected at least 8 and at most 16384, a multiple of 8"),
        ({"width": -8}, "width = -8"),
        ({"guidance": -1.0}, "guidance = -1.0: expected at least 0 and at most 1000"),
        ({"guidance_rescale": 2.0}, "guidance_rescale = 2.0: expected at least 0 and at most 1"),
        ({"clip_skip": 9}, r"clip_skip = 9: must lie in 1 \(last layer\)..3"),
        ({"clip_skip": 0}, "clip_skip = 0"),
        ({"num_images": 0}, "at least one picture is needed"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"karras": True, "sampler": "ddim"}, "'ddim' has no spacing 'karras'"),
        ({"latents": np.zeros((2, 16, 16, 4), np.float32)}, r"latents have shape \(2, 16, 16, 4\)"),
    ],
)
def test_bad_settings_are_named_before_anything_is_computed(tiny, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.text2image("taco", **({"progress": False} | how))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"strength": 0.0}, "strength = 0.0: expected above 0"),
        ({"strength": 1.5}, "strength = 1.5: expected above 0"),
        ({"strength": 0.05, "steps": 10}, "leaves none to run"),
        ({"latents": np.zeros((1, 8, 8, 4), np.float32)}, "latents have shape"),
    ],
)
def test_bad_img2img_settings_are_named(tiny, how, message):
    with pytest.raises(ConfigError, match=message):
        tiny.img2img("taco", Image.new("RGB", (64, 64)), **({"progress": False} | how))
    with pytest.raises(ConfigError, match="2 images for 3 pictures"):
        tiny.img2img("taco", [Image.new("RGB", (64, 64))] * 2, num_images=3)


def test_arguments_of_another_kind_are_named(tiny):
    with pytest.raises(ConfigError, match="prompt = 5: expected a text, or a list of texts"):
        tiny.text2image(5)
    for image in (np.zeros((64, 64, 3)), None, "a.png", []):
        with pytest.raises(ConfigError, match=f"image is a {type(image).__name__}: give a PIL image"):
            tiny.img2img("taco", image)
    with pytest.raises(ConfigError, match="image is a ndarray: give a PIL image"):
        tiny.inpaint("taco", np.zeros((64, 64, 3)), Image.new("L", (64, 64), 255))


def test_a_picture_that_is_not_a_number_is_an_error_and_no_black_picture(tiny):
    adapter = lora.init(jax.random.key(0), tiny.params["unet"], rank=2)
    adapter = lora.map_layers(lambda layer: layer | {"up": layer["up"] + 1e38}, adapter)
    with pytest.raises(TrainingStopped, match=r"the picture of 'taco' is not a number \(NaN\)"):
        tiny.with_lora({"unet": adapter}).text2image("taco", **quickly)


def test_each_picture_has_its_own_lora(tiny):
    """A batch with two adapters, for different parts, and no adapter, beside one model after the other."""
    first, second = text_and_unet_lora(tiny), {"unet": text_and_unet_lora(tiny, seed=1)["unet"]}
    weights = [0.5, 1.0, 1.0]
    together = tiny.with_loras([first, second, None], weights)
    latents = jnp.asarray(np.random.default_rng(3).normal(size=(3, 16, 16, 4)), jnp.float32)
    prompts = ["red heart", "dog face", "cat"]
    draw = lambda sd, prompts, latents: sd.text2image(prompts, "grey", steps=2, latents=latents, progress=False)
    pictures = draw(together, prompts, latents)
    alone = [tiny.with_lora(first, 0.5), tiny.with_lora(second), tiny]
    for i, (sd, prompt) in enumerate(zip(alone, prompts, strict=True)):
        expected = draw(sd, prompt, latents[i : i + 1])[0]
        assert np.abs(np.asarray(pictures[i], int) - np.asarray(expected, int)).max() <= 1
    assert np.abs(np.asarray(draw(tiny, "dog face", latents[1:2])[0], int) - np.asarray(pictures[1], int)).max() > 20
    with pytest.raises(ConfigError, match="3 LoRAs for 2 pictures"):
        draw(together, prompts[:2], latents[:2])
