"""Writes the report of a run as one HTML file: `sdjax report RUN`.

RUN/report.html holds the loss curves, the pictures over time, before and after, the files and the settings. It needs no
server and loads nothing else. It can be written while the run trains.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.runtime import command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    # Imported only now, so that --help is shown at once.
    from sdjax.train import report

    print(report.write(args.run))


def _parser() -> command.Parser:
    parser = command.parser("sdjax report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
