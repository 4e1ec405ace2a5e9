"""Pictures from prompts: `python -m sdjax.generate --model tiny --prompt "red heart" --guidance 3`.

A leaf: nothing imports it. JAX is imported only once the command line has been found good, so `--help` and mistakes
answer at once.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from sdjax import command, grids, prompt_syntax
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.formats.png_parameters import SAMPLER_NAMES, save_png

if TYPE_CHECKING:
    from sdjax.jobs import Job

_DTYPES = ("float32", "bfloat16", "float16")
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
    """Runs the command and returns its exit code, as of `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    axes = [grids.parse_axis(text) for text in (args.grid_x, args.grid_y) if text is not None]
    on_axis = any(axis.name == "prompt" for axis in axes)
    prompts = _prompts(args.prompt, args.prompts_file, needed=args.jobs is None and not on_axis)
    if on_axis and args.jobs is None:
        prompts = prompts or [""]  # each picture gets its own from the axis
    _check_values(args, len(prompts))
    embeddings = [_embedding(text) for text in args.embedding]

    from sdjax import compilation_cache, host_memory, jobs, loading
    from sdjax.formats.lora_file import load_lora

    wanted = _jobs(args, prompts, axes)
    jobs.check_alone(wanted)
    named = _loras_below(args.lora_dir)
    loras: list[tuple[Lora, ...]] = []  # of each job
    for job in wanted:
        with jobs.blaming(job):
            given = [_lora(text) for text in job.lora if text != "none"]
            loras.append((*given, *(_tagged(tag, args.lora_dir, named) for tag in job.words[1])))
    out = _writable_folder(args.out)
    compilation_cache.enable()
    host_memory.keep()

    sd = loading.outline(
        args.model, args.dtype, variant=args.variant, tokenizer=args.tokenizer, prediction_type=args.prediction_type
    )
    for embedding in embeddings:
        sd = sd.with_embedding(embedding.path, embedding.token)
    bare = [dataclasses.replace(job, prompt=job.words[0]) for job in wanted]
    jobs.check(sd, bare)
    adapters = {path: load_lora(path, sd.params) for path in {lora.path for own in loras for lora in own}}
    if args.tiled_vae is not None:
        sd = sd.with_tiled_vae(args.tiled_vae, args.tiled_vae // 8)
    sd = loading.with_weights(sd)

    pictures: dict[int, Image.Image] = {}
    number = _next_number(out)
    groups = _by_loras(loras)
    for n, (own, places) in enumerate(groups.items(), 1):
        adapted = sd
        for lora in own:
            for part, tree in adapters[lora.path].items():
                adapted = adapted.with_lora({part: tree}, lora.unet_weight if part == "unet" else lora.text_weight)
        if n == len(groups):
            del sd  # or the weights without LoRAs lie beside those with
        for chosen, batch in jobs.batches([bare[i] for i in places], args.batch_size):
            with _memory_advice():
                drawn = jobs.draw(adapted, batch)
            for i, picture in zip((places[n] for n in chosen), drawn, strict=False):
                _mention(picture, bare[i].prompt, wanted[i].prompt, own[: len(own) - len(wanted[i].words[1])])
                _save(picture, out / f"{number + i:05d}-{wanted[i].seed}-{safe_name(bare[i].prompt)}.png")
                pictures[i] = picture
    in_order = [pictures[i] for i in range(len(pictures))]
    for name, sheet in _sheets(in_order, axes, args.num_images):
        _save(sheet, out / name)


def _jobs(args: argparse.Namespace, prompts: Sequence[str], axes: Sequence[grids.Axis]) -> list["Job"]:
    """What is to be drawn: a job a prompt and number, those of --jobs, and each over the axes' values, x the faster."""
    from sdjax import jobs

    settings = {name: value for name in jobs.SETTINGS if (value := getattr(args, name, None)) is not None}
    settings["lora"] = tuple(args.lora)
    settings["outpaint"] = None if args.outpaint is None else _sides(args.outpaint)
    drawn = []
    for i, prompt in enumerate(prompt for prompt in prompts for _ in range(args.num_images)):
        moved = "variation_seed" if args.variation_strength else "seed"  # as of `request.Settings`
        drawn.append(jobs.Job(**settings | {"prompt": prompt, moved: getattr(args, moved) + i}))
    if args.jobs is not None:
        drawn += jobs.read_jobs(args.jobs, settings)
    for axis in reversed(axes):  # y outside, x inside
        values = [(value,) for value in axis.values] if axis.name == "lora" else axis.values
        drawn = [dataclasses.replace(job, **{axis.name: value}) for job in drawn for value in values]
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


def _sides(text: str) -> tuple[int, int, int, int]:
    try:
        left, top, right, bottom = (int(side) for side in text.split(","))
    except ValueError:
        raise ConfigError(f"--outpaint {text}: give L,T,R,B, pixels to add at each side") from None
    return left, top, right, bottom


# ------------------------------------------------------------------------------------------------ the command line


def _parser() -> command.Parser:
    parser = command.Parser(prog="sdjax generate", description="Draw pictures from prompts.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help='"tiny" (embedded), a diffusers folder, a model file, or a hub id')
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help="more prompts, one a line, UTF-8")
    add("--negative-prompt", default="", metavar="TEXT", help="what not to draw")
    add("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt (1)")
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up from it (0)")
    add("--steps", type=int, help="sampler steps, 1 to 1000 (20)")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 = off (7.5; tiny likes 2 to 4)")
    add("--guidance-rescale", type=float, metavar="PHI", help="0 to 1, against overexposure (0)")
    add("--height", type=int, metavar="PIXELS", help="multiple of 8 (the model's, or the image's)")
    add("--width", type=int, metavar="PIXELS", help="multiple of 8 (the model's, or the image's)")
    add("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLER_NAMES)} (dpmpp_2m)")
    add("--karras", action="store_true", help="noise levels spaced as in Karras et al. 2022")
    add("--clip-skip", type=int, metavar="N", help="text model layer from the end: 1 last, 2 penultimate (the model's)")
    add("--variation-seed", type=int, default=0, metavar="N", help="another seed, to vary --seed's pictures by (0)")
    add("--variation-strength", type=float, metavar="S", help="how far to go towards it, 0 to 1 (0)")
    add("--hires-scale", type=float, metavar="X", help="draw, enlarge so much and draw again, 1 to 8 (1: off)")
    add("--hires-steps", type=int, metavar="N", help="sampler steps of the second pass (as --steps)")
    add("--hires-strength", type=float, metavar="S", help="how far the second pass redraws the first (0.5)")
    add("--hires-upscaler", metavar="NAME", help="latent or lanczos (latent)")
    add("--tiled-vae", type=int, nargs="?", const=512, metavar="PIXELS", help="decode in tiles of this side (512)")
    add("--image", metavar="FILE", help="start from this picture")
    add("--strength", type=float, metavar="S", help="how far to redraw --image: above 0, at most 1 (0.75; masked 1)")
    add("--mask", metavar="FILE", help='paint --image only where this is white; "alpha": where --image is transparent')
    add("--mask-grow", type=int, metavar="PIXELS", help="widen the mask (0)")
    add("--mask-blur", type=int, metavar="PIXELS", help="soft edge inside the mask (4)")
    add("--fill", metavar="NAME", help="what the region starts as: original, noise, blurred, constant (original)")
    add("--only-masked", action="store_true", help="draw the region around the mask alone, at height x width")
    add("--padding", type=int, metavar="PIXELS", help="of that region (32)")
    add("--outpaint", metavar="L,T,R,B", help="paint so many pixels more at each side of --image")
    add("--jobs", type=Path, metavar="FILE", help="more pictures: a JSON table of settings a line, over the flags'")
    add("--grid-x", metavar="NAME=V,V", help="draw each picture with each value of a setting; a labelled grid")
    add("--grid-y", metavar="NAME=V,V", help="and with each value of another")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="LoRA to merge in; may be repeated")
    add("--lora-dir", type=Path, metavar="DIR", help="folder of the LoRAs that prompts name: <lora:NAME:WEIGHT>")
    add(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[:TOKEN]",
        help="new words for prompts, from Textual "
        "Inversion; TOKEN: the word to use, in place of the file's own; may be repeated",
    )
    syntaxes, emphases = ", ".join(prompt_syntax.SYNTAXES), ", ".join(prompt_syntax.EMPHASES)
    add("--prompt-syntax", metavar="NAME", help=f"how prompts are read: {syntaxes} (a1111)")
    add("--emphasis", metavar="NAME", help=f"whether weights keep the mean: {emphases} (original)")
    add("--dtype", default="float32", metavar="TYPE", help=f"one of {', '.join(_DTYPES)} (float32)")
    add("--variant", metavar="NAME", help="of the weight files, such as fp16")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for a model of a single file (the hub's)")
    add("--prediction-type", default="", metavar="NAME", help="epsilon or v_prediction, where the model's own is wrong")
    add("--batch-size", type=int, default=4, metavar="N", help="most pictures drawn at once (4)")
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (outputs)")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


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


def _tagged(tag: prompt_syntax.LoraTag, folder: Path | None, files: Mapping[str, Path]) -> Lora:
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


def _check_values(args: argparse.Namespace, prompts: int) -> None:
    """What can be told wrong without looking at the model, which may have to be downloaded. Raises ConfigError."""
    for flag, value, choices in (
        ("--sampler", args.sampler, SAMPLER_NAMES),
        ("--dtype", args.dtype, _DTYPES),
        ("--prompt-syntax", args.prompt_syntax, prompt_syntax.SYNTAXES),
        ("--emphasis", args.emphasis, prompt_syntax.EMPHASES),
    ):
        if value is not None and value not in choices:
            raise ConfigError(f"{flag} {value}: choices are {', '.join(choices)}")
    for flag, value, low, high in (
        ("--steps", args.steps, 1, 1000),
        ("--num-images", args.num_images, 1, math.inf),
        ("--batch-size", args.batch_size, 1, math.inf),
        ("--clip-skip", args.clip_skip, 1, math.inf),
        ("--seed", args.seed, 0, 2**32 - prompts * max(args.num_images, 1)),  # each picture has its own
        ("--guidance", args.guidance, 0, 1000),
        ("--guidance-rescale", args.guidance_rescale, 0, 1),
        ("--variation-strength", args.variation_strength, 0, 1),
        ("--tiled-vae", args.tiled_vae, 64, math.inf),
    ):
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be {f'{low} to {high}' if high < math.inf else f'{low} or more'}")
    for flag, value in (("--height", args.height), ("--width", args.width)):
        if value is not None and (value < 8 or value % 8):
            raise ConfigError(f"{flag} {value}: must be a positive multiple of 8")


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


@contextlib.contextmanager
def _memory_advice() -> Iterator[None]:
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingStopped(
            "out of memory: try a smaller --batch-size, a smaller picture, --dtype bfloat16"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
