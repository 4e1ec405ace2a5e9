"""Random masks are never empty, never change, and hide everything as often as they should."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdjax.data.holes import make_holes, random_hole
from sdjax.data.images import Size, random_crops
from sdjax.data.records import Record

SIZES = st.builds(Size, st.integers(8, 96), st.integers(8, 96))


SIZE = Size(32, 48)


def hole(number, size=SIZE, full=0.0, **changes):
    return random_hole(size, full, **{"seed": 1, "name": "a.png", "crop": 0, "number": number, **changes})


@given(SIZES, st.integers(0, 2**32 - 1), st.text(max_size=8), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_a_mask_is_never_empty_and_always_the_same(size, seed, name, number):
    first, second = (hole(number, size, seed=seed, name=name) for _ in range(2))
    assert first.shape == size and first.dtype == bool and first.any()
    np.testing.assert_array_equal(first, second)


def test_full_masks_have_their_share_and_the_others_differ():
    shares = np.array([hole(n, full=0.25).mean() for n in range(1000)])
    assert 0.22 < np.mean(shares == 1) < 0.28
    assert all(hole(n, full=1.0).all() for n in range(20))
    shares = np.array([hole(n).mean() for n in range(1000)])
    assert (shares < 1).all() and 0.2 < shares.mean() < 0.5 and np.std(shares) > 0.1


def test_image_crop_number_and_seed_each_matter():
    changes = [{}, {"crop": 1}, {"seed": 2}, {"name": "b.png"}]
    masks = {hole(n, **change).tobytes() for n in (0, 1) for change in changes}
    assert len(masks) == 8


def test_masks_are_the_same_in_every_version():
    """Strokes are left out, since their outlines depend on Pillow."""
    assert [n for n in range(16) if hole(n, full=0.25).all()] == [0, 5, 6, 7, 8, 10]
    for number, box in ((3, (1, 16, 14, 22)), (7, (16, 13, 37, 26))):
        mask = hole(number)
        assert Image.fromarray(mask).getbbox() == box
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])


def test_every_crop_has_different_masks():
    record = Record("a.png", None, "")
    crops = random_crops(3, seed=1, name=record.name)
    masks = make_holes(record, Size(16, 24), crops, count=2, full=0.0, seed=1)
    assert masks.shape == (3, 2, 16, 24)
    np.testing.assert_array_equal(masks[2, 1], hole(1, Size(16, 24), crop=2))
