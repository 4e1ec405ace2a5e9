"""The queue of the device: one drawing at a time, in the order of the requests. It does not depend on open tabs."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sdjax.errors import DataError, SdjaxError

_MOST_WAITING = 100
log = logging.getLogger(__name__)


class Stopped(Exception):
    """The task was stopped by its user."""


class Task:
    """One request. Its worker writes here, and any number of tabs may read."""

    def __init__(self) -> None:
        self.says = "waiting"
        self.share = 0.0
        """How much is done, 0 to 1."""
        self.preview: Image.Image | None = None
        self.files: list[Path] = []
        """The pictures so far."""
        self.error = ""
        self.done = threading.Event()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Asks the worker to stop."""
        self._stopped.set()

    def check(self) -> None:
        """Raises Stopped after `stop`. The worker calls it often."""
        if self._stopped.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Waits, or raises Stopped as soon as the task is stopped."""
        self._stopped.wait(seconds)
        self.check()


class Queue:
    """Runs tasks one after another in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Task, Callable[[Task], None]]] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="device").start()

    def put(self, work: Callable[[Task], None]) -> Task:
        """Adds a task and returns it. Raises DataError if too many wait."""
        task = Task()
        with self._changed:
            if len(self._waiting) >= _MOST_WAITING:
                raise DataError(f"{_MOST_WAITING} requests wait already: try again later")
            self._waiting.append((task, work))
            self._changed.notify()
        return task

    def ahead(self, task: Task) -> int:
        """The number of tasks before this one. 0: it runs, or is done."""
        with self._changed:
            return next((place for place, (waiting, _) in enumerate(self._waiting) if waiting is task), 0)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                task, work = self._waiting[0]
            began = time.perf_counter()
            try:
                task.check()
                work(task)
                task.says = f"done in {time.perf_counter() - began:.1f} s"
            except Stopped:
                task.says = "stopped"
            except SdjaxError as error:
                task.error = str(error)
            except Exception as error:
                log.exception("a task failed")
                task.error = f"sdjax did not expect this: {type(error).__name__}: {str(error)[:300]}"
            task.preview = None
            with self._changed:
                self._waiting.popleft()
            del work  # what it holds is not kept until the next task
            task.done.set()
