"""The picture of a run's losses."""

import numpy as np
import pytest

from sdjax.train import curves

COLOURS = {name: tuple(bytes.fromhex(colour[1:])) for name, colour in curves._COLOURS.items()}


def lines(stage: str, losses: list[float | None], held_out: dict[int, float | None]) -> list[dict]:
    steps = [{"stage": stage, "step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    return [*steps, *({"stage": stage, "step": step, "held_out_loss": loss} for step, loss in held_out.items())]


def where(picture, name: str) -> np.ndarray:
    """The places (y, x) of a curve's colour below the legend, within the frame."""
    near = np.abs(np.asarray(picture, int) - COLOURS[name]).sum(-1) < 60
    near[:30], near[:, :60] = False, False
    return np.argwhere(near)


def test_a_falling_loss_falls_from_left_to_right():
    picture = curves.loss_curves(lines("style", list(np.linspace(1, 0.5, 200)), {0: 1.0, 100: 0.7, 200: 0.6}))
    for name in ("loss, smoothed", "held-out loss"):
        found = where(picture, name)
        left, right = found[found[:, 1] < 150], found[found[:, 1] > 650]
        assert left[:, 0].mean() + 50 < right[:, 0].mean()  # y goes down


def test_each_stage_has_its_panel():
    first, second = lines("style", [1.0, 0.9], {}), lines("moon", [3.0, 2.9], {})
    one, two = curves.loss_curves(first), curves.loss_curves(first + second)
    assert (two.width, two.height) == (one.width, 2 * one.height)
    assert (np.asarray(two)[: one.height] == np.asarray(one)).all()


@pytest.mark.parametrize("losses", [[0.5], [0.5, 0.5], [0.0], [None, 0.5, None]])
def test_few_equal_or_missing_losses_can_be_drawn(losses):
    assert len(where(curves.loss_curves(lines("style", losses, {0: None})), "loss, smoothed"))


def test_without_a_loss_there_is_nothing_to_draw():
    assert curves.loss_curves([]) is None
    assert curves.loss_curves(lines("style", [None], {0: 1.0})) is None


def test_smoothing_has_no_bias_and_follows():
    assert curves.smoothed([(1, 3.0), (2, 3.0)]) == [(1, 3.0), (2, pytest.approx(3.0))]
    assert curves.smoothed([(i, float(i > 100)) for i in range(200)])[-1][1] > 0.99


@pytest.mark.parametrize(("low", "high"), [(0, 90), (1, 2), (0.31, 0.3131), (-4e-7, 3e-7), (0, 120000)])
def test_ticks_are_round_and_within(low, high):
    ticks = curves._ticks(low, high)
    assert 3 <= len(ticks) <= 10 and all(low <= tick <= high for tick in ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
