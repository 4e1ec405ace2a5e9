"""Runs the commands of docs/guide.md in a separate folder, and copies the grids that they draw to docs/guide/.

    python tests/benchmarks/guide_pictures.py [--only rank alpha] [--folder runs/guide]

--only: the sections whose pictures have these names. alpha and weight need the results of rank, and decay needs those
of vectors. All sections take about twenty minutes on two cores.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--folder", type=Path, default=Path("runs/guide"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "sdjax"):
        if not (args.folder / name).exists():
            (args.folder / name).symlink_to(ROOT / name)
    (ROOT / "docs" / "guide").mkdir(exist_ok=True)
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    for block in text.split("```sh\n")[1:]:
        *training, drawing = block.split("```")[0].strip().splitlines()
        out = args.folder / shlex.split(drawing)[-1]
        if args.only and out.name not in args.only:
            continue
        for line in (*training, drawing):
            words = shlex.split(line.replace("sdjax generate", "python -m sdjax.generate"))
            subprocess.run([sys.executable, *words[1:]], cwd=args.folder, check=True)
        shutil.copy(out / "grid.png", ROOT / "docs" / "guide" / f"{out.name}.png")


if __name__ == "__main__":
    main()
