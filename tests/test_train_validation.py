"""The pictures that a run draws while it trains."""

import json
import logging

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdjax.draw import grids
from sdjax.train import likeness
from sdjax.train.loop import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_validation_leaves_pictures(finished):
    output, _ = finished
    names = {path.name for path in (output / "samples").iterdir()}
    steps = {f"style-{step}.png" for step in (0, 3, 6)}
    assert names == steps | {"style-before-after.png", "style-over-time.png"}
    for name in names:
        Image.open(output / "samples" / name).load()


def test_the_sheet_over_time_holds_the_pictures_of_each_validation_in_its_column(finished):
    samples = finished[0] / "samples"
    whole = np.asarray(Image.open(samples / "style-over-time.png"))
    for column, step in enumerate((0, 3, 6)):
        pictures = grids.uncaptioned(Image.open(samples / f"style-{step}.png"), 2, columns=4)
        for row, picture in enumerate(pictures):
            side = picture.width
            left, top = whole.shape[1] - (3 - column) * (side + 4), 22 + row * (side + 4)
            assert (whole[top : top + side, left : left + side] == np.asarray(picture)).all()


def spots(folder, count=6):
    """A folder of small discs on white, with captions."""
    folder.mkdir()
    for i in range(count):
        image = Image.new("RGB", (16, 16), "white")
        ImageDraw.Draw(image).ellipse((6, 6, 9, 9), (40 * i, 0, 0))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"disc {i}")
    return folder


def test_held_out_captions_are_drawn_and_measured_and_a_weight_is_named(settings, tmp_path, caplog):
    config = settings(
        data={"path": str(spots(tmp_path / "spots")), "validation_count": 2, "cache": str(tmp_path / "cache")},
        validation={"prompts": ["a cat"], "steps": 1, "held_out_pictures": 8, "weights": [0.5]},
    )
    with caplog.at_level(logging.INFO):
        assert train(config) == 0
    output = tmp_path / "run"
    (stage,) = (stage.name for stage in config.stages)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["held_out_distance"] for line in lines if "held_out_loss" in line}
    last = config.stages[0].steps
    assert {0, last} <= set(measured)
    # The rows of the sheet: the prompt, and the captions of the two held-out images.
    sheet = Image.open(output / f"samples/{stage}-before-after.png")
    pictures = [each.resize((16, 16), Image.Resampling.BOX) for each in grids.uncaptioned(sheet, 12, columns=4)]
    prompt, *held_out = (pictures[row : row + 4] for row in (0, 4, 8))
    true, _, half, whole = zip(*held_out, strict=True)
    assert np.asarray(prompt[0]).min() == 255  # no image belongs to the prompt
    assert measured[last] == pytest.approx(likeness.distance(whole, true), abs=1e-3)
    apart = {0.5: likeness.distance(half, true), 1.0: measured[last]}
    (said,) = [message for message in caplog.messages if "nearest to the held-out images" in message]
    assert f"weight {min(apart, key=apart.get):g} is nearest" in said
    assert f"0.5: {apart[0.5]:.3f}"[:-1] in said
