"""Says what a run needs and how fast it can be: `python -m sdjax plan CONFIG.toml --for v5e:2x2`.

Every program of the run is compiled for the device, which need not be there, and from shapes, so no weights are read.
The memory, work and bytes are those of the compiled programs. The times are bounds from them and from the data sheet of
the chip: a step cannot be faster.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sdjax.errors import ConfigError
from sdjax.runtime import command

_EPILOG = """
--for names a slice of TPUs (v5e:2x2, v6e:2x4, v5p:2x2x1, ...), one of their chips (v5e), or a GPU (t4, l4, a100 or
h100). Without it the programs are compiled for this machine. A TPU's compiler comes with `pip install "sdjax[tpu]"`.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args, flags = _parser().parse_known_args(argv)
    if args.draw and (args.config or flags or args.only_step):
        raise ConfigError(f"--draw plans a call to draw, which has no {args.config or (flags or ['--only-step'])[0]}")
    if (args.model if args.draw else args.config) is None:
        raise ConfigError("give CONFIG.toml of a training run, or --draw --model MODEL")
    if args.target is not None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs on the devices of this machine
    both = {"--model": args.model, "--dtype": args.dtype, "--base-dtype": args.base_dtype}  # settings of a run too
    flags += [text for flag, value in both.items() if value for text in (flag, value)]
    report = _drawing(args) if args.draw else _training(args, [str(args.config), *flags])
    print(json.dumps(report) if args.json else "\n".join(_table(report)))


def _training(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Returns the report on a training run."""
    from sdjax.train.config_file import parse_args

    config = parse_args(argv, prog="sdjax plan").config

    from sdjax.runtime import chips, compiled
    from sdjax.runtime.devices import divide_cpu
    from sdjax.train import programs

    if args.target is None:
        divide_cpu(config.parallel.cpu_devices)
    target = chips.described(args.target) if args.target else chips.present()
    needed = programs.training(config, target.devices)
    if args.only_step:
        needed = (program for program in needed if program.name.endswith(": step"))
    planned = compiled.compile_for(target, needed)
    report = compiled.report(target, planned)
    steps = [row.get("seconds_at_least") for row in report["programs"] if row["name"].endswith(": step")]
    report["steps"] = sum(stage.steps for stage in config.stages)
    report["seconds_per_step_at_least"] = None if None in steps else max(steps)
    report["pictures_per_second_at_most"] = [
        round(data.batch_size * data.accumulation / seconds, 1) if seconds else None
        for data, seconds in zip(map(config.data_of, config.stages), steps, strict=True)
    ]
    report["advice"] = [] if report["fits"] else programs.advice(config, target)
    return report


def _drawing(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the report on a call to draw."""
    from sdjax.draw.programs import drawing_with
    from sdjax.runtime import chips, compiled

    target = chips.described(args.target) if args.target else chips.present()
    if not target.described:
        target = target._replace(devices=target.devices[:1])
    dtype = args.dtype or "bfloat16"
    programs = drawing_with(
        args.model,
        dtype,
        target.devices,
        side=args.size,
        count=args.count,
        steps=args.steps,
        base_dtype=args.base_dtype or "",
        upscale=args.upscale,
    )
    return compiled.report(target, compiled.compile_for(target, programs)) | {"advice": []}


def _parser() -> command.Parser:
    parser = command.parser(
        "sdjax plan",
        usage="%(prog)s CONFIG.toml [--key value ...] [--for DEVICES] [--json]\n"
        "       %(prog)s --draw --model MODEL [--size PIXELS] [--for DEVICES] [--json]",
        description="Say what a training run or a call to draw needs, and how fast it can be.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.toml", help="settings of a training run; --key value changes one")
    add("--for", dest="target", metavar="DEVICES", help="what to compile for (default: this machine)")
    add("--json", action="store_true", help="print one JSON object")
    add("--only-step", action="store_true", help="plan the training steps alone, without encoding and validation")
    add("--draw", action="store_true", help="plan drawing in place of training")
    add("--model", metavar="MODEL", help="with --draw: tiny, a folder or a hub id; weights are not read")
    add("--size", type=int, metavar="PIXELS", help="with --draw: the side of the pictures (default: the model's)")
    add("--count", type=int, default=1, metavar="N", help="with --draw: pictures drawn at once (default: 1)")
    add("--steps", type=int, default=20, metavar="N", help="with --draw: sampler steps (default: 20)")
    add("--upscale", default="", metavar="MODEL", help="with --draw: also enlarge, by the file of an upscaler, or tiny")
    add("--dtype", metavar="TYPE", help="with --draw: number type (default: bfloat16)")
    add("--base-dtype", choices=["int8"], help="with --draw: keep the U-Net's weights in eight bits")
    return parser


def _cells(row: dict[str, Any]) -> list[str]:
    """Returns the cells of a program in the table."""
    names = ("devices", "runs", "memory_gb", "teraflop", "moved_gb", "between_devices_mb", "megacycles")
    cells = [row["name"], *("-" if row.get(name) is None else f"{row[name]:g}" for name in names)]
    if row.get("kernels_without_estimate"):
        cells[-1] += f" + {row['kernels_without_estimate']} kernels"
    least, seconds = row.get("seconds_at_least"), row.get("compile_s")
    return [*cells, f"{least:g}" if least else "-", "-" if seconds is None else f"{seconds:.0f} s"]


def _table(report: dict[str, Any]) -> Iterator[str]:
    """Yields the lines of the report."""
    heads = ("program", "devices", "runs", "GB", "Tflop", "GB moved", "MB between", "Mcycles", "at least s", "compiled")
    rows = [heads, *(_cells(row) for row in report["programs"])]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        yield "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:], strict=True))])
    most = max(row["memory_gb"] for row in report["programs"])
    fits = "fits" if report["fits"] else "does not fit"
    available = report["programs"][0]["available_gb"]
    yield f"{fits}: {most:.2f} of {available:.1f} GB on each of {report['devices']} devices ({report['device']})"
    for line in report["advice"]:
        yield f"fits with {line}"
    if not report["fits"] and "steps" in report and not report["advice"]:
        yield "no change of remat, batch size, dtype, optimizer or mesh makes it fit"
    if report.get("seconds_per_step_at_least"):
        rates = ", ".join(f"{rate:g}" for rate in report["pictures_per_second_at_most"])
        yield f"a step takes {report['seconds_per_step_at_least']:g} s or more; at most {rates} pictures a second"
    if report["hours_at_least"]:
        what = "the run" if "steps" in report else "a call"
        yield f"{what} takes {report['hours_at_least']:g} hours or more, without compiling, reading and saving"


if __name__ == "__main__":
    sys.exit(main())
