import pytest
from PIL import Image

from sdjax.formats.png_parameters import parameters_text, save_png

FIELDS = {"Steps": 20, "Sampler": "DPM++ 2M", "CFG scale": 7.5, "Seed": 7}


def test_text_is_what_a1111_writes():
    assert parameters_text("a red heart", "", FIELDS).splitlines() == [
        "a red heart",
        "Steps: 20, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Version: sdjax",
    ]
    assert parameters_text("a pizza", "blurry", FIELDS).splitlines()[:2] == ["a pizza", "Negative prompt: blurry"]


def test_values_that_would_break_the_list_are_quoted():
    assert "Model: \"a, b: 'c'\"" in parameters_text("", "", {"Model": 'a, b: "c"'})


@pytest.mark.parametrize("prompt", ["two\nlines", "größe 絵文字 🍕", "x" * 5000, ""])
def test_text_survives_the_file(tmp_path, prompt):
    picture = Image.new("RGB", (8, 8), "red")
    picture.info["parameters"] = parameters_text(prompt, "", FIELDS)
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
