"""Shared by the commands: a parser that raises ConfigError, and errors shown in one line with an exit code."""

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from sdjax.errors import ConfigError, DataError, SdjaxError, TrainingStopped

INTERRUPTED = 130
_AGAIN = 1.0  # seconds


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code.

    The code is the command's, or 0 if the command returns None. An error gives 2 (usage), 3 (data or weights) or 4
    (training stopped itself, or no memory is left), and Ctrl-C gives 130. 1 is an error that sdjax did not foresee.
    argv: by default that of the process. With --debug in it, errors are raised with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        with interrupts() as interrupted:
            code = command(argv) or 0
        if not interrupted:
            return code
    except KeyboardInterrupt:
        pass
    except Exception as error:
        if "--debug" in argv:
            raise
        code, message = _told(error, argv)
        print(f"error: {printable(message)}", file=sys.stderr)
        return code
    print("stopped", file=sys.stderr)
    return INTERRUPTED


def _told(error: Exception, argv: Sequence[str]) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, SdjaxError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):  # a full disk, or a folder without permission
        return DataError.exit_code, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # the second is JAX's
        return TrainingStopped.exit_code, "out of memory"
    first = next(iter(str(error).splitlines()), "")[:300]
    return 1, (
        f"sdjax did not expect this, given `{' '.join(argv)[:300]}`: {type(error).__name__}: {first}\n"
        "Please report it with the traceback that --debug shows."
    )


def printable(text: str) -> str:
    """The text with escapes for characters that control a terminal, such as those in a file's names of tensors."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Formatter(logging.Formatter):
    """Formats log messages as `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Within the block, Ctrl-C raises KeyboardInterrupt, and does so again each second until the block ends.

    Python drops an exception in a callback of the garbage collector, of which JAX has one, and in `__del__`. The
    yielded list is empty until Ctrl-C was pressed. Outside the main thread, and where Ctrl-C is ignored, this does
    nothing.
    """
    received: list[int] = []
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield received
        return

    def handle(number: int, frame: Any) -> NoReturn:
        received.append(number)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        raise KeyboardInterrupt

    def ignored(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            hook(unraisable)

    hook = sys.unraisablehook
    former = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGALRM)}
    sys.unraisablehook = ignored
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook
