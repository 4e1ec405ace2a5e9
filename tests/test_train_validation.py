"""The pictures that a run draws while it trains."""

import numpy as np
import pytest
from PIL import Image

from sdjax.draw import grids

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
