"""What a picture says of the settings it was drawn with."""

import dataclasses

import pytest

from sdjax.draw.loop import png_fields
from sdjax.draw.request import text2image_request


def fields(tiny, picture=0, *, strength=1.0, inpainted=False, **settings):
    outline = tiny.model.outline
    request = text2image_request(outline, ["a red heart", "a pizza"], "", {"seed": 7, "width": 96, **settings})
    return png_fields(dataclasses.replace(request, strength=strength), picture, "models/tiny", inpainted=inpainted)


def test_fields_are_those_a1111_writes(tiny):
    assert list(fields(tiny).items()) == [
        ("Steps", 20), ("Sampler", "DPM++ 2M"), ("Schedule type", "Automatic"), ("CFG scale", 7.5), ("Seed", 7),
        ("Size", "96x64"), ("Model", "tiny"),
    ]  # fmt: skip
    assert fields(tiny, 1)["Seed"] == 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"karras": True}, {"Schedule type": "Karras"}),
        ({"guidance_rescale": 0.7}, {"CFG Rescale": 0.7}),
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
def test_settings_that_are_not_the_default_are_named(tiny, settings, expected):
    found, plain = fields(tiny, **settings), fields(tiny)
    assert {label: value for label, value in found.items() if plain.get(label) != value} | {
        label: found[label] for label in expected
    } == expected


def test_inpainting_names_its_own_settings(tiny):
    with_mask = {"mask_blur": 0, "mask_grow": 3, "only_masked": True, "padding": 16}
    found = fields(tiny, inpainted=True, **{})
    assert "Mask grow" not in found and "Inpaint area" not in found
    settings = tiny.model.outline
    request = text2image_request(settings, "a", "", {})
    request = dataclasses.replace(request, settings={**request.settings, **with_mask, "fill": "noise"})
    found = png_fields(request, 0, "tiny", inpainted=True)
    assert {k: found[k] for k in ("Mask grow", "Masked content", "Inpaint area", "Masked area padding")} == {
        "Mask grow": 3, "Masked content": "latent noise", "Inpaint area": "Only masked", "Masked area padding": 16,
    }  # fmt: skip
    assert "Mask blur" not in found
