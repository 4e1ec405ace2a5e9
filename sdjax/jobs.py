"""Pictures to draw, one job each, and how they share batches and compiled programs."""

import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from sdjax import drawing
from sdjax.errors import ConfigError, DataError
from sdjax.inpainting import Frame, Inpainting, outpainted
from sdjax.prompt_syntax import LoraTag, without_loras
from sdjax.request import Hires, Request, check_values, for_img2img, for_inpaint, for_text2image

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture: its words and seeds, and the settings it may share with others (files as paths).

    lora: FILE or FILE:WEIGHT each, or "none"; a line of a file of jobs gives one.
    origin: what to begin an error about it with.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    variation_seed: int = 0
    variation_strength: float = Request.variation_strength
    steps: int = Request.steps
    guidance: float = Request.guidance
    guidance_rescale: float = Request.guidance_rescale
    height: int | None = None
    width: int | None = None
    sampler: str = Request.sampler
    karras: bool = Request.karras
    clip_skip: int | None = Request.clip_skip
    prompt_syntax: str = Request.prompt_syntax
    emphasis: str = Request.emphasis
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    outpaint: tuple[int, int, int, int] | None = None
    mask_grow: int = Inpainting.mask_grow
    mask_blur: int = Inpainting.mask_blur
    fill: str = Inpainting.fill
    only_masked: bool = Inpainting.only_masked
    padding: int = Inpainting.padding
    hires_scale: float = Hires.scale
    hires_steps: int | None = Hires.steps
    hires_strength: float = Hires.strength
    hires_upscaler: str = Hires.upscaler
    lora: tuple[str, ...] = ()
    origin: str = dataclasses.field(default="", compare=False)

    @property
    def shared(self) -> "Job":
        """The job without what is its own in a batch."""
        return dataclasses.replace(self, prompt="", negative_prompt="", seed=0, variation_seed=0)

    @property
    def paints(self) -> bool:
        """Whether a mask says what of the image to draw."""
        return self.mask is not None or self.outpaint is not None

    @property
    def full_strength(self) -> float:
        """The strength, or its default: all of a mask's region, three quarters of a whole image."""
        return self.strength if self.strength is not None else 1.0 if self.image is None or self.paints else 0.75

    @property
    def words(self) -> tuple[str, list[LoraTag]]:
        """The prompt without its LoRAs, and these."""
        return (self.prompt, []) if self.prompt_syntax == "plain" else without_loras(self.prompt)

    def check_shared(self) -> None:
        """ConfigError or DataError for shared settings that can be told wrong without a model."""
        if self.image is None and self.paints:
            raise ConfigError("--mask and --outpaint say what of an --image to paint, and none is given")
        if self.image is None and self.strength is not None:
            raise ConfigError("--strength says how far to redraw an --image, and none is given")
        if self.image is not None and self.hires_scale != 1:
            raise ConfigError("--hires-scale enlarges what is drawn without an --image")
        check_values(vars(self))
        for name in ("height", "width"):
            if (side := getattr(self, name)) is not None and (side < 8 or side % 8):
                raise ConfigError(f"{name} = {side}: must be a positive multiple of 8")
        Inpainting(**{name: getattr(self, name) for name in MASKING})
        if self.image is not None:
            inputs(self)


SETTINGS = tuple(field.name for field in dataclasses.fields(Job) if field.name != "origin")
OWN = ("prompt", "negative_prompt", "seed", "variation_seed")
FILES = ("image", "mask", "strength", "outpaint")
MASKING = tuple(field.name for field in dataclasses.fields(Inpainting))
HIRES = tuple(f"hires_{field.name}" for field in dataclasses.fields(Hires))
_TYPES: dict[str, type] = {
    name: (typing.get_args(hint) or (hint,))[0] for name, hint in typing.get_type_hints(Job).items()
}


@contextlib.contextmanager
def blaming(job: Job) -> Iterator[None]:
    """Errors name the file and line a job comes from."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not job.origin:
            raise
        raise type(error)(f"{job.origin}: {error}") from error


def read_jobs(path: Path, base: Mapping[str, Any]) -> list[Job]:
    """A job a line of a JSON-lines file, each a table of `Job`'s fields over `base`; errors name the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--jobs {path}: {getattr(error, 'strerror', None) or error}") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"--jobs {path}, line {number}"
            jobs.append(Job(**{**base, **_table(line, origin), "origin": origin}))
    if not jobs:
        raise DataError(f"--jobs {path}: holds no job")
    return jobs


