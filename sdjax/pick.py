"""Makes the files of one step the export of its stage: `sdjax pick RUN [--step N | --best] [--stage NAME]`.

A run with `export.every` writes its LoRA and words every so many steps, to RUN/export/STAGE/steps/. Without --step the
step with the lowest held-out loss is taken. A later stage stands on the last step of this one, whatever is picked.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdjax.errors import DataError
from sdjax.runtime import command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    # Imported only now, so that --help is shown at once.
    from sdjax.train import checkpoint, config_file, snapshots

    config = config_file.load_run(args.run, args.stage)
    names = [stage.name for stage in config.stages]
    steps = {name: snapshots.found(args.run / "export" / name / "steps") for name in names}
    stage = args.stage or next((name for name in reversed(names) if steps[name]), names[-1])
    found, measured = steps[stage], snapshots.losses(args.run / "metrics.jsonl", stage)
    if not found:
        raise DataError(f"{args.run}: stage {stage} has no files of single steps: export.every = 100 writes them")
    listed = f"stage {stage} has files of the steps {', '.join(map(str, found))}"
    step = snapshots.best(found, measured) if args.step is None else args.step
    if step is None:
        raise DataError(f"{args.run}: no held-out loss tells the best step, give --step: {listed}")
    if step not in found:
        raise DataError(f"{args.run}: --step {step}: {listed}")
    with checkpoint.locked(args.run):
        _pick(config, args.run / "export" / stage, found[step])
    loss = f", held-out loss {measured[step]:.5f}" if step in measured else ""
    print(f"{args.run / 'export' / stage} now holds step {step}{loss}")


def _pick(config: Any, export: Path, files: dict[str, Path]) -> None:
    from sdjax.formats.lora_file import KOHYA_FILE, PEFT_FILE, is_plain, load_lora, save_lora
    from sdjax.outline import Outline
    from sdjax.train import snapshots

    if KOHYA_FILE in files:
        shapes = Outline.load(config.model, variant=config.variant or None, weights=False).shapes
        adapters = load_lora(files[KOHYA_FILE], shapes)
        if is_plain(adapters):
            save_lora(export / PEFT_FILE, adapters, shapes, style="peft")
    snapshots.pick(export, files)


def _parser() -> command.Parser:
    parser = command.parser("sdjax pick", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, metavar="N", help="optimizer steps of the stage")
    which.add_argument("--best", action="store_true", help="the step with the lowest held-out loss, as by default")
    parser.add_argument("--stage", metavar="NAME", help="the stage; by default the last that has such files")
    return parser


if __name__ == "__main__":
    sys.exit(main())
