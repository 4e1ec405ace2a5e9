"""One piece of work at a time beside the main thread, such as writing a checkpoint."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


class Background:
    """Does work in a thread, one piece after another. An error of the work is raised by the next call."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._running: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Waits for the piece before, then starts this one."""
        self.wait()
        self._running = self._executor.submit(work)

    def check(self) -> None:
        """Raises the error of the work if it has failed. Does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the work is done."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


@contextlib.contextmanager
def background() -> Iterator[Background]:
    """A thread for work. At the end it waits for what has been started, also if the main thread has failed."""
    with ThreadPoolExecutor(1) as executor:
        yield (working := Background(executor))
        working.wait()
