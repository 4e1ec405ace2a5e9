"""The `sdjax` command: `sdjax train ...` is `python -m sdjax.train ...`, and so on."""

import sys
from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names, with the other words, and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: sdjax {{{','.join(COMMANDS)}}} ...   (--help after a command lists its flags)"
    if argv[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0
    if argv[:1] == ["--version"]:
        from importlib.metadata import version

        print(version("sdjax"))
        return 0
    if not argv or argv[0] not in COMMANDS:
        print(f"error: {f'unknown command {argv[0]!r}' if argv else 'no command given'}\n{usage}", file=sys.stderr)
        return 2
    return COMMANDS[argv[0]](argv[1:])


def _train(argv: Sequence[str]) -> int:
    from sdjax.train.__main__ import main

    return main(argv)


def _generate(argv: Sequence[str]) -> int:
    from sdjax.generate import main

    return main(argv)


def _convert(argv: Sequence[str]) -> int:
    from sdjax.convert import main

    return main(argv)


def _inspect(argv: Sequence[str]) -> int:
    from sdjax.inspection import main

    return main(argv)


def _plan(argv: Sequence[str]) -> int:
    from sdjax.plan import main

    return main(argv)


def _pick(argv: Sequence[str]) -> int:
    from sdjax.pick import main

    return main(argv)


def _push(argv: Sequence[str]) -> int:
    from sdjax.push import main

    return main(argv)


def _report(argv: Sequence[str]) -> int:
    from sdjax.report import main

    return main(argv)


def _app(argv: Sequence[str]) -> int:
    from sdjax.app.__main__ import main

    return main(argv)


def _upscale(argv: Sequence[str]) -> int:
    from sdjax.enlarge import main

    return main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "generate": _generate,
    "convert": _convert,
    "inspect": _inspect,
    "plan": _plan,
    "pick": _pick,
    "push": _push,
    "report": _report,
    "upscale": _upscale,
    "app": _app,
}
"""Each imports its module when it is called, so no command waits for the imports of another."""


if __name__ == "__main__":
    sys.exit(main())
