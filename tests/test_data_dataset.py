"""Batches gathered from cached arrays, and made ahead of time."""

import threading
import time

import numpy as np
import pytest

from sdjax.data.cache import Latents, Texts
from sdjax.data.dataset import Dataset, join, make_batch, prefetch
from sdjax.data.plan import Plan, choose
from sdjax.data.records import Record
from sdjax.errors import ConfigError


def dataset(flips=2) -> Dataset:
    """moments: 10 * example + flip; context: the row of the caption; the empty caption is row 0."""
    records = tuple(Record(f"{i}.png", None, "odd" if i % 2 else "even") for i in range(6))
    moments = np.zeros((6, flips, 2, 2, 8), np.float32)
    moments += 10 * np.arange(6)[:, None, None, None, None] + np.arange(flips)[None, :, None, None, None]
    rows = {"": 0, "even": 1, "odd": 2}
    context = np.arange(3, dtype=np.float32)[:, None, None] * np.ones((1, 4, 5), np.float32)
    return join(Latents(records, moments, ()), Texts(rows, {"context": context}))


def test_a_batch_holds_what_the_plan_says():
    plan = Plan(size=6, batch_size=4, seed=1, flip=True, caption_dropout=0.3)
    dropped = 0
    for number in range(12):
        batch, choice = make_batch(dataset(), plan, number), choose(plan, number)
        assert batch["index"].tolist() == [0, 1, 2, 3]
        assert batch["index"].dtype == np.int32
        assert batch["moments"].shape == (4, 2, 2, 8)
        np.testing.assert_array_equal(batch["moments"][:, 0, 0, 0], 10 * choice.example + choice.flip)
        rows = np.where(choice.drop, 0, 1 + choice.example % 2)
        np.testing.assert_array_equal(batch["context"][:, 0, 0], rows)
        assert batch["context"].shape == (4, 4, 5)
        dropped += choice.drop.sum()
    assert dropped


def test_flipping_needs_mirrored_latents():
    with pytest.raises(ConfigError, match="no mirrored"):
        make_batch(dataset(flips=1), Plan(6, 4, 0, flip=True), 0)


@pytest.mark.parametrize("workers", [1, 4])
def test_the_order_does_not_depend_on_workers(workers):
    def make(number):
        time.sleep(0.002 * (number % 3))
        return number

    assert list(prefetch(make, range(20), depth=5, workers=workers)) == list(range(20))


def test_batches_are_made_ahead_but_not_without_end():
    made = []

    def endless():
        number = 0
        while True:
            yield number
            number += 1

    batches = prefetch(lambda n: made.append(n) or n, endless(), depth=2)
    assert next(batches) == 0
    for _ in range(200):
        if len(made) == 3:
            break
        time.sleep(0.01)
    assert made == [0, 1, 2]
    batches.close()
    assert next(iter(prefetch(lambda n: n, range(0), depth=2)), None) is None


def test_an_error_comes_out_at_its_place():
    def make(number):
        if number == 3:
            raise ValueError("batch 3 is bad")
        return number

    batches = prefetch(make, range(9))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="batch 3 is bad"):
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
