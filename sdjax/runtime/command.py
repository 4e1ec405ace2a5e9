"""What the commands share: a parser whose mistakes are our errors, and errors as one line and an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sdjax.errors import ConfigError, DataError, SdjaxError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code: its own or 0, 2 usage, 3 data or weights, 4 stopped itself, 130 Ctrl-C.

    argv: default the process's own; with --debug in it, errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return command(argv) or 0
    except (SdjaxError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
        if "--debug" in argv:
            raise
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {told}", file=sys.stderr)
        return error.exit_code if isinstance(error, SdjaxError) else DataError.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
