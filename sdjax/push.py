"""Uploads the export of a run to the Hugging Face hub: `sdjax push RUN OWNER/NAME --license LICENCE`.

The repository gets export/STAGE/: the LoRA in both namings, the new words, a whole model if one was trained, the card
and its pictures. The card gets the licence, which is never assumed: the licence of the base model may limit the choice.
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
    from sdjax.train.sharing import push_run

    print(push_run(args.run, args.repository, args.license or "", args.stage, private=args.private))


def _parser() -> command.Parser:
    parser = command.parser("sdjax push", __doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of the run")
    add("repository", metavar="OWNER/NAME", help="model repository on the hub; it is made if there is none")
    add("--license", metavar="ID", help="licence of the files, an id of the hub (default: license of the run, if any)")
    add("--stage", metavar="NAME", help="the stage to upload (default: the last, whose export is the whole result)")
    add("--private", action="store_true", help="make a private repository")
    return parser


if __name__ == "__main__":
    sys.exit(main())
