"""Pictures from prompts: `python -m sdjax.generate --model tiny --prompt "red heart" --guidance 3`.

A leaf: nothing imports it. JAX is imported only once the command line has been found good, so `--help` and mistakes
answer at once.
"""

import argparse
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

from PIL import Image

from sdjax.draw import grids
from sdjax.draw.settings import complete_job, declarations, from_text, help_text
from sdjax.errors import ConfigError, DataError
from sdjax.formats.png_parameters import save_png
from sdjax.runtime import command
from sdjax.settings import Dtype, Range, Seed, choices, plain_type, read_value
from sdjax.text import syntax

_LONGEST_NAME = 80  # bytes of a prompt kept in a file name; file systems allow 255 in all


class Lora(NamedTuple):
    """A LoRA to merge in: a `--lora FILE[:WEIGHT]`, a job's own, or one that a prompt names."""

    path: Path
    unet_weight: float
    text_weight: float

    @property
    def tag(self) -> str:
        """As A1111 writes it in a prompt."""
        return f"<lora:{self.path.stem}:{self.unet_weight:g}>"


class Embedding(NamedTuple):
    """One `--embedding FILE[:TOKEN]`."""

    path: Path
    token: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    settings = _settings(args)
    axes = [grids.parse_axis(text) for text in (args.grid_x, args.grid_y) if text is not None]
    on_axis = any(axis.name == "prompt" for axis in axes)
    prompts = _prompts(args.prompt, args.prompts_file, needed=args.jobs is None and not on_axis)
    if on_axis and args.jobs is None:
        prompts = prompts or [""]  # each picture gets its prompt from the axis
    _check_values(args, len(prompts), settings)
    embeddings = [_embedding(text) for text in args.embedding]

    from sdjax import loading
    from sdjax.draw import jobs
    from sdjax.formats.lora_file import load_lora
    from sdjax.model import Model
    from sdjax.runtime import compilation_cache, host_memory, out_of_memory
    from sdjax.textual_inversion import vector_counts

    wanted = _jobs(args, settings, prompts, axes)
    jobs.check_alone(wanted)
    named = _loras_below(args.lora_dir)
    loras: list[tuple[Lora, ...]] = []  # of each job
    for job in wanted:
        with jobs.blaming(job):
            given = [_lora(text) for text in job.settings["lora"] if text != "none"]
            loras.append((*given, *(_tagged(tag, args.lora_dir, named) for tag in job.words[1])))
    out = _writable_folder(args.out)
    compilation_cache.enable()
    host_memory.keep()

    outline = loading.outline(
        args.model, args.dtype, variant=args.variant, tokenizer=args.tokenizer, prediction_type=args.prediction_type
    )
    words = [outline.load_words(embedding.path, embedding.token) for embedding in embeddings]
    bare = [job.replace(prompt=job.words[0]) for job in wanted]
    jobs.check(functools.reduce(lambda known, own: known.with_words(vector_counts(own)), words, outline), bare)
    adapters = {path: load_lora(path, outline.shapes) for path in {lora.path for own in loras for lora in own}}

    model = functools.reduce(Model.with_embedding, words, loading.with_weights(outline))
    if args.tiled_vae is not None:
        model = model.with_tiled_vae(args.tiled_vae, args.tiled_vae // 8)
    pictures: dict[int, Image.Image] = {}
    number = _next_number(out)
    groups = _by_loras(loras)
    for n, (own, places) in enumerate(groups.items(), 1):
        adapted = model
        for lora in own:
            for part, tree in adapters[lora.path].items():
                adapted = adapted.with_lora({part: tree}, lora.unet_weight if part == "unet" else lora.text_weight)
        if n == len(groups):
            del model  # or the weights without LoRAs stay in memory beside those with them
        for chosen, batch in jobs.batches([bare[i] for i in places], args.batch_size):
            with out_of_memory.advice("try a smaller --batch-size, a smaller picture, --dtype bfloat16"):
                drawn = jobs.draw(adapted, batch)
            for i, picture in zip((places[n] for n in chosen), drawn, strict=False):
                job, prompt = wanted[i], bare[i].settings["prompt"]
                _mention(picture, prompt, job.settings["prompt"], own[: len(own) - len(job.words[1])])
                _save(picture, out / f"{number + i:05d}-{job.settings['seed']}-{safe_name(prompt)}.png")
                pictures[i] = picture
    in_order = [pictures[i] for i in range(len(pictures))]
    for name, sheet in _sheets(in_order, axes, args.num_images):
        _save(sheet, out / name)


def _jobs(args: argparse.Namespace, settings: Mapping[str, Any], prompts: Sequence[str], axes: Sequence[grids.Axis]):
    """The jobs of the flags and of --jobs, each over the values of the axes; the x axis varies fastest."""
    from sdjax.draw import jobs

    drawn = []
    moved = "variation_seed" if settings.get("variation_strength") else "seed"  # see `draw.settings.Settings`
    first = settings.get(moved, 0)
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_images)):
        drawn.append(jobs.Job(complete_job({**settings, "prompt": prompt, moved: first + i})))
    if args.jobs is not None:
        drawn += jobs.read_jobs(args.jobs, settings)
    for axis in reversed(axes):  # y outside, x inside
        drawn = [job.replace(**{axis.name: value}) for job in drawn for value in axis.values]
    return drawn


