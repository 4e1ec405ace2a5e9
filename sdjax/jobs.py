"""Pictures to draw, one job each, and how they share batches and compiled programs."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from sdjax.errors import ConfigError, DataError
from sdjax.inpainting import Inpainting, outpainted

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture: its words and seeds, and the settings it may share with others (files as paths)."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    variation_seed: int = 0
    variation_strength: float = 0.0
    steps: int = 20
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    height: int | None = None
    width: int | None = None
    sampler: str = "dpmpp_2m"
    karras: bool = False
    clip_skip: int | None = None
    prompt_syntax: str = "a1111"
    emphasis: str = "original"
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    outpaint: tuple[int, int, int, int] | None = None
    mask_grow: int = 0
    mask_blur: int = 4
    fill: str = "original"
    only_masked: bool = False
    padding: int = 32
    hires_scale: float = 1.0
    hires_steps: int | None = None
    hires_strength: float = 0.5
    hires_upscaler: str = "latent"

    @property
    def shared(self) -> "Job":
        """The job without what is its own in a batch."""
        return dataclasses.replace(self, prompt="", negative_prompt="", seed=0, variation_seed=0)

    def check(self) -> None:
        """ConfigError or DataError for what can be told wrong without a model."""
        if self.image is None and self.paints:
            raise ConfigError("--mask and --outpaint say what of an --image to paint, and none is given")
        if not 0 < self.full_strength <= 1:
            raise ConfigError(f"--strength {self.full_strength:g}: must lie above 0 and at most at 1")
        Inpainting(**{name: getattr(self, name) for name in MASKING})
        if self.image is not None:
            inputs(self)

    @property
    def paints(self) -> bool:
        """Whether a mask says what of the image to draw."""
        return self.mask is not None or self.outpaint is not None

    @property
    def full_strength(self) -> float:
        """The strength, or its default: all of a mask's region, three quarters of a whole image."""
        return self.strength if self.strength is not None else 1.0 if self.image is None or self.paints else 0.75


SETTINGS = tuple(field.name for field in dataclasses.fields(Job))
OWN = ("prompt", "negative_prompt", "seed", "variation_seed")
MASKING = ("mask_grow", "mask_blur", "fill", "only_masked", "padding")
HIRES = ("hires_scale", "hires_steps", "hires_strength", "hires_upscaler")
_TYPES = {
    field.name: str(field.type if not isinstance(field.type, type) else field.type.__name__).split(" |")[0]
    for field in dataclasses.fields(Job)
}
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def read_jobs(path: Path, base: Mapping[str, Any]) -> list[Job]:
    """A job a line of a JSON-lines file, each a table of `Job`'s fields over those of `base`; errors name the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--jobs {path}: {getattr(error, 'strerror', None) or error}") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            table = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"--jobs {path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(table, dict) or not isinstance(table.get("prompt", base.get("prompt")), str):
            raise DataError(f"--jobs {path}, line {number}: give a table with a prompt")
        for name, value in table.items():
            if name not in _TYPES:
                raise ConfigError(f"--jobs {path}, line {number}: no setting {name!r}; there are {', '.join(_TYPES)}")
            allowed = _KINDS.get(_TYPES[name], (list,))
            if value is not None and (not isinstance(value, allowed) or isinstance(value, bool) != (bool in allowed)):
                raise ConfigError(f"--jobs {path}, line {number}: {name} = {value!r} is no {_TYPES[name]}")
        if isinstance(table.get("outpaint"), list):
            table["outpaint"] = tuple(table["outpaint"])
        jobs.append(Job(**{**base, **table}))
    if not jobs:
        raise DataError(f"--jobs {path}: holds no job")
    return jobs


def batches(jobs: Sequence[Job], most: int) -> Iterator[tuple[list[int], list[Job]]]:
    """(numbers of the jobs drawn, the batch), jobs of the same settings together in as few batches as it takes.

    The batches of a group are of one size, so that one program draws all: the last is filled up with its last job, and
    what that draws is thrown away.
    """
    groups: dict[Job, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.shared, []).append(number)
    for numbers in groups.values():
        size = math.ceil(len(numbers) / math.ceil(len(numbers) / most))
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            yield part, [jobs[number] for number in part + part[-1:] * (size - len(part))]


def draw(sd: "StableDiffusion", batch: Sequence[Job]) -> list[Image.Image]:
    """A picture of each job of a batch."""
    first = batch[0]
    settings = {name: value for name, value in dataclasses.asdict(first).items() if name not in OWN}
    for name in ("image", "mask", "strength", "outpaint"):
        settings.pop(name)
    masking, hires = ({name: settings.pop(name) for name in names} for names in (MASKING, HIRES))
    settings |= {name: [getattr(job, name) for job in batch] for name in ("seed", "variation_seed")}
    prompts, negatives = ([getattr(job, name) for job in batch] for name in OWN[:2])
    if first.image is None:
        return sd.text2image(prompts, negatives, **settings, **hires)
    image, mask = inputs(first)
    settings |= {"strength": first.full_strength, "negative_prompt": negatives}
    if first.paints:
        return sd.inpaint(prompts, image, mask, **settings, **masking)
    return sd.img2img(prompts, image, **settings)


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