def _table(line: str, origin: str) -> dict[str, Any]:
    """The settings of a line, of the right types; null is as if it were not there."""
    try:
        table = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON: {error.msg}") from None
    if not isinstance(table, dict) or not isinstance(table.get("prompt"), str):
        raise DataError(f"{origin}: give a table with a prompt")
    table = {name: value for name, value in table.items() if value is not None}
    for name, value in table.items():
        if name not in SETTINGS:
            raise ConfigError(f"{origin}: no setting {name!r}; there are {', '.join(SETTINGS)}")
        kind = _TYPES[name]
        if kind is float and type(value) is int:
            value = table[name] = float(value)
        if name == "outpaint":
            if not isinstance(value, list) or len(value) != 4 or any(type(side) is not int for side in value):
                raise ConfigError(f"{origin}: outpaint = {value!r}: give [left, top, right, bottom], pixels")
            table[name] = tuple(value)
        elif type(value) is not kind:
            raise ConfigError(f"{origin}: {name} = {value!r} is no {kind.__name__}")
        elif name == "lora":
            table[name] = (value,)
    return table


def batches(jobs: Sequence[Job], most: int) -> Iterator[tuple[list[int], list[Job]]]:
    """(numbers of the jobs drawn, the batch), jobs of the same settings together in as few batches as it takes.

    The batches of a group are of one size, so that one program draws all: the last is filled up with its last job, and
    what that draws is thrown away.
    """
    for group in _groups(jobs):
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield part, [jobs[number] for number in part + part[-1:] * (size - len(part))]


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """Numbers of the jobs of the same settings."""
    groups: dict[Job, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.shared, []).append(number)
    return list(groups.values())


def check_alone(jobs: Sequence[Job]) -> None:
    """Raises ConfigError or DataError for what can be told wrong without a model; errors name the job's line."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]]):
            jobs[group[0]].check_shared()
        for job in (jobs[number] for number in group):
            with blaming(job):
                check_values({"seed": job.seed, "variation_seed": job.variation_seed})
                _ = job.words


def check(sd: "StableDiffusion", jobs: Sequence[Job]) -> None:
    """Raises ConfigError for jobs that a model, whose outline will do, cannot draw; errors name the job's line."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]]):
            request, _ = _request(sd, [jobs[group[0]]])
        for job in (jobs[number] for number in group):
            with blaming(job):
                own = {"prompts": (job.prompt,), "negatives": (job.negative_prompt,)}
                drawing.check(sd, dataclasses.replace(request, **own))


def draw(sd: "StableDiffusion", batch: Sequence[Job]) -> list[Image.Image]:
    """A picture of each job of a batch."""
    request, given = _request(sd, batch)
    if not given:
        return drawing.text2image(sd, request)
    if isinstance(given[0], Frame):
        return drawing.inpaint(sd, request, given)
    return drawing.img2img(sd, request, given)


def _request(sd: "StableDiffusion", batch: Sequence[Job]) -> tuple[Request, list[Any]]:
    """The request of a batch, and its image or frame."""
    first = batch[0]
    prompts, negatives, seeds, variations = ([getattr(job, name) for job in batch] for name in OWN)
    taken = [name for name in SETTINGS if name not in OWN + FILES + MASKING + HIRES + ("lora",)]
    settings: Any = {name: getattr(first, name) for name in taken} | {"seed": seeds, "variation_seed": variations}
    masking, hires = ({name: getattr(first, name) for name in names} for names in (MASKING, HIRES))
    if first.image is None:
        return for_text2image(sd, prompts, negatives, settings | hires), []
    image, mask = inputs(first)
    strength = first.full_strength
    if first.paints:
        return for_inpaint(sd, prompts, negatives, image, mask, settings | masking, strength=strength)
    return for_img2img(sd, prompts, negatives, image, settings, strength=strength)


def inputs(job: Job) -> tuple[Image.Image, Image.Image | None]:
    """Image and mask of a job that has an image; "alpha" as the mask means the image's transparent part."""
    assert job.image is not None
    image = read_image(job.image, "--image")
    mask = None if job.mask in (None, "alpha") else read_image(job.mask, "--mask")
    if job.outpaint is None:
        return image, mask
    left, top, right, bottom = job.outpaint
    return outpainted(image, mask, left=left, top=top, right=right, bottom=bottom)


def read_image(path: str, flag: str) -> Image.Image:
    """A picture, upright. Raises DataError, which names the flag that gave it."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise DataError(f"{flag} {path}: no such file") from None
    except Exception as error:  # a malformed file makes Pillow raise nearly anything
        raise DataError(f"{flag} {path}: cannot be read as an image: {error}") from error
