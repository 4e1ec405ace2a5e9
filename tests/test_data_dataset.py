"""Batches gathered from cached arrays, also ahead of time."""

import threading
import time

import numpy as np
import pytest

from sdjax.data.cache import Images, Texts
from sdjax.data.dataset import Dataset, Prior, join, make_batch, prefetch
from sdjax.data.order import Order, beside, choose
from sdjax.data.records import Record
from sdjax.errors import ConfigError

CAPTIONS = ("", "even", "odd", "odd too", "class")


def bucket(shape, *, images=6, views=2, start=0, **arrays):
    """Images with moments of 10 * example + view + start, and two captions each (`even` twice)."""
    versions = (("even", "even"), ("odd", "odd too"))
    records = tuple(Record(f"{i}.png", None, "", 1 + i % 2, versions=versions[i % 2]) for i in range(images))
    moments = np.zeros((images, views, *shape, 8), np.float32) + start
    moments += 10 * np.arange(images)[:, None, None, None, None] + np.arange(views)[None, :, None, None, None]
    return Images(records, {"moments": moments, **arrays}, ())


def texts():
    """Texts whose context is the caption's row; the empty caption has row 0."""
    context = np.arange(len(CAPTIONS), dtype=np.float32)[:, None, None] * np.ones((1, 4, 5), np.float32)
    return Texts({caption: row for row, caption in enumerate(CAPTIONS)}, {"context": context})


def dataset(*buckets):
    buckets = buckets or (bucket((2, 2)),)
    return Dataset(tuple(join(images, texts()) for images in buckets), texts().arrays, 0)


def test_a_batch_holds_what_the_order_says():
    data = dataset(bucket((2, 2), views=6))
    assert [each.tolist() for each in data.repeats] == [[1, 2, 1, 2, 1, 2]]
    order = Order(data.repeats, 4, seed=1, flip=True, caption_dropout=0.3, crops=3, versions=2)
    seen = set()
    for number in range(24):
        batch, choice = make_batch(data, order, number), choose(order, number)
        assert batch["index"].tolist() == [0, 1, 2, 3]
        assert batch["index"].dtype == np.int32
        assert batch["moments"].shape == (4, 2, 2, 8)
        view = 2 * choice.crop + choice.flip
        np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], 10 * choice.example + view)
        rows = np.where(choice.drop, 0, np.where(choice.example % 2, 2 + choice.version, 1))
        np.testing.assert_array_equal(batch["context"][:, 0, 0], rows)
        assert batch["context"].shape == (4, 4, 5)
        seen |= {("view", v) for v in view} | {("text", row) for row in rows}
    assert len(seen) == 6 + 4


def test_a_batch_has_one_shape():
    data = dataset(bucket((2, 4), views=1), bucket((4, 2), views=1, images=2, start=100))
    order = Order(data.repeats, 3, seed=0)
    shapes = []
    for number in range(24):
        moments = make_batch(data, order, number)["moments"]
        assert set(moments[:, 0, 0, 0] >= 100) == {moments.shape == (3, 4, 2, 8)}
        shapes.append(moments.shape[1:3])
    assert (shapes.count((2, 4)), shapes.count((4, 2))) == (18, 6)


def test_views_must_be_those_of_the_order():
    for order in (Order(((1,) * 6,), 4, 0), Order(((1,) * 6,), 4, 0, crops=2, flip=True)):
        with pytest.raises(ConfigError, match=r"wants \d views of each image, but the cache holds 2"):
            make_batch(dataset(), order, 0)


def test_masks_and_pixels_are_gathered_and_texts_may_be_missing():
    pixels = np.arange(12, dtype=np.uint8).reshape(6, 2, 1, 1, 1)
    mask = np.arange(12, dtype=np.float32).reshape(6, 2, 1, 1, 1)
    images = Images(bucket((1, 1)).records, {"pixels": pixels, "mask": mask}, ())
    data = Dataset((join(images, texts()),), {}, 0)
    order = Order(data.repeats, 5, 1, flip=True)
    batch = make_batch(data, order, 2)
    assert set(batch) == {"pixels", "mask", "index"}
    assert batch["pixels"].dtype == np.uint8
    np.testing.assert_array_equal(batch["pixels"], batch["mask"])


