"""Enlarges image files with an upscaler: `python -m sdjax upscale a.png b.jpg --model RealESRGAN_x4plus.pth`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    targets = [args.out / f"{file.stem}.png" for file in args.files]
    for target in targets:
        if target.exists() or targets.count(target) > 1:
            raise ConfigError(f"{target}: is there already, or would be written twice; choose another --out")

    from sdjax.data.images import Size, read_picture
    from sdjax.draw import upscaling
    from sdjax.formats.png_parameters import save_png
    from sdjax.runtime import compilation_cache, out_of_memory

    upscaler = upscaling.load(args.model)
    for file in args.files:  # all of them, before the first is enlarged
        picture = read_picture(file)
        upscaler.enlarged_size(Size(picture.height, picture.width), args.scale)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {args.out}: {error.strerror or error}") from None
    compilation_cache.enable()
    for file, target in zip(args.files, targets, strict=True):
        with out_of_memory.advice("try a smaller --scale"):
            enlarged = upscaling.upscale(read_picture(file), args.model, args.scale)
        save_png(enlarged, target)
        print(target)


def _parser() -> command.Parser:
    parser = command.parser(
        "sdjax upscale",
        usage="%(prog)s FILE... --model MODEL [flags]",
        description="Enlarge pictures with an upscaler of the ESRGAN family.",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="pictures; a NAME.png is written for each")
    add("--model", required=True, help='"tiny" (embedded, 4 times), or the file of an RRDBNet or SRVGGNetCompact')
    add("--scale", type=float, metavar="N", help="how many times as long the sides become (default: the upscaler's)")
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (default: outputs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
