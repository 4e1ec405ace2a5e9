"""Guidance, the input of inpainting models, checks before drawing, and the text of a picture about its settings."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.draw import loop
from sdjax.draw.conditioning import Condition
from sdjax.draw.request import text2image_request
from sdjax.draw.sampling import Level
from sdjax.errors import ConfigError
from sdjax.model import Model

# ------------------------------------------------------------------------------------------------ guidance


class Unet:
    """Predicts the mean of the context in all cells, plus the number of input channels over 100."""

    def apply(self, variables, latents, timesteps, context, added):
        assert timesteps.shape == (len(context),) == (len(latents),) and added is None
        channels = latents.shape[-1] / 100
        return jnp.broadcast_to(context.mean((1, 2))[:, None, None, None] + channels, (*latents.shape[:3], 4))


def denoised(*texts, weights=(1.0,), guidance=3.0, rescale=0.0, split=False, channels=None):
    """What `guided_denoise` makes of contexts that are constants: the values of two pictures, without noise."""
    contexts = [jnp.broadcast_to(jnp.asarray(text, jnp.float32)[:, None, None], (2, 5, 3)) for text in texts]
    conditions = [Condition(context, None) for context in (contexts if split else [jnp.concatenate(contexts)])]
    level = Level(jnp.float32(500), jnp.float32(0.6), jnp.float32(0.8))
    out = loop.guided_denoise(
        Unet(), "epsilon", {}, jnp.zeros((2, 4, 4, 4), jnp.float32), level,
        conditions=conditions, weights=jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (2, len(weights))),
        guidance=jnp.float32(guidance), rescale=jnp.float32(rescale), channels=channels,
    )  # fmt: skip
    assert out.shape == (2, 4, 4, 4) and (out == out[:, :1, :1, :1]).all()
    return np.asarray(out[:, 0, 0, 0]) * 0.6 / -0.8 - 0.04  # the predicted noise, without the channels


NEGATIVE, FIRST, SECOND = np.array([[0.1, -0.2], [0.5, 1.0], [-0.3, 0.7]])


@pytest.mark.parametrize("split", [False, True])
def test_guidance_is_the_published_formula(split):
    np.testing.assert_allclose(denoised(FIRST, split=split), FIRST, rtol=1e-5)
    one = denoised(NEGATIVE, FIRST, guidance=3.0, split=split)
    np.testing.assert_allclose(one, NEGATIVE + 3 * (FIRST - NEGATIVE), rtol=1e-5)
    two = denoised(NEGATIVE, FIRST, SECOND, weights=(0.5, -2.0), guidance=3.0, split=split)
    expected = NEGATIVE + 3 * (0.5 * (FIRST - NEGATIVE) - 2 * (SECOND - NEGATIVE))
    np.testing.assert_allclose(two, expected, rtol=1e-5)


def test_further_channels_reach_the_unet():
    channels = jnp.ones((2, 4, 4, 5), jnp.float32)
    np.testing.assert_allclose(denoised(FIRST, channels=channels), FIRST + 0.05, rtol=1e-5)
    guided = denoised(NEGATIVE, FIRST, guidance=3.0, channels=channels)
    np.testing.assert_allclose(guided, NEGATIVE + 3 * (FIRST - NEGATIVE) + 0.05, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ inpainting


def test_an_inpainting_model_sees_the_mask_and_the_image_in_grey_there(micro_models):
    model = Model.load(micro_models(inpainting=True))
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(1, 16, 16, 3)).astype(np.float32)
    masks = np.zeros((1, 16, 16), np.float32)
    masks[:, 4:8, :6], masks[:, 12, 12] = 0.5, 0.4  # from 0.5 on a pixel is masked
    channels = np.asarray(loop.mask_channels(model, images, masks))
    assert channels.shape == (1, 8, 8, 5)
    expected = np.zeros((8, 8), np.float32)
    expected[2:4, :3] = 1
    np.testing.assert_array_equal(channels[0, ..., 0], expected)
    images[:, 4:8, :6] = 0.5
    np.testing.assert_allclose(channels[..., 1:], model.encode_image(images), atol=1e-5)


# ------------------------------------------------------------------------------------------------ checks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddim", "karras": True}, "'ddim' has no spacing 'karras'"),
        ({"spacing": "beta", "karras": True}, "karras and spacing 'beta' are both given: choose one"),
        ({"clip_skip": 9}, "clip_skip = 9"),
        ({"hires_scale": 2.0, "hires_steps": 1}, "strength 0.5 of 1 steps leaves none to run"),
        ({"sampler": "lcm", "hires_scale": 2.0, "hires_steps": 51}, "steps 51 must be at most 50"),
    ],
)
def test_both_passes_are_checked_without_weights(outline, settings, message):
    loop.check(outline, text2image_request(outline, "taco", "", {"hires_scale": 2.0}))
    with pytest.raises(ConfigError, match=message):
        loop.check(outline, text2image_request(outline, "taco", "", settings))


# ------------------------------------------------------------------------------------------------ the text


def fields(outline, picture=0, *, strength=1.0, inpainted=False, **settings):
    request = text2image_request(outline, ["a red heart", "a pizza"], "", {"seed": 7, "width": 96, **settings})
    request = dataclasses.replace(request, strength=strength)
    return loop.png_fields(request, picture, "models/tiny", inpainted=inpainted)


def test_fields_are_those_a1111_writes(outline):
    assert list(fields(outline).items()) == [
        ("Steps", 20), ("Sampler", "DPM++ 2M"), ("Schedule type", "Automatic"), ("CFG scale", 3.0), ("Seed", 7),
        ("Size", "96x64"), ("Model", "tiny"),
    ]  # fmt: skip
    assert fields(outline, 1)["Seed"] == 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"karras": True}, {"Schedule type": "Karras"}),
        ({"spacing": "karras", "karras": True}, {"Schedule type": "Karras"}),
        ({"spacing": "sgm_uniform"}, {"Schedule type": "SGM Uniform"}),
        ({"guidance_rescale": 0.7}, {"CFG Rescale": 0.7}),
        ({"freeu": [1.5, 1.6, 0.9, 0.2]}, {"FreeU": (1.5, 1.6, 0.9, 0.2)}),
        ({"strength": 0.5}, {"Denoising strength": 0.5}),
        ({"clip_skip": 2}, {"Clip skip": 2}),
        ({"sampler": "euler_a"}, {"Sampler": "Euler a"}),
        ({"emphasis": "no_norm"}, {"Emphasis": "No norm"}),
        (
            {"variation_strength": 0.3, "variation_seed": 4},
            {"Variation seed": 4, "Variation seed strength": 0.3, "Seed": 7},
        ),
        (
            {"hires_scale": 2.0, "hires_steps": 5},
            {"Denoising strength": 0.5, "Hires upscale": 2.0, "Hires steps": 5, "Hires upscaler": "Latent"},
        ),
        ({"inpainted": True}, {"Mask blur": 4}),
    ],
)
def test_settings_that_are_not_the_default_are_named(outline, settings, expected):
    named, plain = fields(outline, **settings), fields(outline)
    changed = {label: value for label, value in named.items() if plain.get(label) != value}
    assert changed | {label: named[label] for label in expected} == expected


def test_inpainting_names_the_settings_of_the_mask(outline):
    plain = fields(outline, inpainted=True)
    assert "Mask grow" not in plain and "Inpaint area" not in plain
    request = text2image_request(outline, "a", "", {})
    masking = {"mask_blur": 0, "mask_grow": 3, "only_masked": True, "padding": 16, "fill": "noise"}
    request = dataclasses.replace(request, settings={**request.settings, **masking})
    named = loop.png_fields(request, 0, "tiny", inpainted=True)
    expected = {
        "Mask grow": 3,
        "Masked content": "latent noise",
        "Inpaint area": "Only masked",
        "Masked area padding": 16,
    }
    assert {label: named[label] for label in expected} == expected
    assert "Mask blur" not in named
