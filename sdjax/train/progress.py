"""The progress bar of a stage. It says what the run waits for, and keeps that out of the time that is left."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

COMPILING = "compiling (about 40 s the first time)"
"""What the first step of a stage waits for. The time is that of the embedded model on two CPU cores."""


class Progress:
    """A bar that counts the steps of a stage, with the newest numbers behind it. Close it after the last step."""

    def __init__(self, name: str, *, steps: int, done: int, shown: bool) -> None:
        """steps: those of the stage; done: those before this bar; shown: False shows nothing."""
        from tqdm.auto import tqdm

        self._name = name
        self._numbers: dict[str, str] = {}
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc=name,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 15,
            dynamic_ncols=True,
            disable=not shown,
        )

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()

    def show(self, **numbers: float) -> None:
        """Puts numbers behind the bar, beside those of other names."""
        self._numbers |= {name: f"{number:.4g}" for name, number in numbers.items()}
        self._bar.set_postfix(self._numbers, refresh=False)

    def step(self) -> None:
        """Counts a step."""
        self._bar.update(1)

    @contextlib.contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Within the block, the bar shows the reason and a running clock. No step is counted there."""
        if self._bar.disable:
            yield
            return
        began, done = time.time(), threading.Event()  # tqdm's clock

        def tell() -> None:
            while True:
                self._bar.set_description_str(f"{self._name}: {reason}, {time.time() - began:.0f} s")
                if done.wait(max(1, self._bar.mininterval)):
                    return

        clock = threading.Thread(target=tell, daemon=True)
        clock.start()
        try:
            yield
        finally:
            done.set()
            clock.join()
            self._bar.set_description_str(self._name, refresh=False)
            waited = time.time() - began
            self._bar.start_t += waited  # tqdm reckons the time that is left from these two
            self._bar.last_print_t += waited
