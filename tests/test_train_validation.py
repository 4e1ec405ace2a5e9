"""The pictures that a run draws while it trains."""

import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_every_validation_leaves_pictures(finished):
    output, _ = finished
    names = {path.name for path in (output / "samples").iterdir()}
    assert names == {"style-0.png", "style-3.png", "style-6.png", "style-before-after.png"}
    for name in names:
        Image.open(output / "samples" / name).load()
