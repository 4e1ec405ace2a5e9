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


def run(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Runs a command and returns its exit code: 0, 2 usage, 3 data or weights, 4 no memory, 130 Ctrl-C.

    argv: default the process's own; with --debug in it, errors keep their traceback.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        command(argv)
    except (SdjaxError, OSError) as error:  # OSError: a full disk, a folder that may not be written to
        if "--debug" in argv:
            raise
        if isinstance(error, SdjaxError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print(f"error: {error.filename or 'files'}: {error.strerror or error}", file=sys.stderr)
        return DataError.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
