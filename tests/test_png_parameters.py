import dataclasses

import pytest
from PIL import Image

from sdjax.formats.png_parameters import SAMPLER_NAMES, parameters_text, save_png
from sdjax.request import Request
from sdjax.sampling import SAMPLERS

REQUEST = Request(("a red heart", "a pizza"), ("", "blurry"), seeds=(7, 8), height=64, width=96)


def text(picture: int = 0, **changes) -> str:
    return parameters_text(vars(dataclasses.replace(REQUEST, **changes)), picture, model="models/tiny")


def test_every_sampler_has_a_name():
    assert list(SAMPLER_NAMES) == list(SAMPLERS)


def test_text_is_what_a1111_writes():
    assert text().splitlines() == [
        "a red heart",
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7.5, Seed: 7, Size: 96x64, Model: tiny, "
        "Version: sdjax",
    ]


def test_each_picture_has_its_own_prompt_negative_and_seed():
    lines = text(1).splitlines()
    assert lines[:2] == ["a pizza", "Negative prompt: blurry"]
    assert "Seed: 8," in lines[2]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("karras", True, "Schedule type: Karras"),
        ("guidance_rescale", 0.7, "CFG Rescale: 0.7"),
        ("strength", 0.5, "Denoising strength: 0.5"),
        ("clip_skip", 2, "Clip skip: 2"),
        ("sampler", "euler_a", "Sampler: Euler a"),
    ],
)
def test_settings_that_are_not_the_default_are_named(field, value, expected):
    assert expected in text(**{field: value}).splitlines()[-1].split(", ")


def test_values_that_would_break_the_list_are_quoted():
    line = parameters_text(vars(REQUEST), 0, model='folder/a, b: "c"')
    assert "Model: \"a, b: 'c'\"" in line


@pytest.mark.parametrize("prompt", ["two\nlines", "größe 絵文字 🍕", "x" * 5000, ""])
def test_text_survives_the_file(tmp_path, prompt):
    picture = Image.new("RGB", (8, 8), "red")
    picture.info["parameters"] = text(prompts=(prompt,), negatives=("",))
    save_png(picture, tmp_path / "a b ü.png")
    with Image.open(tmp_path / "a b ü.png") as read:
        read.load()
        assert read.text["parameters"] == picture.info["parameters"]  # type: ignore[attr-defined]
        assert read.getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_without_settings_is_written_without_text(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as read:
        assert "parameters" not in read.info


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    save_png(Image.new("RGB", (8, 8), "red"), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(Image.new("HSV", (8, 8)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
