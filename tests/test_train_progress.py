"""The progress bar: what it says, and which time it counts."""

import sys
import time

import pytest

from sdjax.train.progress import COMPILING, Progress


def test_it_shows_a_running_clock_while_it_waits_and_then_the_steps(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress("style", steps=4, done=0, shown=True)
    with progress.waiting(COMPILING):
        time.sleep(1.2)
    progress.show(held_out=0.51)
    for loss in (1.0, 0.25):
        progress.show(loss=loss)
        progress.step()
    progress.close()
    shown = capsys.readouterr().err
    assert f"style: {COMPILING}, 0 s" in shown and f"style: {COMPILING}, 1 s" in shown
    last = shown.rsplit("\r", 1)[-1]
    assert "compiling" not in last and " 2/4 " in last and "held_out=0.51" in last and "loss=0.25" in last


def test_waiting_is_kept_out_of_the_time_that_is_left():
    progress = Progress("style", steps=100, done=40, shown=True)
    with pytest.raises(ValueError), progress.waiting("validating"):
        time.sleep(0.5)
        raise ValueError  # a stop while it compiles leaves the bar in order
    progress.step()
    state = progress._bar.format_dict
    progress.close()
    assert state["n"] == 41 and state["elapsed"] < 0.3


def test_a_bar_that_is_not_shown_is_silent(capsys):
    progress = Progress("style", steps=4, done=0, shown=False)
    with progress.waiting("validating"):
        progress.show(loss=1.0)
        progress.step()
    progress.close()
    assert capsys.readouterr().err == ""
