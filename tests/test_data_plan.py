"""The order of examples: pure, complete, and the same however it is asked for."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdjax.data.plan import Plan, choose, describe

PLANS = st.builds(
    Plan,
    size=st.integers(1, 50),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 2**32 - 1),
    flip=st.booleans(),
    caption_dropout=st.floats(0, 1),
)


def stream(plan, batches, field="example"):
    return np.concatenate([getattr(choose(plan, n), field) for n in range(batches)])


@given(PLANS, st.integers(1, 4))
def test_every_epoch_shows_every_image_once(plan, epochs):
    batches = -(-epochs * plan.size // plan.batch_size)
    seen = stream(plan, batches)[: epochs * plan.size].reshape(epochs, plan.size)
    for epoch in seen:
        assert sorted(epoch) == list(range(plan.size))


@given(PLANS, st.integers(1, 16), st.integers(0, 20))
def test_the_stream_does_not_depend_on_the_batch_size(plan, other_size, number):
    """So neither accumulation nor the number of devices changes what is seen when."""
    other = plan._replace(batch_size=other_size)
    for field in ("example", "flip", "drop"):
        length = 3 * other_size
        batches = -(-length // plan.batch_size)
        np.testing.assert_array_equal(stream(plan, batches, field)[:length], stream(other, 3, field))
    again = choose(plan, number)
    for a, b in zip(choose(plan, number), again, strict=True):
        np.testing.assert_array_equal(a, b)


@given(PLANS)
def test_flips_and_drops_only_when_asked(plan):
    choice = choose(plan, 0)
    if not plan.flip:
        assert not choice.flip.any()
    if plan.caption_dropout == 0:
        assert not choice.drop.any()
    if plan.caption_dropout == 1:
        assert choice.drop.all()


def test_shares_are_as_asked():
    plan = Plan(size=1000, batch_size=1000, seed=3, flip=True, caption_dropout=0.1)
    flips, drops = stream(plan, 10, "flip"), stream(plan, 10, "drop")
    assert 0.48 < flips.mean() < 0.52
    assert 0.09 < drops.mean() < 0.11
    # Independent of each other and of the epoch.
    assert 0.47 < flips[drops].mean() < 0.53
    assert (flips[:1000] != flips[1000:2000]).any()


def test_epochs_and_seeds_differ():
    plan = Plan(size=100, batch_size=100, seed=0)
    assert (choose(plan, 0).example != choose(plan, 1).example).any()
    assert (choose(plan, 0).example != choose(plan._replace(seed=1), 0).example).any()


def test_the_order_is_fixed_for_all_time():
    plan = Plan(size=10, batch_size=5, seed=42, flip=True)
    choice = choose(plan, 3)
    assert choice.example.tolist() == [9, 6, 8, 0, 1]
    assert choice.flip.tolist() == [False, False, True, False, False]


def test_another_process_draws_the_same():
    code = "from sdjax.data.plan import *; c = choose(Plan(50, 8, 7, True, 0.5), 11); print([x.tolist() for x in c])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([x.tolist() for x in choose(Plan(50, 8, 7, True, 0.5), 11)])


def test_a_small_data_set_is_said_to_repeat():
    assert describe(Plan(64, 4, 0), 300) == "64 images, 4 a batch: 18.75 epochs"
    assert "each batch repeats some" in describe(Plan(3, 4, 0), 10)
