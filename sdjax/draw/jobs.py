"""Jobs: pictures to draw, each with all its settings. Jobs that differ only in prompts and seeds share batches."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from sdjax.data import images
from sdjax.draw import loop, upscaling
from sdjax.draw.grids import Axis
from sdjax.draw.inpainting import Frame, outpainted
from sdjax.draw.request import Request, img2img_request, inpaint_request, text2image_request
from sdjax.draw.settings import JobSettings, Masking, SecondPass, Shared, Subject, Watch, complete_job
from sdjax.errors import ConfigError, DataError
from sdjax.model import Model
from sdjax.outline import Outline
from sdjax.runtime import out_of_memory, strict_json
from sdjax.text.syntax import LoraTag, without_loras

log = logging.getLogger(__name__)


class Job(NamedTuple):
    """One picture to draw.

    settings: complete. origin: the file and line of the job, which its errors begin with; empty for a job of the flags.
    """

    settings: JobSettings
    origin: str = ""

    @property
    def shared(self) -> tuple[Any, ...]:
        """The settings that all pictures of a batch have in common."""
        return tuple(value for name, value in self.settings.items() if name not in Subject.__annotations__)

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
        """The prompt without the LoRAs it names, and these LoRAs."""
        prompt = self.settings["prompt"]
        return (prompt, []) if self.settings["prompt_syntax"] == "plain" else without_loras(prompt)

    def replace(self, **changes: Any) -> "Job":
        """Returns the job with other settings. Raises ConfigError for a bad value."""
        return self._replace(settings=complete_job({**self.settings, **changes}))


@contextlib.contextmanager
def blaming(origin: str) -> Iterator[None]:
    """Makes errors begin with the origin of a job."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not origin:
            raise
        raise type(error)(f"{origin}: {error}") from error


def of_prompts(settings: Mapping[str, Any], prompts: Sequence[str], count: int) -> list[Job]:
    """Returns `count` jobs of each prompt. The seed counts up; with a variation strength, the variation seed."""
    counting = "variation_seed" if settings.get("variation_strength") else "seed"  # see `draw.settings.Settings`
    first = settings.get(counting, 0)
    each = enumerate(prompt for prompt in prompts for _ in range(count))
    return [Job(complete_job({**settings, "prompt": prompt, counting: first + i})) for i, prompt in each]


def varied(jobs: Sequence[Job], axes: Sequence[Axis]) -> list[Job]:
    """Returns the jobs with every combination of the values of the axes. The first axis, x, varies fastest."""
    varied = list(jobs)
    for axis in reversed(axes):  # y outside, x inside
        varied = [job.replace(**{axis.name: value}) for job in varied for value in axis.values]
    return varied


def read_jobs(lines: Sequence[str], base: Mapping[str, Any], source: str) -> list[Job]:
    """Reads JSON lines, each a table of settings that take the place of those in `base`.

    source: the name of the file in errors, which also give the line. Empty lines are left out.
    """
    jobs = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{source}, line {number}"
            with blaming(origin):
                jobs.append(Job(complete_job({**base, **_table(line)}), origin))
    if not jobs:
        raise DataError(f"{source}: holds no job")
    return jobs


