"""The settings of a picture from its PNG text."""

import pytest
from PIL import Image

from sdjax.draw.reuse import settings_of
from sdjax.draw.settings import complete_job, labelled
from sdjax.errors import DataError
from sdjax.formats.png_parameters import parameters_text, parsed_parameters, save_png

A1111 = """a cat, (red:1.2) <lora:x:1>
second line: yes
Negative prompt: ugly, bad
more
Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 12, Size: 512x768, Model hash: abc, \
Denoising strength: 0.4, Hires upscale: 2, Hires upscaler: Latent, ENSD: 31337, \
Lora hashes: "x: 12, y: 2", Version: v1.6"""


def picture(text: str) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = text
    return image


def test_the_text_of_a1111_is_read():
    settings, left_out = settings_of(picture(A1111))
    assert settings == {
        **{"prompt": "a cat, (red:1.2) <lora:x:1>\nsecond line: yes", "negative_prompt": "ugly, bad\nmore"},
        **{"steps": 25, "sampler": "dpmpp_2m", "spacing": "karras", "guidance": 7.5, "seed": 12},
        **{"width": 512, "height": 768, "hires_scale": 2.0, "hires_strength": 0.4, "hires_upscaler": "latent"},
    }
    assert left_out == ["ENSD", "Lora hashes"]
    complete_job(settings)


def test_own_text_gives_the_settings_back(tmp_path):
    names = ["steps", "sampler", "spacing", "guidance", "clip_skip", "freeu", "fill", "only_masked", "mask_blur"]
    given = complete_job(
        {
            **{"steps": 7, "sampler": "euler_a", "spacing": None, "guidance": 3.5, "clip_skip": 2, "mask_blur": 5},
            **{"freeu": (1.1, 1.2, 0.9, 0.2), "fill": "noise", "only_masked": True},
        }
    )
    text = parameters_text("a, b: c", "no", {**labelled(given, names), "Denoising strength": 0.3, "Size": "64x32"})
    save_png(picture(text), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        settings, left_out = settings_of(image)
    assert left_out == [] and settings["prompt"] == "a, b: c" and settings["negative_prompt"] == "no"
    assert {name: settings[name] for name in names} == {name: given[name] for name in names}
    assert (settings["strength"], settings["width"], settings["height"]) == (0.3, 64, 32)


def test_values_that_sdjax_does_not_have_are_left_out():
    settings, left_out = settings_of(picture("x\nSteps: 0, Sampler: Magic, Size: large, CFG scale: 2"))
    assert settings == {"prompt": "x", "negative_prompt": "", "guidance": 2.0}
    assert left_out == ["Steps", "Sampler", "Size"]


@pytest.mark.parametrize("text", ["", "  ", None])
def test_a_picture_without_a_text_is_refused(text):
    with pytest.raises(DataError, match="holds no settings"):
        settings_of(picture(text))


def test_a_text_without_fields_is_a_prompt():
    assert parsed_parameters("a cat\nNegative prompt: dog") == ("a cat", "dog", {})
