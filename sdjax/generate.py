"""Draws pictures from prompts: `python -m sdjax generate --model tiny --prompt "red heart"`.

JAX is imported only after the command line has been checked, so `--help` and mistakes are answered at once.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from PIL import Image

from sdjax.draw import grids, numbered
from sdjax.draw.adapters import Lora, found_below, mention, merged, read_lora, tagged
from sdjax.draw.settings import (
    Adapters,
    Enlarging,
    Masking,
    Reading,
    Sampling,
    SecondPass,
    Source,
    Subject,
    declarations,
    from_text,
    help_text,
)
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import save_png
from sdjax.runtime import command
from sdjax.settings import Dtype, Range, Seed, choices, plain_type, read_value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    settings = _settings(args)
    axes = [grids.parse_axis(text) for text in (args.grid_x, args.grid_y) if text is not None]
    if len({axis.name for axis in axes}) < len(axes):
        raise ConfigError(f"--grid-x and --grid-y both vary {axes[0].name}: choose another setting for one of them")
    prompts = _prompts(args, on_axis=any(axis.name == "prompt" for axis in axes))
    _check_values(args, len(prompts), settings)
    embeddings = [command.file_and_rest("--embedding", text) for text in args.embedding]

    from sdjax.draw import jobs
    from sdjax.formats.lora_file import load_lora
    from sdjax.model import Model
    from sdjax.outline import Outline
    from sdjax.runtime import compilation_cache, devices, host_memory

    wanted = _jobs(args, settings, prompts, axes)
    jobs.check_alone(wanted)
    named = found_below(args.lora_dir)
    given: list[tuple[Lora, ...]] = []  # the LoRAs in the settings of each job
    loras: list[tuple[Lora, ...]] = []  # these and the LoRAs that the prompt of the job names
    for job in wanted:
        with jobs.blaming(job.origin):
            given.append(tuple(read_lora(text) for text in job.settings["lora"] if text != "none"))
            loras.append((*given[-1], *(tagged(tag, args.lora_dir, named) for tag in job.words[1])))
    devices.divide_cpu(args.devices)
    devices.check_count(args.devices)
    out = numbered.writable_folder(args.out)
    compilation_cache.enable()
    host_memory.keep()

    outline = Outline.load(
        args.model,
        args.dtype,
        variant=args.variant,
        vae=args.vae,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
        base_dtype=args.base_dtype,
    )
    if args.refiner is not None:
        refiner = Outline.load(args.refiner, args.dtype, variant=args.variant, base_dtype=args.base_dtype)
        outline = outline.with_refiner(refiner, args.refiner_switch)
    words = [outline.load_words(path, token) for path, token in embeddings]
    bare = [job.replace(prompt=job.words[0]) for job in wanted]
    jobs.check(functools.reduce(Outline.with_embedding, words, outline), bare)
    trees = {path: load_lora(path, outline.shapes) for path in {lora.path for lora in itertools.chain(*loras)}}

    model = functools.reduce(Model.with_embedding, words, Model.of(outline))
    if args.devices > 1:
        model = model.on_devices(args.devices)
    if args.tiled_vae is not None:
        model = model.with_tiled_vae(args.tiled_vae, args.tiled_vae // 8)
    base = [model]
    del model  # or the weights without LoRAs stay in memory beside those with them
    adapted = lambda chosen, last: merged(base.pop() if last else base[0], chosen, trees)
    advice = "try a smaller --batch-size, a smaller picture, --dtype bfloat16"
    pictures: dict[int, Image.Image] = {}
    with numbered.claimed(out, len(wanted)) as number:
        for i, picture in jobs.draw_by_loras(bare, loras, args.batch_size, adapted, advice=advice):
            job, prompt = wanted[i], bare[i].settings["prompt"]
            mention(picture, prompt, job.settings["prompt"], given[i])
            _save(picture, out / f"{number + i:05d}-{job.settings['seed']}-{numbered.safe_name(prompt)}.png")
            pictures[i] = picture
        in_order = [pictures[i] for i in range(len(pictures))]
        for name, sheet in grids.sheets(in_order, axes, args.num_images):
            _save(sheet, _free(out, name, number))


def _jobs(args: argparse.Namespace, settings: Mapping[str, Any], prompts: Sequence[str], axes: Sequence[grids.Axis]):
    """The jobs of the flags and of --jobs, with every combination of the values of the axes. x varies fastest."""
    from sdjax.draw import jobs

    drawn = jobs.of_prompts(settings, prompts, args.num_images)
    if args.jobs is not None:
        drawn += jobs.read_jobs(_lines("--jobs", args.jobs), settings, f"--jobs {args.jobs}")
    return jobs.varied(drawn, axes)


# ------------------------------------------------------------------------------------------------ the command line


FLAGS = tuple(name for name in declarations() if name != "prompt")
"""The settings of drawing that are flags. The flag --prompt is read by `_prompts`."""


def _parser() -> command.Parser:
    parser = command.parser(
        "sdjax generate",
        usage="%(prog)s --model MODEL --prompt TEXT [flags]",
        description="Draw pictures from prompts.",
    )
    add = parser.add_argument
    add("--model", required=True, help='"tiny" (embedded), a diffusers folder, a model file, or a hub id')
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (default: outputs)")
    add("--batch-size", type=int, default=4, metavar="N", help="most pictures to draw at once (default: 4)")
    add("--devices", type=int, default=1, metavar="N", help="devices that share the pictures of a batch (default: 1)")
    group = parser.add_argument_group("prompts and seeds")
    group.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be repeated")
    group.add_argument("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, in UTF-8")
    group.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    _add_settings(group, Subject, Reading)
    _add_settings(parser.add_argument_group("sampler, guidance and size"), Sampling)
    _add_settings(parser.add_argument_group("second pass"), SecondPass)
    _add_settings(parser.add_argument_group("image and mask"), Source, Masking)
    _add_settings(parser.add_argument_group("enlarging the finished picture"), Enlarging)
    add = parser.add_argument_group("grids and lists of pictures").add_argument
    add("--grid-x", metavar="NAME=V,V", help="draw each picture with each value of a setting, in a labelled grid")
    add("--grid-y", metavar="NAME=V,V", help="and with each value of another setting")
    add("--jobs", type=Path, metavar="FILE", help="more pictures: JSON lines of settings, which win over the flags")
    group = parser.add_argument_group("model, LoRAs and new words")
    add = group.add_argument
    add(
        "--dtype",
        default="float32",
        metavar="TYPE",
        help=f"number type: {', '.join(get_args(Dtype))} (default: float32)",
    )
    add("--base-dtype", default="", metavar="TYPE", help="int8: the U-Net's weights in eight bits (default: dtype)")
    add("--variant", metavar="NAME", help="variant of the weight files, such as fp16")
    add("--refiner", metavar="MODEL", help="second model for the last steps, such as SDXL's refiner")
    add(
        "--refiner-switch",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="share of the noise schedule before the refiner takes over (default: 0.8)",
    )
    add("--vae", metavar="MODEL", help="another autoencoder: a folder, a file or a hub id (default: the model's)")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for a model in a single file (default: the hub's)")
    add("--prediction-type", default="", metavar="NAME", help="epsilon or v_prediction, if the model's is wrong")
    _add_settings(group, Adapters)
    add("--lora-dir", type=Path, metavar="DIR", help="folder of the LoRAs that prompts name as <lora:NAME:WEIGHT>")
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:WORD]",
        help="new words for prompts, from Textual Inversion; WORD replaces the word in the file; may be repeated",
    )
    add("--tiled-vae", type=int, nargs="?", const=512, metavar="PIXELS", help="decode in tiles of 512, or of this side")
    return parser


def _add_settings(group: Any, *kinds: Any) -> None:
    """Adds the flags of some kinds of settings, such as `Sampling`."""
    for name in (name for kind in kinds for name in kind.__annotations__ if name in FLAGS):
        hint, declared = declarations()[name]
        kind, text = plain_type(hint), help_text(name)
        how: dict[str, Any] = {"metavar": declared.metavar or ("NAME" if choices(hint) else "N")}
        if kind is bool:
            how = {"action": "store_true", "default": None}
        elif get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis:
            how["action"], text = "append", f"{text}; may be repeated"
        group.add_argument(_flag(name), help=text.replace("%", "%%"), **how)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of drawing that the flags give, checked. Raises ConfigError, which names the flag."""
    settings = {}
    for name in FLAGS:
        value = vars(args)[name]
        if isinstance(value, str):
            settings[name] = from_text(name, value, _flag(name))
        elif value is not None:
            settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def _prompts(args: argparse.Namespace, *, on_axis: bool) -> list[str]:
    """The prompts of the flags. Without any prompt, an axis of prompts fills in an empty one, and --jobs needs none."""
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += [line.strip() for line in _lines("--prompts-file", args.prompts_file) if line.strip()]
    if prompts or args.jobs is not None:
        return prompts
    if not on_axis:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts-file FILE with a prompt a line")
    return [""]


def _lines(flag: str, path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 in a prompt
    except OSError as error:
        raise DataError(f"{flag} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{flag} {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _check_values(args: argparse.Namespace, prompts: int, settings: Mapping[str, Any]) -> None:
    """Checks the flags that are not settings of a picture. Raises ConfigError."""
    read_value(Dtype, args.dtype, "--dtype")
    for flag, value, low in (
        ("--num-images", args.num_images, 1),
        ("--batch-size", args.batch_size, 1),
        ("--devices", args.devices, 1),
        ("--tiled-vae", args.tiled_vae, 64),
    ):
        if value is not None:
            read_value(Annotated[int, Range(low)], value, flag)
    last = settings.get("seed", 0) + prompts * args.num_images - 1  # each picture has a seed
    read_value(Seed, max(last, 0), "the seed of the last picture")


# ------------------------------------------------------------------------------------------------ what comes out


def _free(folder: Path, name: str, number: int) -> Path:
    """The path of a grid: its name or, if that is taken, its name with the number of the first picture of this run."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return folder / f"{Path(name).stem}-of-{number:05d}.png"
    return folder / name


def _save(picture: Image.Image, path: Path) -> None:
    try:
        save_png(picture, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    print(path)


if __name__ == "__main__":
    sys.exit(main())