def _table(line: str) -> dict[str, Any]:
    """The settings of a line. A setting of null counts as left out."""
    try:
        table = strict_json.parse(line)
    except ValueError as error:
        raise DataError(f"not JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get("prompt"), str):
        raise DataError("give a table with a prompt")
    return {name: value for name, value in table.items() if value is not None}


def batches(jobs: Sequence[Job], most: int) -> Iterator[tuple[list[int], list[Job]]]:
    """Yields (numbers of the jobs, the batch) for batches of at most `most` jobs that differ only in prompts and seeds.

    All batches of such jobs have one size, so one compiled program draws them all. The last batch is filled up with
    copies of its last job; their pictures are to be thrown away.
    """
    for group in _groups(jobs):
        size = math.ceil(len(group) / math.ceil(len(group) / most))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield part, [jobs[number] for number in part + part[-1:] * (size - len(part))]


def grouped(keys: Iterable[Hashable]) -> dict[Any, list[int]]:
    """Key -> the numbers of its places among the keys."""
    groups: dict[Any, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return groups


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """The numbers of the jobs that differ only in prompts and seeds, group by group."""
    return list(grouped(job.shared for job in jobs).values())


def check_alone(jobs: Sequence[Job]) -> None:
    """Checks jobs without a model. Raises ConfigError or DataError, which name the line of the job."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]].origin):
            _check_inputs(jobs[group[0]])
        for job in (jobs[number] for number in group):
            with blaming(job.origin):
                _ = job.words


def _check_inputs(job: Job) -> None:
    settings = job.settings
    upscaling.check(settings)
    if settings["image"] is None and job.inpaints:
        raise ConfigError("--mask and --outpaint need an --image")
    if settings["image"] is None and settings["strength"] is not None:
        raise ConfigError("--strength needs an --image to redraw")
    if settings["image"] is not None:
        if settings["hires_scale"] != 1:
            raise ConfigError("--hires-scale cannot be used with an --image")
        inputs(job)


def check(outline: Outline, jobs: Sequence[Job]) -> None:
    """Raises ConfigError, which names the line of the job, for jobs that a model cannot draw."""
    for group in _groups(jobs):
        with blaming(jobs[group[0]].origin):
            request, _ = _request(outline, [jobs[group[0]]])
            if max(request.size) > 4 * outline.native_size:
                height, width = request.size
                log.warning(
                    "%dx%d pixels are far from the %d of %s: expect a poor picture, or draw it small with hires_scale",
                    *(width, height, outline.native_size, outline.name),
                )
        for job in (jobs[number] for number in group):
            with blaming(job.origin):
                words = {"prompts": (job.settings["prompt"],), "negatives": (job.settings["negative_prompt"],)}
                loop.check(outline, dataclasses.replace(request, **words))


def draw(model: Model, batch: Sequence[Job], watch: Watch | None = None) -> list[Image.Image]:
    """Draws the picture of each job of a batch. watch: see `draw.settings.Settings`; it takes the place of the bar."""
    request, given = _request(model.outline, batch)
    request = dataclasses.replace(request, watch=watch, progress=watch is None)
    if not given:
        return loop.text2image(model, request)
    if isinstance(given[0], Frame):
        return loop.inpaint(model, request, given)
    return loop.img2img(model, request, given)


def draw_by_loras(
    jobs: Sequence[Job],
    loras: Sequence[Hashable],
    most: int,
    adapted: Callable[[Any, bool], Model],
    watch: Callable[[], Watch | None] = lambda: None,
    *,
    advice: str,
) -> Iterator[tuple[int, Image.Image]]:
    """Yields (number of the job, picture), batch by batch, those of jobs with the same LoRAs one after the other.

    loras: those of each job. most: jobs in a batch. adapted: called with LoRAs, and whether they are the last, for the
    model with them. watch: called before each batch, for what watches it; see `draw`. Raises TrainingStopped with the
    advice if there is not enough memory.
    """
    groups = grouped(loras)
    for n, (chosen, places) in enumerate(groups.items(), 1):
        model = adapted(chosen, n == len(groups))
        for numbers, batch in batches([jobs[place] for place in places], most):
            watching = watch()
            with out_of_memory.advice(advice):
                pictures = draw(model, batch, watching)
            yield from zip((places[number] for number in numbers), pictures, strict=False)
        del model  # before the next one is made


def _request(outline: Outline, batch: Sequence[Job]) -> tuple[Request, list[Any]]:
    """The request of a batch, and a list of the image or the frame that it starts from, empty without one."""
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
    """The image and the mask of a job. The mask is None if the transparent part of the image is to be painted."""
    settings = job.settings
    assert settings["image"] is not None
    image = read_image(settings["image"], "--image")
    mask = None if settings["mask"] in (None, "alpha") else read_image(settings["mask"], "--mask")
    if settings["outpaint"] is None:
        return image, mask
    left, top, right, bottom = settings["outpaint"]
    return outpainted(image, mask, left=left, top=top, right=right, bottom=bottom)


def read_image(path: str, flag: str) -> Image.Image:
    """Reads an image and turns it upright; see `images.read_picture`. Errors name the flag and the file."""
    try:
        status = os.stat(path)
        return _read_once(path, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        raise DataError(f"{flag} {path}: no such file") from None
    except (DataError, OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise DataError(f"{flag} {path}: {str(error).removeprefix(f'{path}: ')}") from None


@functools.lru_cache(maxsize=8)
def _read_once(path: str, changed: int, size: int) -> Image.Image:
    """Reads an image. Another time of change or another size of the file means that it is read again."""
    return images.read_picture(path)
