"""Draws pictures from prompts: `python -m sdjax generate --model tiny --prompt "red heart"`.

JAX is imported only after the command line has been checked, so `--help` and mistakes are answered at once.
"""

import argparse
import contextlib
import functools
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from PIL import Image

from sdjax.draw import grids
from sdjax.draw.settings import (
    Adapters,
    Enlarging,
    Masking,
    Reading,
    Sampling,
    SecondPass,
    Source,
    Subject,
    complete_job,
    declarations,
    from_text,
    help_text,
)
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import save_png
from sdjax.runtime import command
from sdjax.settings import Dtype, Range, Seed, choices, parse, plain_type, read_value

_LONGEST_NAME = 80  # bytes of a prompt kept in a file name; file systems allow 255 in all


class Lora(NamedTuple):
    """A LoRA to merge in, from `--lora FILE[:WEIGHT]`, from the line of a job or from a prompt."""

    path: Path
    unet_weight: float
    text_weight: float

    @property
    def tag(self) -> str:
        """The LoRA as A1111 writes it in a prompt."""
        return f"<lora:{self.path.stem}:{self.unet_weight:g}>"


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
    from sdjax.runtime import compilation_cache, devices, host_memory, out_of_memory

    wanted = _jobs(args, settings, prompts, axes)
    jobs.check_alone(wanted)
    named = _loras_below(args.lora_dir)
    given: list[tuple[Lora, ...]] = []  # the LoRAs in the settings of each job
    loras: list[tuple[Lora, ...]] = []  # these and the LoRAs that the prompt of the job names
    for job in wanted:
        with jobs.blaming(job.origin):
            given.append(tuple(_lora(text) for text in job.settings["lora"] if text != "none"))
            loras.append((*given[-1], *(_tagged(tag, args.lora_dir, named) for tag in job.words[1])))
    devices.divide_cpu(args.devices)
    devices.check_count(args.devices)
    out = _writable_folder(args.out)
    compilation_cache.enable()
    host_memory.keep()

    outline = Outline.load(
        args.model,
        args.dtype,
        variant=args.variant,
        vae=args.vae,
        tokenizer=args.tokenizer,
        prediction_type=args.prediction_type,
    )
    if args.refiner is not None:
        refiner = Outline.load(args.refiner, args.dtype, variant=args.variant)
        outline = outline.with_refiner(refiner, args.refiner_switch)
    words = [outline.load_words(path, token) for path, token in embeddings]
    bare = [job.replace(prompt=job.words[0]) for job in wanted]
    jobs.check(functools.reduce(Outline.with_embedding, words, outline), bare)
    adapters = {path: load_lora(path, outline.shapes) for path in {lora.path for lora in itertools.chain(*loras)}}

    model = functools.reduce(Model.with_embedding, words, Model.of(outline))
    if args.devices > 1:
        model = model.on_devices(args.devices)
    if args.tiled_vae is not None:
        model = model.with_tiled_vae(args.tiled_vae, args.tiled_vae // 8)
    pictures: dict[int, Image.Image] = {}
    groups = jobs.grouped(loras)
    with _numbers(out, len(wanted)) as number:
        for n, (merged, places) in enumerate(groups.items(), 1):
            adapted = _with_loras(model, merged, adapters)
            if n == len(groups):
                del model  # or the weights without LoRAs stay in memory beside those with them
            for chosen, batch in jobs.batches([bare[i] for i in places], args.batch_size):
                with out_of_memory.advice("try a smaller --batch-size, a smaller picture, --dtype bfloat16"):
                    drawn = jobs.draw(adapted, batch)
                for i, picture in zip((places[n] for n in chosen), drawn, strict=False):
                    job, prompt = wanted[i], bare[i].settings["prompt"]
                    _mention(picture, prompt, job.settings["prompt"], given[i])
                    _save(picture, out / f"{number + i:05d}-{job.settings['seed']}-{safe_name(prompt)}.png")
                    pictures[i] = picture
        in_order = [pictures[i] for i in range(len(pictures))]
        for name, sheet in _sheets(in_order, axes, args.num_images):
            _save(sheet, _free(out, name, number))


def _with_loras(model: Any, loras: Sequence[Lora], adapters: Mapping[Path, Mapping[str, Any]]) -> Any:
    """The model with LoRAs merged in. adapters: file -> part -> adapter tree."""
    for lora in loras:
        for part, tree in adapters[lora.path].items():
            model = model.with_lora({part: tree}, lora.unet_weight if part == "unet" else lora.text_weight)
    return model


def _jobs(args: argparse.Namespace, settings: Mapping[str, Any], prompts: Sequence[str], axes: Sequence[grids.Axis]):
    """The jobs of the flags and of --jobs, with every combination of the values of the axes. x varies fastest."""
    from sdjax.draw import jobs

    drawn = []
    counting = "variation_seed" if settings.get("variation_strength") else "seed"  # see `draw.settings.Settings`
    first = settings.get(counting, 0)
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_images)):
        drawn.append(jobs.Job(complete_job({**settings, "prompt": prompt, counting: first + i})))
    if args.jobs is not None:
        drawn += jobs.read_jobs(_lines("--jobs", args.jobs), settings, f"--jobs {args.jobs}")
    for axis in reversed(axes):  # y outside, x inside
        drawn = [job.replace(**{axis.name: value}) for job in drawn for value in axis.values]
    return drawn


