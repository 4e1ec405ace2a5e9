"""Jobs: pictures to draw, each with its own settings. Jobs of the same settings share batches and compiled programs."""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from sdjax.draw import loop
from sdjax.draw.inpainting import Frame, outpainted
from sdjax.draw.request import Request, img2img_request, inpaint_request, text2image_request
from sdjax.draw.settings import JobSettings, Masking, SecondPass, Shared, complete_job
from sdjax.errors import ConfigError, DataError
from sdjax.model import Model, Outline
from sdjax.text.syntax import LoraTag, without_loras

SEPARATE = ("prompt", "negative_prompt", "seed", "variation_seed")
"""The settings in which the pictures of one batch may differ."""


class Job(NamedTuple):
    """One picture.

    settings: complete. origin: the file and line it comes from, which its errors begin with; empty for flags.
    """

    settings: JobSettings
    origin: str = ""

    @property
    def shared(self) -> tuple[Any, ...]:
        """The settings that the pictures of one batch have in common."""
        return tuple(value for name, value in self.settings.items() if name not in SEPARATE)

    @property
    def inpaints(self) -> bool:
        """Whether only a part of the image is drawn."""
        return self.settings["mask"] is not None or self.settings["outpaint"] is not None

    @property
    def strength(self) -> float:
        """The strength, by default 1 with a mask and 0.75 for a whole image."""
        default = 1.0 if self.settings["image"] is None or self.inpaints else 0.75
        return default if (given := self.settings["strength"]) is None else given

    @property
    def words(self) -> tuple[str, list[LoraTag]]:
        """The prompt without the LoRAs it names, and these."""
        prompt = self.settings["prompt"]
        return (prompt, []) if self.settings["prompt_syntax"] == "plain" else without_loras(prompt)

    def replace(self, **changes: Any) -> "Job":
        """The job with other settings. Raises ConfigError for a bad value."""
        return self._replace(settings=complete_job({**self.settings, **changes}))


@contextlib.contextmanager
def blaming(job: Job) -> Iterator[None]:
    """Makes errors name the file and line that the job comes from."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not job.origin:
            raise
        raise type(error)(f"{job.origin}: {error}") from error


def read_jobs(path: Path, base: Mapping[str, Any]) -> list[Job]:
    """Reads a file of JSON lines, each a table of settings that wins over `base`. Errors name the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--jobs {path}: {getattr(error, 'strerror', None) or error}") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"--jobs {path}, line {number}"
            with blaming(Job(complete_job({}), origin)):
                jobs.append(Job(complete_job({**base, **_table(line)}), origin))
    if not jobs:
        raise DataError(f"--jobs {path}: holds no job")
    return jobs


def _table(line: str) -> dict[str, Any]:
    """The settings of a line. A null counts as a setting that is not there."""
    try:
        table = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}") from None
    if not isinstance(table, dict) or not isinstance(table.get("prompt"), str):
        raise DataError("give a table with a prompt")
    return {name: value for name, value in table.items() if value is not None}


def batches(jobs: Sequence[Job], most: int) -> Iterator[tuple[list[int], list[Job]]]:
    """Yields (numbers of the jobs drawn, the batch): jobs of the same settings together, in the fewest batches.

    All batches of a group have one size, so one program draws them all. The last batch is filled up with copies of its
    last job, whose pictures are thrown away.
    """
    for group in _groups(jobs):
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield part, [jobs[number] for number in part + part[-1:] * (size - len(part))]


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """The numbers of the jobs that share their settings."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.shared, []).append(number)
    return list(groups.values())


def check_alone(jobs: Sequence[Job]) -> None:
    """Raises ConfigError or DataError for what is wrong whatever the model. Errors name the line of the job."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]]):
            _check_inputs(jobs[group[0]])
        for job in (jobs[number] for number in group):
            with blaming(job):
                _ = job.words


def _check_inputs(job: Job) -> None:
    settings = job.settings
    if settings["image"] is None and job.inpaints:
        raise ConfigError("--mask and --outpaint say what of an --image to paint, and none is given")
    if settings["image"] is None and settings["strength"] is not None:
        raise ConfigError("--strength says how far to redraw an --image, and none is given")
    if settings["image"] is not None:
        if settings["hires_scale"] != 1:
            raise ConfigError("--hires-scale enlarges what is drawn without an --image")
        inputs(job)


def check(outline: Outline, jobs: Sequence[Job]) -> None:
    """Raises ConfigError for jobs that a model cannot draw. Errors name the line of the job."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]]):
            request, _ = _request(outline, [jobs[group[0]]])
        for job in (jobs[number] for number in group):
            with blaming(job):
                words = {"prompts": (job.settings["prompt"],), "negatives": (job.settings["negative_prompt"],)}
                loop.check(outline, dataclasses.replace(request, **words))


def draw(model: Model, batch: Sequence[Job]) -> list[Image.Image]:
    """Draws a picture of each job of a batch."""
    request, given = _request(model.outline, batch)
    if not given:
        return loop.text2image(model, request)
    if isinstance(given[0], Frame):
        return loop.inpaint(model, request, given)
    return loop.img2img(model, request, given)


def _request(outline: Outline, batch: Sequence[Job]) -> tuple[Request, list[Any]]:
    """The request of a batch, with its image or frame if it has one."""
    first = batch[0]
    prompts = [job.settings["prompt"] for job in batch]
    negatives = [job.settings["negative_prompt"] for job in batch]

    def taken(*kinds: Any) -> Any:
        names = [name for kind in kinds for name in kind.__annotations__]
        seeds = {name: [job.settings[name] for job in batch] for name in ("seed", "variation_seed")}
        return {name: first.settings[name] for name in names} | seeds

    if first.settings["image"] is None:
        return text2image_request(outline, prompts, negatives, taken(Shared, SecondPass)), []
    image, mask = inputs(first)
    if first.inpaints:
        settings = taken(Shared, Masking)
        return inpaint_request(outline, prompts, negatives, image, mask, settings, strength=first.strength)
    return img2img_request(outline, prompts, negatives, image, taken(Shared), strength=first.strength)


def inputs(job: Job) -> tuple[Image.Image, Image.Image | None]:
    """The image and the mask of a job. No mask, or "alpha", means the transparent part of the image."""
    settings = job.settings
    assert settings["image"] is not None
    image = read_image(settings["image"], "--image")
    mask = None if settings["mask"] in (None, "alpha") else read_image(settings["mask"], "--mask")
    if settings["outpaint"] is None:
        return image, mask
    left, top, right, bottom = settings["outpaint"]
    return outpainted(image, mask, left=left, top=top, right=right, bottom=bottom)


def read_image(path: str, flag: str) -> Image.Image:
    """An image, turned upright. Raises DataError, which names the flag that gave it."""
    try:
        status = os.stat(path)
        return _read_once(path, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        raise DataError(f"{flag} {path}: no such file") from None
    except Exception as error:  # a malformed file makes Pillow raise nearly anything
        raise DataError(f"{flag} {path}: cannot be read as an image: {error}") from error


@functools.lru_cache(maxsize=8)
def _read_once(path: str, changed: int, size: int) -> Image.Image:
    """The image of a file as it stands; `changed` and `size` tell one state of the file from another."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)
