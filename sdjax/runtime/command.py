"""Shared by the commands: a parser that raises ConfigError, and errors shown in one line with an exit code."""

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from sdjax.errors import ConfigError, DataError, SdjaxError, TrainingStopped

_AGAIN = 1.0  # seconds
_SOON = 0.05  # seconds


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def parser(prog: str, description: str | None, *, usage: str | None = None, epilog: str | None = None) -> Parser:
    """The parser of a command. It has --debug, takes no shortened flags and shows texts with their line breaks."""
    made = Parser(
        prog=prog,
        description=description,
        usage=usage,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def file_and_rest(flag: str, text: str) -> tuple[Path, str | None]:
    """The two parts of FILE:REST. Without a colon, or if the whole text is the name of a file, REST is None.

    Raises DataError for a file that does not exist.
    """
    path, rest = Path(text), None
    head, colon, tail = text.rpartition(":")
    if colon and not path.exists():
        path, rest = Path(head), tail
    if not path.exists():
        raise DataError(f"{flag} {path}: no such file")
    return path, rest


def run(
    command: Callable[[Sequence[str]], int | None],
    argv: Sequence[str] | None,
    signals: Sequence[int] = (signal.SIGINT,),
) -> int:
    """Runs a command and returns its exit code.

    The code is the command's, or 0 if the command returns None. An error gives 2 (usage), 3 (data or weights) or 4
    (training stopped itself, or no memory is left), and a signal gives 128 and its number, 130 for Ctrl-C. 1 is an
    error that sdjax did not foresee. signals: those that end the command after its unfinished files are removed.
    argv: by default that of the process. With --debug in it, errors are raised with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    received: list[int] = []
    try:
        with _stopped_by(signals, received):
            code = command(argv) or 0
        if not received:
            return code
    except KeyboardInterrupt:
        received = received or [signal.SIGINT]
    except Exception as error:
        if not received:  # else the interrupt became this error on its way, as it does in the import of an extension
            if "--debug" in argv:
                raise
            code, message = _told(error, argv)
            print(f"error: {printable(message)}", file=sys.stderr)
            return code
    exec("")  # or else Python ends by SIGINT, if the interrupt came within a call of exec, such as dataclasses make
    print("stopped", file=sys.stderr)
    return 128 + received[0]


def _told(error: Exception, argv: Sequence[str]) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, SdjaxError):
        return error.exit_code, str(error)
    if isinstance(error, OSError):  # a full disk, or a folder without permission
        return DataError.exit_code, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # the second is JAX's
        return TrainingStopped.exit_code, "out of memory"
    if "Gloo" in str(error) or "coordination service" in str(error):  # JAX's, when a connection breaks
        return TrainingStopped.exit_code, "another process of this run has ended; its messages say why"
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


def _imports_an_extension(frame: FrameType | None) -> bool:
    """Returns whether the frame, or one that led to it, imports an extension module."""
    while frame and not frame.f_code.co_qualname.startswith("ExtensionFileLoader."):
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def _stopped_by(signals: Sequence[int], received: list[int]) -> Iterator[None]:
    """Within the block, these signals raise KeyboardInterrupt, and do so again each second until the block ends.

    Python drops an exception in a callback of the garbage collector, of which JAX has one, and in `__del__`. The import
    of an extension module is not interrupted: some print the exception's traceback, NumPy among them.
    received: gets the numbers of the signals. A signal that is ignored stays so. Outside the main thread this does
    nothing.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            received.append(number)
        importing = _imports_an_extension(frame)
        signal.setitimer(signal.ITIMER_REAL, _SOON if importing else _AGAIN)
        if not importing:
            raise KeyboardInterrupt

    def ignored(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            hook(unraisable)

    hook = sys.unraisablehook
    caught = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    former: dict[int, Any] = {}
    try:
        sys.unraisablehook = ignored
        for number in (*caught, signal.SIGALRM):
            former[number] = signal.getsignal(number)
            signal.signal(number, handle)
        yield
    finally:
        while former:  # a signal may come here too
            try:
                signal.setitimer(signal.ITIMER_REAL, 0)
                for number, handler in former.items():
                    signal.signal(number, handler)
                former = {}
            except KeyboardInterrupt:
                pass
        sys.unraisablehook = hook