def _sheets(
    pictures: Sequence[Image.Image], axes: Sequence[grids.Axis], columns: int
) -> Iterator[tuple[str, Image.Image]]:
    """Yields (file name, sheet): a sheet of all pictures if they have one size or, with axes, a grid for each job."""
    if not axes:
        if len(pictures) > 1 and len({picture.size for picture in pictures}) == 1:
            yield "grid.png", grids.sheet(pictures, columns=columns if columns > 1 else None)
        return
    x, y = (*(axis.labels for axis in axes), [])[:2]
    size = len(x) * max(len(y), 1)
    for i in range(0, len(pictures), size):
        name = "grid.png" if len(pictures) == size else f"grid-{i // size}.png"
        yield name, grids.labelled(pictures[i : i + size], x, y)


# ------------------------------------------------------------------------------------------------ the command line


FLAGS = tuple(name for name in declarations() if name != "prompt")
"""The settings of drawing that are flags. The flag --prompt is read by `_prompts`."""


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sdjax generate",
        usage="%(prog)s --model MODEL --prompt TEXT [flags]",
        description="Draw pictures from prompts.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help='"tiny" (embedded), a diffusers folder, a model file, or a hub id')
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (default: outputs)")
    add("--batch-size", type=int, default=4, metavar="N", help="most pictures to draw at once (default: 4)")
    add("--devices", type=int, default=1, metavar="N", help="devices that share the pictures of a batch (default: 1)")
    add("--debug", action="store_true", help="show the traceback of an error")
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


def _lora(text: str) -> Lora:
    """Reads FILE or FILE:WEIGHT."""
    path, rest = command.file_and_rest("--lora", text)
    weight = 1.0 if rest is None else parse(float, rest, f"the weight of --lora {path}")
    return Lora(path, weight, weight)


def _loras_below(folder: Path | None) -> dict[str, Path]:
    """Name -> file of the LoRAs in a folder and the folders below it."""
    files = sorted(folder.rglob("*")) if folder is not None else []
    return {path.stem: path for path in files if path.suffix in (".safetensors", ".pt", ".ckpt")}


def _tagged(tag: Any, folder: Path | None, files: Mapping[str, Path]) -> Lora:
    """Finds the file of a prompt's `<lora:NAME:WEIGHT>`. tag: a `text.syntax.LoraTag`."""
    if folder is None:
        raise ConfigError(f"the prompt names the LoRA {tag.name!r}: give --lora-dir DIR, the folder it lies in")
    if tag.name not in files:
        raise DataError(f"--lora-dir {folder}: no LoRA {tag.name!r} in it; there are {', '.join(files) or 'none'}")
    return Lora(files[tag.name], tag.unet_weight, tag.text_weight)


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


def _writable_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written to: {error.strerror or error}") from None
    return path


# ------------------------------------------------------------------------------------------------ what comes out


def safe_name(prompt: str) -> str:
    """Makes a prompt part of a file name: letters and digits of any script and hyphens, 1 to 80 bytes."""
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")
    return words.encode()[:_LONGEST_NAME].decode(errors="ignore").strip("-") or "picture"


@contextlib.contextmanager
def _numbers(folder: Path, count: int) -> Iterator[int]:
    """Yields the first of `count` numbers for the names of pictures, which no other run gets during the block.

    They follow the highest number in the folder, so that no picture is overwritten. A hidden file holds the last one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ImportError):  # network drives may have no locks, and Windows has no fcntl
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        matches = (re.match(r"\.?(\d{5,})-.*\.png$", name) for name in os.listdir(folder))
        first = max((int(match[1]) + 1 for match in matches if match), default=0)
        claim = folder / f".{first + count - 1:05d}-claimed.png"
        claim.touch()
    finally:
        os.close(descriptor)
    try:
        yield first
    finally:
        claim.unlink(missing_ok=True)


def _free(folder: Path, name: str, number: int) -> Path:
    """The path of a grid: its name or, if that is taken, its name with the number of the first picture of this run."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return folder / f"{Path(name).stem}-of-{number:05d}.png"
    return folder / name


def _mention(picture: Image.Image, drawn: str, prompt: str, loras: Sequence[Lora]) -> None:
    """Writes `prompt` and the LoRAs in place of the prompt `drawn` in a picture's text, where A1111 looks for them."""
    text = picture.info["parameters"]
    picture.info["parameters"] = " ".join([prompt, *(lora.tag for lora in loras)]) + text.removeprefix(drawn)


def _save(picture: Image.Image, path: Path) -> None:
    try:
        save_png(picture, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    print(path)


if __name__ == "__main__":
    sys.exit(main())
