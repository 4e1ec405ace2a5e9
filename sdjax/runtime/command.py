"""Shared by the commands: a parser that raises ConfigError, and errors shown in one line with an exit code."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from sdjax.errors import ConfigError, DataError, SdjaxError


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; `{self.prog} --help` lists the flags")


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code.

    The code is the command's, or 0 if the command returns None. An error gives 2 (usage), 3 (data or weights) or 4
    (training stopped itself), and Ctrl-C gives 130.
    argv: by default that of the process. With --debug in it, errors are raised with their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        return command(argv) or 0
    except (SdjaxError, OSError) as error:  # OSError: a full disk, or a folder without permission
        if "--debug" in argv:
            raise
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print(f"error: {message}", file=sys.stderr)
        return error.exit_code if isinstance(error, SdjaxError) else DataError.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
