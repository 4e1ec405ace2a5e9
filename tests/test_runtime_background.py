"""Work beside the main thread: it runs, one piece at a time, and its errors reach the main thread."""

import threading

import pytest

from sdjax.runtime.background import background


def test_the_main_thread_goes_on_and_the_next_piece_waits():
    let, done = threading.Event(), []

    def slow():
        assert let.wait(10)
        done.append("first")

    with background() as work:
        work.start(slow)
        work.check()
        assert not done
        let.set()
        work.start(lambda: done.append("second"))
        assert done[0] == "first"
    assert done == ["first", "second"]


def fail():
    raise OSError("no space left")


@pytest.mark.parametrize("call", ["check", "wait", "start"])
def test_the_next_call_raises_the_error(call):
    with background() as work, pytest.raises(OSError, match="no space left"):
        work.start(fail)
        while call == "check":
            work.check()
        getattr(work, call)(*([fail] if call == "start" else []))


def test_an_error_of_the_last_piece_is_raised_at_the_end():
    with pytest.raises(OSError, match="no space left"), background() as work:
        work.start(fail)


def test_an_error_of_the_main_thread_does_not_cut_the_work_short():
    done = []
    with pytest.raises(ValueError, match="ours"), background() as work:
        work.start(lambda: done.append(1))
        raise ValueError("ours")
    assert done == [1]
