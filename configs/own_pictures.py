"""The command that lets the embedded model draw its own subjects, with captions, to distil it on (few_steps.toml).

    python configs/own_pictures.py runs/few_steps/pictures

A model that is distilled needs pictures like those it draws, and draws them itself where there are no others.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import sdjax
from sdjax.runtime import command
from sdjax.runtime.whole_file import replacing

AT_ONCE = 16


def main(argv: Sequence[str]) -> None:
    parser = command.Parser(prog="configs/own_pictures.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, help="subjects to draw (default: all)")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = (Path(sdjax.__file__).parent / "tiny" / "subjects.tsv").read_text("utf-8").splitlines()[1:]
    names = [line.split("\t")[1] for line in lines][: args.count]
    sd, entries = sdjax.load("tiny"), []
    for start in range(0, len(names), AT_ONCE):
        group = list(enumerate(names))[start : start + AT_ONCE]
        drawn = sd.text2image([name for _, name in group], seed=start, steps=args.steps, progress=False)
        for (number, name), picture in zip(group, drawn, strict=True):
            picture.save(args.folder / f"{number:04d}.png")
            entries.append(json.dumps({"file_name": f"{number:04d}.png", "text": name}))
    with replacing(args.folder / "metadata.jsonl") as file:
        file.write("".join(f"{entry}\n" for entry in entries).encode())


if __name__ == "__main__":
    sys.exit(command.run(main, None))
