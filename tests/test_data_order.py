"""The order of examples is pure and complete, and does not depend on how batches are requested."""

import subprocess
import sys

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.data.order import Order, beside, choose, describe

BUCKETS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12).map(tuple), min_size=1, max_size=4).map(tuple)
ORDERS = st.builds(
    Order,
    repeats=BUCKETS,
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
    flip=st.booleans(),
    caption_dropout=st.floats(0, 1),
    crops=st.integers(1, 3),
    versions=st.integers(1, 3),
    holes=st.integers(1, 3),
)
FIELDS = ("example", "flip", "drop", "crop", "version", "hole")


def plain(size, batch_size, seed, **settings):
    """One bucket, no repeats."""
    return Order(((1,) * size,), batch_size, seed, **settings)


def stream(order, batches, field="example", bucket=0):
    """The values of `field` that one bucket has in the first `batches` batches of all buckets."""
    choices = [choose(order, n) for n in range(batches)]
    empty = getattr(choose(order, 0), field)[:0]
    return np.concatenate([empty, *(getattr(c, field) for c in choices if c.bucket == bucket)])


def batches_for(order, examples, bucket):
    """A number of batches of all buckets in which this bucket shows at least `examples` examples."""
    return -(-(-(-examples // order.batch_size) * order.size) // sum(order.repeats[bucket]))


@given(ORDERS, st.data())
@settings(max_examples=50, deadline=None)
def test_every_epoch_shows_every_image_as_often_as_it_says(order, data):
    bucket = data.draw(st.integers(0, len(order.repeats) - 1))
    expected = np.repeat(np.arange(len(order.repeats[bucket])), order.repeats[bucket])
    seen = stream(order, batches_for(order, 2 * len(expected), bucket), bucket=bucket)
    for epoch in seen[: 2 * len(expected)].reshape(2, -1):
        np.testing.assert_array_equal(np.sort(epoch), expected)


@given(ORDERS, st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_buckets_take_turns_by_their_shares(order, batches):
    """After any number of batches, each bucket has had its share of them, rounded down or up."""
    buckets = [choose(order, n).bucket for n in range(batches)]
    for bucket, repeats in enumerate(order.repeats):
        share = batches * sum(repeats) / order.size
        assert np.floor(share) <= buckets.count(bucket) <= np.ceil(share)


@given(ORDERS, st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_every_image_is_seen_as_often_as_its_share_to_within_a_batch(order, batches):
    for bucket, repeats in enumerate(order.repeats):
        shown = np.bincount(stream(order, batches, bucket=bucket).astype(int), minlength=len(repeats))
        for count, times in zip(shown, repeats, strict=True):
            expected = batches * order.batch_size * times / order.size
            assert abs(count - expected) < order.batch_size + times


@given(ORDERS, st.integers(1, 16), st.data())
@settings(max_examples=50, deadline=None)
def test_the_stream_does_not_depend_on_the_batch_size(order, other_size, data):
    """So neither accumulation nor the number of devices changes the order of the examples."""
    bucket = data.draw(st.integers(0, len(order.repeats) - 1))
    other = order._replace(batch_size=other_size)
    length = 2 * sum(order.repeats[bucket]) + 1
    batches, others = batches_for(order, length, bucket), batches_for(other, length, bucket)
    for field in FIELDS:
        np.testing.assert_array_equal(
            stream(order, batches, field, bucket)[:length], stream(other, others, field, bucket)[:length]
        )


@given(ORDERS, st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_a_batch_is_a_pure_function_of_its_number(order, number):
    for a, b in zip(choose(order, number), choose(order, number), strict=True):
        np.testing.assert_array_equal(a, b)


@given(ORDERS)
@settings(max_examples=50, deadline=None)
def test_flips_and_drops_only_when_asked(order):
    choice = choose(order, 0)
    assert (choice.crop < order.crops).all()
    assert (choice.version < order.versions).all()
    assert (choice.hole < order.holes).all()
    if not order.flip:
        assert not choice.flip.any()
    if order.caption_dropout == 0:
        assert not choice.drop.any()
    if order.caption_dropout == 1:
        assert choice.drop.all()


def test_crops_are_taken_in_turn():
    order = Order(((1, 3, 2),), 4, 5, crops=4)
    example, crop = stream(order, 18), stream(order, 18, "crop")
    for image, repeats in enumerate(order.repeats[0]):
        shown = crop[example == image].reshape(-1, repeats)  # an epoch a row
        turns = np.arange(shown.size).reshape(-1, repeats) % 4
        np.testing.assert_array_equal(np.sort(shown, axis=1), np.sort(turns, axis=1))
        assert np.ptp(np.bincount(crop[example == image], minlength=4)) <= 1


def test_versions_and_holes_are_drawn_anew_each_time():
    order = plain(300, 300, 1, versions=3, holes=3, caption_dropout=0.5)
    versions, holes = stream(order, 6, "version"), stream(order, 6, "hole")
    assert np.bincount(3 * versions + holes).min() > 150  # each with each
    assert np.bincount(versions).min() > 500
    assert (versions[:300] != versions[300:600]).any()
    assert np.bincount(versions[stream(order, 6, "drop")]).min() > 230  # whether or not the caption is dropped


def test_buckets_do_not_share_their_order():
    order = Order(((1,) * 40, (1,) * 40), 40, 3)
    first, second = (choose(order, n) for n in (0, 1))
    assert {first.bucket, second.bucket} == {0, 1}
    assert (first.example != second.example).any()


def test_class_images_have_a_separate_order():
    order = Order(((1, 2), (1,)), 3, 7, flip=True, caption_dropout=1.0, crops=2, versions=4, holes=5)
    classes = beside(order, 5)
    seen = stream(classes, 5)
    np.testing.assert_array_equal(np.bincount(seen), [3] * 5)
    choice = choose(classes, 0)
    assert choice.bucket == 0
    assert not choice.drop.any()
    assert not (choice.crop.any() or choice.version.any())
    assert set(stream(classes, 20, "hole")) == set(range(5))


def test_shares_are_as_asked():
    order = plain(1000, 1000, 3, flip=True, caption_dropout=0.1)
    flips, drops = stream(order, 10, "flip"), stream(order, 10, "drop")
    assert 0.48 < flips.mean() < 0.52
    assert 0.09 < drops.mean() < 0.11
    # Independent of each other and of the epoch.
    assert 0.47 < flips[drops].mean() < 0.53
    assert (flips[:1000] != flips[1000:2000]).any()


def test_epochs_and_seeds_differ():
    order = plain(100, 100, 0)
    assert (choose(order, 0).example != choose(order, 1).example).any()
    assert (choose(order, 0).example != choose(order._replace(seed=1), 0).example).any()


def test_the_order_is_the_same_in_every_version():
    order = plain(10, 5, 42, flip=True)
    choice = choose(order, 3)
    assert choice.example.tolist() == [9, 6, 8, 0, 1]
    assert choice.flip.tolist() == [False, False, True, False, False]
    with_holes = choose(order._replace(holes=4), 3)
    assert [a.tolist() for a in with_holes[1:-1]] == [a.tolist() for a in choice[1:-1]]


def test_another_process_draws_the_same():
    order = Order(((1, 2, 1), (4,)), 8, 7, True, 0.5, 3, 3, 3)
    code = f"from sdjax.data.order import *; print([str(x) for n in range(9) for x in choose({order!r}, n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([str(x) for n in range(9) for x in choose(order, n)])


def test_the_log_describes_what_a_run_shows():
    assert describe(plain(64, 4, 0), 300) == "64 images, 4 a batch: 18.75 epochs"
    for names in ([], ["64x64"]):
        assert describe(plain(3, 4, 0), 10, names).endswith("than a batch holds, so each batch repeats some")
    order = Order(((1,) * 6, (1, 2)), 4, 0)
    assert describe(order, 18, ["512x512", "448x576"]) == (
        "8 images (9 with repeats), 4 a batch: 8 epochs; 2 shapes: 6 at 512x512, 2 at 448x576; "
        "fewer images than a batch holds at 448x576, so each such batch repeats some"
    )