def test_holes_are_those_of_their_crop():
    """The value of every view encodes its example, its crop, its mask and whether it is mirrored."""
    example, crop, hole, flip = np.meshgrid(*map(np.arange, (6, 2, 3, 2)), indexing="ij")
    values = 1000 * example + 100 * crop + 10 * hole + flip
    arrays = {"moments": values[:, :, 0], "hole": values, "kept": values}
    arrays = {name: array.reshape(6, -1, 1, 1, 1) for name, array in arrays.items()}
    images = Images(bucket((1, 1)).records, arrays, ())
    data = Dataset((join(images, texts()),), {}, 0)
    order = Order(data.repeats, 5, 1, flip=True, crops=2, holes=3)
    for number in range(9):
        batch, choice = make_batch(data, order, number), choose(order, number)
        np.testing.assert_array_equal(batch["hole"], batch["kept"])
        np.testing.assert_array_equal(batch["hole"][:, 0, 0, 0] - batch["moments"][:, 0, 0, 0], 10 * choice.hole)
    with pytest.raises(ConfigError, match="wants 8 views of each image, but the cache holds 12"):
        make_batch(data, order._replace(holes=2), 0)


def test_class_images_follow_with_their_weight():
    """The mean of weight * error is the images' mean error plus 0.5 times the class images' mean error."""
    shapes = (2, 4), (4, 2)
    data = dataset(*(bucket(shape, start=100 * i) for i, shape in enumerate(shapes)))
    prior = tuple(bucket(shape, images=3, start=1000 + 100 * i) for i, shape in enumerate(shapes))
    prior = tuple(
        images._replace(records=tuple(r._replace(versions=("class",), repeats=1) for r in images.records))
        for images in prior
    )
    order = Order(data.repeats, 4, 2, flip=True, caption_dropout=0.5, versions=2)
    alone = data
    data = data._replace(prior=Prior(dataset(*prior).buckets, 0.5))
    for number in range(8):
        batch, without = make_batch(data, order, number), make_batch(alone, order, number)
        assert batch["index"].tolist() == list(range(8))
        for name in ("moments", "context"):
            np.testing.assert_array_equal(batch[name][:4], without[name])
        chosen, choice = choose(order, number), choose(beside(order, 3), number)
        expected = 1000 + 100 * chosen.bucket + 10 * choice.example + choice.flip
        np.testing.assert_array_equal(batch["moments"][4:, 0, 0, 0], expected)
        assert (batch["context"][4:] == CAPTIONS.index("class")).all()
        error = np.random.default_rng(number).random(8)
        assert np.mean(batch["weight"] * error) == pytest.approx(error[:4].mean() + 0.5 * error[4:].mean())
        # Two parts for accumulation take every second example each, so both get as many images as class images.
        for part in (0, 1):
            assert sorted(batch["weight"][part::2]) == [1, 1, 2, 2]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_order_does_not_depend_on_workers(workers):
    def make(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(prefetch(make, range(20), depth=5, workers=workers)) == list(range(20))


def test_batches_are_made_ahead_but_not_without_end():
    numbers = []

    def endless():
        number = 0
        while True:
            yield number
            number += 1

    batches = prefetch(lambda n: numbers.append(n) or n, endless(), depth=2)
    assert next(batches) == 0
    for _ in range(200):
        if len(numbers) == 3:
            break
        time.sleep(0.01)
    assert numbers == [0, 1, 2]
    batches.close()
    assert next(iter(prefetch(lambda n: n, range(0), depth=2)), None) is None


def test_an_error_is_raised_in_place_of_its_batch():
    def make(number):
        if number == 3:
            raise ValueError("batch 3 is bad")
        return number

    batches = prefetch(make, range(9))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="batch 3 is bad"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
