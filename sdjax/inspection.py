"""The command that says what a file is: `python -m sdjax inspect FILE`.

It reads headers and, of LoRAs and embeddings, the values; a model's gigabytes stay on the disk.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdjax.runtime import command

_LONGEST = 100  # characters of a metadata value in the table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)

    from sdjax.formats.description import describe

    found = describe(args.file)
    lines = [json.dumps(found, indent=2)] if args.json else _table(found, layers=args.layers)
    print(command.printable("\n".join(lines)))


def _parser() -> command.Parser:
    parser = command.parser(
        "sdjax inspect",
        description="Say what a file or folder is: a model, a LoRA or an embedding, and what is in it.",
    )
    parser.add_argument("file", metavar="FILE", help="file, or folder of a model or LoRA")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, each layer included")
    parser.add_argument("--layers", action="store_true", help="list each layer of a LoRA: kind, rank, alpha and norm")
    return parser


def _table(found: Mapping[str, Any], *, layers: bool) -> Iterator[str]:
    """Yields the lines of the table."""
    rows = found.get("layers", [])
    yield _row("kind", found["kind"])
    for name in ("form", "family", "prediction_type"):
        if name in found:
            yield _row(name.replace("_", " "), found[name] or "unknown")
    if found.get("inpainting"):
        yield _row("for", "inpainting")
    yield _row("dtypes", _counts(found["dtypes"]))
    for part, size in found.get("parts", {}).items():
        yield _row(part, f"{size['parameters'] / 1e6:.1f} million parameters, {size['bytes'] / 1e6:.1f} MB")
    if rows:
        yield _row("layers", _counts(found["kinds"]))
        yield _row("rank", _counts(found["ranks"]) or "none")
        yield _row("alpha", _counts(found["alphas"]) or "none")
        for part, counts in found["targets"].items():
            yield _row(part, _counts(counts))
        if norms := [row["norm"] for row in rows if row["norm"] is not None]:
            yield _row("norms", f"{min(norms):.3g} to {max(norms):.3g}, mean {sum(norms) / len(norms):.3g}")
    for word, vectors in found.get("words", {}).items():
        widths = ", ".join(f"{model} {width}" for model, width in vectors["widths"].items())
        norms = ", ".join(f"{norm:.3g}" for row in vectors["norms"].values() for norm in row)
        yield _row("word", f"{word}: {vectors['vectors']} vectors, width {widths}, norms {norms}")
    for key, value in sorted(found["metadata"].items()):
        yield _row("metadata", f"{key} = {value if len(value) <= _LONGEST else value[:_LONGEST] + '...'}")
    for row in rows if layers else []:
        rank, alpha, norm = (
            "-" if row[name] is None else f"{row[name]:{form}}"
            for name, form in (("rank", "d"), ("alpha", "g"), ("norm", ".3g"))
        )
        yield f"{row['part']}.{row['layer']}  {row['kind']}  rank {rank}  alpha {alpha}  norm {norm}"


def _row(name: str, value: str) -> str:
    return f"{name:<15} {value}"


def _counts(counts: Mapping[Any, int]) -> str:
    """The values that occur, with the number of each if there are several."""
    if len(counts) == 1:
        return f"{next(iter(counts))} ({next(iter(counts.values()))})"
    return ", ".join(f"{value} ({count})" for value, count in counts.items())


if __name__ == "__main__":
    sys.exit(main())
