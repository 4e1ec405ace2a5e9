"""Pictures from prompts: `python -m sdjax.generate --model tiny --prompt "red heart" --guidance 3`.

A leaf: nothing imports it. JAX is imported only once the command line has been found good, so `--help` and mistakes
answer at once.
"""

import argparse
import contextlib
import itertools
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image, ImageOps

from sdjax import command, prompt_syntax
from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.formats.png_parameters import SAMPLER_NAMES, save_png

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion

_DTYPES = ("float32", "bfloat16", "float16")
_LONGEST_NAME = 80  # bytes of a prompt kept in a file name; file systems allow 255 in all


class Lora(NamedTuple):
    """One `--lora FILE[:WEIGHT]`."""

    path: Path
    weight: float

    @property
    def tag(self) -> str:
        """As A1111 writes it in a prompt."""
        return f"<lora:{self.path.stem}:{self.weight:g}>"


class Embedding(NamedTuple):
    """One `--embedding FILE[:TOKEN]`."""

    path: Path
    token: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, as of `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    prompts = _prompts(args.prompt, args.prompts_file)
    loras = [_lora(text) for text in args.lora]
    embeddings = [_embedding(text) for text in args.embedding]
    _check_values(args, len(prompts))
    texts_of, tags_of = _without_tags(prompts, args)
    strength = _strength(args)
    image = None if args.image is None else _read_image(args.image)
    out = _writable_folder(args.out)

    from sdjax import compilation_cache, host_memory, loading, sampling
    from sdjax.formats.lora_file import load_lora

    sd = loading.outline(
        args.model, args.dtype, variant=args.variant, tokenizer=args.tokenizer, prediction_type=args.prediction_type
    )
    sampling.plan(sd.schedule, args.sampler, args.steps, karras=args.karras, strength=strength)
    sd.hidden_state(args.clip_skip)
    adapters = [load_lora(lora.path, sd.params) for lora in loras]
    tagged = {tag.name for tags in tags_of.values() for tag in tags}
    by_name = {name: load_lora(path, sd.params) for name, path in _find_loras(args.lora_dir, tagged).items()}
    for embedding in embeddings:
        sd = sd.with_embedding(embedding.path, embedding.token)

    compilation_cache.enable()
    host_memory.keep()
    sd = loading.with_weights(sd)
    for lora, adapter in zip(loras, adapters, strict=True):
        sd = sd.with_lora(adapter, lora.weight)
    settings: dict[str, Any] = {
        "steps": args.steps,
        "guidance": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "height": args.height,
        "width": args.width,
        "sampler": args.sampler,
        "karras": args.karras,
        "clip_skip": args.clip_skip,
        "prompt_syntax": args.prompt_syntax,
        "emphasis": args.emphasis,
    }

    def draw(sd: "StableDiffusion", texts: list[str], seed: int) -> list[Image.Image]:
        if image is None:
            return sd.text2image(texts, args.negative_prompt, seed=seed, **settings)
        return sd.img2img(texts, image, strength=strength, negative_prompt=args.negative_prompt, seed=seed, **settings)

    pictures = []
    wanted = [prompt for prompt in prompts for _ in range(args.num_images)]
    number = _next_number(out)
    for tags, run in itertools.groupby(wanted, tags_of.__getitem__):
        own, texts = sd, [texts_of[prompt] for prompt in run]
        for tag in tags:
            for part, tree in by_name[tag.name].items():
                own = own.with_lora({part: tree}, tag.unet_weight if part == "unet" else tag.text_weight)
        first = len(pictures)
        for start, batch in _batches(texts, args.batch_size):
            with _memory_advice():
                drawn = draw(own, batch, args.seed + first + start)
            for picture, text in zip(drawn, texts[start : start + len(batch)], strict=False):
                i = len(pictures)
                _mention(picture, text, wanted[i], loras)
                _save(picture, out / f"{number + i:05d}-{args.seed + i}-{safe_name(text)}.png")
                pictures.append(picture)
    if len(pictures) > 1:
        _save(grid(pictures, columns=args.num_images if args.num_images > 1 else None), out / "grid.png")


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
    add("--steps", type=int, default=20, help="sampler steps, 1 to 1000 (20)")
    add("--guidance", type=float, default=7.5, help="classifier-free guidance scale; 1 = off (7.5; tiny likes 2 to 4)")
    add("--guidance-rescale", type=float, default=0.0, metavar="PHI", help="0 to 1, against overexposure (0)")
    add("--height", type=int, metavar="PIXELS", help="multiple of 8 (the model's, or the image's)")
    add("--width", type=int, metavar="PIXELS", help="multiple of 8 (the model's, or the image's)")
    add("--sampler", default="dpmpp_2m", metavar="NAME", help=f"one of {', '.join(SAMPLER_NAMES)} (dpmpp_2m)")
    add("--karras", action="store_true", help="noise levels spaced as in Karras et al. 2022")
    add("--clip-skip", type=int, metavar="N", help="text model layer from the end: 1 last, 2 penultimate (the model's)")
    add("--image", type=Path, metavar="FILE", help="start from this picture")
    add("--strength", type=float, metavar="S", help="how far to redraw --image: above 0, at most 1 (0.75)")
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
    add("--prompt-syntax", default="a1111", metavar="NAME", help=f"how prompts are read: {syntaxes} (a1111)")
    add("--emphasis", default="original", metavar="NAME", help=f"whether weights keep the mean: {emphases} (original)")
    add("--dtype", default="float32", metavar="TYPE", help=f"one of {', '.join(_DTYPES)} (float32)")
    add("--variant", metavar="NAME", help="of the weight files, such as fp16")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for a model of a single file (the hub's)")
    add("--prediction-type", default="", metavar="NAME", help="epsilon or v_prediction, where the model's own is wrong")
    add("--batch-size", type=int, default=4, metavar="N", help="most pictures drawn at once (4)")
    add("--out", type=Path, default=Path("outputs"), metavar="DIR", help="folder for the pictures (outputs)")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"--prompts-file {file}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"--prompts-file {file}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
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
    return Lora(path, weight)


def _without_tags(
    prompts: Sequence[str], args: argparse.Namespace
) -> tuple[dict[str, str], dict[str, list[prompt_syntax.LoraTag]]]:
    """Each prompt's text and LoRAs. Raises ConfigError for LoRAs without a folder of them."""
    if args.prompt_syntax == "plain":
        return {prompt: prompt for prompt in prompts}, {prompt: [] for prompt in prompts}
    read = {prompt: prompt_syntax.without_loras(prompt) for prompt in prompts}
    named = [tag.name for _, tags in read.values() for tag in tags]
    if named and args.lora_dir is None:
        raise ConfigError(f"the prompt names the LoRA {named[0]!r}: give --lora-dir DIR, the folder it lies in")
    return {prompt: text for prompt, (text, _) in read.items()}, {prompt: tags for prompt, (_, tags) in read.items()}


def _find_loras(folder: Path | None, names: AbstractSet[str]) -> dict[str, Path]:
    """The files of these names anywhere under the folder. DataError for one that is not there."""
    if not names or folder is None:
        return {}
    there = {path.stem: path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".pt", ".ckpt")}
    if missing := sorted(names - there.keys()):
        raise DataError(f"--lora-dir {folder}: no LoRA {missing[0]!r} in it; there are {', '.join(there) or 'none'}")
    return {name: there[name] for name in names}


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
        if value not in choices:
            raise ConfigError(f"{flag} {value}: choices are {', '.join(choices)}")
    for flag, value, low, high in (
        ("--steps", args.steps, 1, 1000),
        ("--num-images", args.num_images, 1, math.inf),
        ("--batch-size", args.batch_size, 1, math.inf),
        ("--clip-skip", args.clip_skip, 1, math.inf),
        ("--seed", args.seed, 0, 2**32 - prompts * max(args.num_images, 1)),  # each picture has its own
        ("--guidance", args.guidance, 0, 1000),
        ("--guidance-rescale", args.guidance_rescale, 0, 1),
    ):
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{flag} {value}: must be {f'{low} to {high}' if high < math.inf else f'{low} or more'}")
    for flag, value in (("--height", args.height), ("--width", args.width)):
        if value is not None and (value < 8 or value % 8):
            raise ConfigError(f"{flag} {value}: must be a positive multiple of 8")


def _strength(args: argparse.Namespace) -> float:
    if args.image is None and args.strength is not None:
        raise ConfigError("--strength says how far to redraw an --image, and none is given")
    strength = args.strength if args.strength is not None else 1.0 if args.image is None else 0.75
    if not 0 < strength <= 1:
        raise ConfigError(f"--strength {strength:g}: must lie above 0 and at most at 1")
    return strength


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"--image {path}: no such file") from None
    except Exception as error:  # a malformed file makes Pillow raise nearly anything
        raise DataError(f"--image {path}: cannot be read as an image: {error}") from error


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


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size in rows; columns: default as square as it gets."""
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def _batches(prompts: list[str], most: int) -> Iterator[tuple[int, list[str]]]:
    """(index of the first, prompts) in as few batches as it takes, all of one size, so that one program draws all.

    The last is filled up with its last prompt; what that draws is thrown away.
    """
    size = math.ceil(len(prompts) / math.ceil(len(prompts) / most))
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        yield start, batch + batch[-1:] * (size - len(batch))


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
