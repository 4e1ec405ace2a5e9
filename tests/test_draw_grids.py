"""Sheets and labelled grids, and the axes that a grid varies."""

import numpy as np
import pytest
from PIL import Image

from sdjax.draw import grids
from sdjax.errors import ConfigError


def places(sheet, colour):
    """The box (left, top, right, bottom) that a colour fills in a sheet; None if it is not there or has holes."""
    found = np.argwhere((np.asarray(sheet) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))).all(axis=-1))
    if not len(found):
        return None
    (top, left), (bottom, right) = found.min(axis=0), found.max(axis=0) + 1
    return (left, top, right, bottom) if len(found) == (right - left) * (bottom - top) else None


@pytest.mark.parametrize(("count", "columns", "size"), [(1, None, (8, 8)), (5, None, (24, 16)), (4, 1, (8, 32))])
def test_a_sheet_is_as_square_as_possible(count, columns, size):
    assert grids.sheet([Image.new("RGB", (8, 8))] * count, columns).size == size


def test_a_sheet_goes_row_by_row():
    whole = grids.sheet([Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")], 2)
    assert [places(whole, colour) for colour in ("red", "lime", "blue", "white")] == [
        (0, 0, 8, 6), (8, 0, 16, 6), (0, 6, 8, 12), (8, 6, 16, 12),
    ]  # fmt: skip


def test_a_grid_has_its_labels_above_and_beside_the_pictures():
    colours = ("red", "lime", "blue", "yellow")
    sizes = ((40, 30), (40, 30), (20, 30), (40, 30))
    pictures = [Image.new("RGB", size, colour) for colour, size in zip(colours, sizes, strict=True)]
    whole = grids.labelled(pictures, ["x: 1", "x: 2"], ["seed: 1", "seed: 2"])
    red, lime, blue, yellow = (places(whole, colour) for colour in colours)
    assert red[1] == lime[1] > 0 and red[0] == yellow[0] - (lime[0] - red[0]) > 0
    assert blue[1] == yellow[1] > red[3]
    assert blue[2] - blue[0] == 20 and blue[0] - red[0] == 10  # a smaller picture stands in the middle of its cell
    ink = np.asarray(whole.convert("L")) < 128
    assert ink[: red[1], red[0] : red[2]].any() and ink[: red[1], lime[0] : lime[2]].any()
    assert ink[red[1] : red[3], : red[0]].any() and ink[blue[1] : blue[3], : red[0]].any()
    without_rows = grids.labelled(pictures[:2], ["x: 1", "x: 2"], [])
    assert without_rows.height < whole.height and places(without_rows, "red")[0] < red[0]


def test_captions_stand_below_enlarged_pictures_and_are_cut_to_their_width():
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    whole = grids.captioned(pictures, ["short", "a very long caption " * 9, ""], columns=2)
    red, lime, blue = (places(whole, colour) for colour in ("red", "lime", "blue"))
    assert all(box[2] - box[0] == box[3] - box[1] == 192 for box in (red, lime, blue))
    assert red[1] == lime[1] and lime[0] > red[2] and blue[0] == red[0] and blue[1] > red[3]
    ink = np.asarray(whole.convert("L")) < 128
    caption = ink[red[3] : blue[1]]
    assert caption[:, red[0] : red[2]].any() and caption[:, lime[0] : lime[2]].any()
    assert not caption[:, lime[2] :].any() and not ink[blue[3] :].any()


@pytest.mark.parametrize(("count", "columns"), [(1, 4), (3, 2), (6, 4)])
def test_the_pictures_of_a_sheet_with_captions_are_found_again(count, columns):
    values = np.random.default_rng(0).integers(0, 256, (count, 150, 200, 3), np.uint8)
    whole = grids.captioned([Image.fromarray(each) for each in values], ["text"] * count, columns=columns)
    assert (np.stack(grids.uncaptioned(whole, count, columns=columns)) == values).all()


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("steps=10,20", "steps", (10, 20)),
        ("guidance = 2, 3.5", "guidance", (2.0, 3.5)),
        ("hires-upscaler=latent,lanczos", "hires_upscaler", ("latent", "lanczos")),
        ("prompt=a cat, a dog", "prompt", ("a cat", "a dog")),
        ("lora=none,a.pt:0.5", "lora", (("none",), ("a.pt:0.5",))),
    ],
)
def test_an_axis_is_a_setting_and_its_values(text, name, values):
    assert grids.parse_axis(text) == (name, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "grid 'steps': give NAME=VALUE,VALUE with a name of prompt, negative_prompt, seed"),
        ("height=64,128", "grid 'height=64,128': give NAME=VALUE,VALUE"),
        ("steps=10,many", "grid 'steps=10,many': steps = 'many': expected a whole number"),
        ("steps=0", "steps = 0: expected at least 1 and at most 1000"),
        ("sampler=euler,magic", "sampler = 'magic': expected one of ddim"),
    ],
)
def test_an_axis_that_cannot_be_varied_is_refused(text, message):
    with pytest.raises(ConfigError) as raised:
        grids.parse_axis(text)
    assert message in str(raised.value)


def test_files_on_an_axis_are_labelled_by_the_part_that_differs():
    files = "none,runs/rank1/export/style/lora.safetensors,runs/rank16/export/style/lora.safetensors"
    assert grids.parse_axis(f"lora={files}").labels == ["lora: none", "lora: rank1", "lora: rank16"]
    assert grids.parse_axis("lora=a/b.pt:0.5,a/b.pt:1").labels == ["lora: b.pt:0.5", "lora: b.pt:1"]
    assert grids.parse_axis("steps=5,6").labels == ["steps: 5", "steps: 6"]


def test_a_comma_in_a_value_is_escaped():
    assert grids.parse_axis(r"prompt=a\, b, c").values == ("a, b", "c")