def _sheets(
    pictures: Sequence[Image.Image], axes: Sequence[grids.Axis], columns: int
) -> Iterator[tuple[str, Image.Image]]:
    """(file name, sheet): all pictures of one size or, with axes, those of each job labelled with their values."""
    if not axes:
        if len(pictures) > 1 and len({picture.size for picture in pictures}) == 1:
            yield "grid.png", grids.sheet(pictures, columns=columns if columns > 1 else None)
        return
    x, y = axes[0], axes[1] if len(axes) > 1 else None
    size = len(x.values) * (len(y.values) if y else 1)
    for i in range(0, len(pictures), size):
        name = "grid.png" if len(pictures) == size else f"grid-{i // size}.png"
        yield name, grids.labelled(pictures[i : i + size], x.labels, y.labels if y else [])


# ------------------------------------------------------------------------------------------------ the command line


def _parser() -> command.Parser:
    parser = command.Parser(prog="sdjax generate", description="Draw pictures from prompts.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help='"tiny" (embedded), a diffusers folder, a model file, or a hub id')
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (1)")
    for name in FLAGS:
        hint, declared = declarations()[name]
        kind = plain_type(hint)
        more: dict[str, Any] = {"metavar": declared.metavar or ("NAME" if choices(hint) else "N")}
        if kind is bool:
            more = {"action": "store_true", "default": None}
        elif name == "lora":
            more |= {"action": "append"}
        add(f"--{name.replace('_', '-')}", help=help_text(name).replace("%", "%%"), **more)
    add("--tiled-vae", type=int, nargs="?", const=512, metavar="PIXELS", help="decode in tiles of this side (512)")
    add("--jobs", type=Path, metavar="FILE", help="more pictures: a JSON table of settings a line, over the flags'")
    add("--grid-x", metavar="NAME=V,V", help="draw each picture with each value of a setting; a labelled grid")
    add("--grid-y", metavar="NAME=V,V", help="and with each value of another")
    add("--lora-dir", type=Path, metavar="DIR", help="folder of the LoRAs that prompts name: <lora:NAME:WEIGHT>")
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="new words for prompts, from Textual "
        "Inversion; TOKEN: the word to use instead of the one in the file; may be repeated",
    )
    add("--dtype", default="float32", metavar="TYPE", help=f"one of {', '.join(get_args(Dtype))} (float32)")
    add("--variant", metavar="NAME", help="of the weight files, such as fp16")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for a model of a single file (the hub's)")
    add("--prediction-type", default="", metavar="NAME", help="epsilon or v_prediction, where the model's is wrong")
    add("--batch-size", type=int, default=4, metavar="N", help="most pictures drawn at once (4)")
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (outputs)")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


FLAGS = tuple(name for name in declarations() if name != "prompt")
"""The settings of drawing that are flags."""


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The drawing settings that the flags give, checked. Raises ConfigError, which names the flag."""
    settings = {}
    for name in FLAGS:
        given, flag = vars(args)[name], f"--{name.replace('_', '-')}"
        if isinstance(given, str):
            settings[name] = from_text(name, given, flag)
        elif given is not None:
            settings[name] = tuple(given) if isinstance(given, list) else given
    return settings


def _prompts(given: Sequence[str], file: Path | None, *, needed: bool) -> list[str]:
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"--prompts-file {file}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"--prompts-file {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts and needed:
        raise ConfigError("nothing to draw: give --prompt TEXT or --prompts-file FILE with a prompt a line")
    return prompts


def _lora(text: str) -> Lora:
    """FILE or FILE:WEIGHT; a file whose whole name is `text` wins."""
    path, weight = Path(text), 1.0
    head, colon, tail = text.rpartition(":")
    if colon and not path.exists():
        path = Path(head)
        try:
            weight = float(tail)
        except ValueError:
            raise ConfigError(f"--lora {text}: no such file, and {tail!r} is not a weight") from None
        if not math.isfinite(weight):
            raise ConfigError(f"--lora {text}: the weight must be a finite number")
    if not path.exists():
        raise DataError(f"--lora {path}: no such file")
    return Lora(path, weight, weight)


def _loras_below(folder: Path | None) -> dict[str, Path]:
    """The files of LoRAs anywhere under a folder, by name."""
    files = sorted(folder.rglob("*")) if folder is not None else []
    return {path.stem: path for path in files if path.suffix in (".safetensors", ".pt", ".ckpt")}


def _tagged(tag: syntax.LoraTag, folder: Path | None, files: Mapping[str, Path]) -> Lora:
    """The file that a prompt's `<lora:NAME:WEIGHT>` means."""
    if folder is None:
        raise ConfigError(f"the prompt names the LoRA {tag.name!r}: give --lora-dir DIR, the folder it lies in")
    if tag.name not in files:
        raise DataError(f"--lora-dir {folder}: no LoRA {tag.name!r} in it; there are {', '.join(files) or 'none'}")
    return Lora(files[tag.name], tag.unet_weight, tag.text_weight)


def _by_loras(loras: Sequence[tuple[Lora, ...]]) -> dict[tuple[Lora, ...], list[int]]:
    """The numbers of the jobs that are drawn with the same LoRAs."""
    groups: dict[tuple[Lora, ...], list[int]] = {}
    for i, own in enumerate(loras):
        groups.setdefault(own, []).append(i)
    return groups


def _embedding(text: str) -> Embedding:
    """FILE or FILE:TOKEN; a file whose whole name is `text` wins."""
    path, token = Path(text), None
    head, colon, tail = text.rpartition(":")
    if colon and not path.exists():
        path, token = Path(head), tail
    if not path.exists():
        raise DataError(f"--embedding {path}: no such file")
    return Embedding(path, token)


def _check_values(args: argparse.Namespace, prompts: int, settings: Mapping[str, Any]) -> None:
    """Checks the flags that are no settings of a picture. Raises ConfigError."""
    read_value(Dtype, args.dtype, "--dtype")
    for flag, value, low in (
        ("--num-images", args.num_images, 1),
        ("--batch-size", args.batch_size, 1),
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
    """A prompt as part of a file name: letters and digits of any script and hyphens, at most 80 bytes, never empty."""
    words = re.sub(r"[\W_]+", "-", prompt).strip("-")
    return words.encode()[:_LONGEST_NAME].decode(errors="ignore").strip("-") or "picture"


def _next_number(folder: Path) -> int:
    """One past the highest number a picture in the folder begins with, so that none is overwritten."""
    found = (re.match(r"(\d{5,})-.*\.png$", name) for name in os.listdir(folder))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _mention(picture: Image.Image, drawn: str, prompt: str, loras: Sequence[Lora]) -> None:
    """Put the LoRAs into the picture's recorded prompt `drawn`, where A1111 looks for them."""
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
