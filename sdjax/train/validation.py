"""Validation of a stage: the loss on held-out images, and pictures, with the same noise and seeds each time."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from PIL import Image

from sdjax.data.dataset import Bucket, Dataset, texts_of
from sdjax.data.images import Size, picture, read_image
from sdjax.data.records import Record
from sdjax.draw import grids
from sdjax.draw.pipeline import StableDiffusion
from sdjax.errors import DataError, TrainingStopped
from sdjax.formats.png_parameters import save_png
from sdjax.model import Model
from sdjax.models import vae
from sdjax.runtime.devices import within
from sdjax.train import likeness
from sdjax.train.config import Data, Validation
from sdjax.train.metrics import Metrics
from sdjax.train.results import Results, after, base_weights
from sdjax.train.stages import Run, StagePlan
from sdjax.train.step import Draws, Frozen, Recipe, State, distance, evaluated, timestep_bounds, variables

log = logging.getLogger(__name__)

_COLUMNS = 4
"""Pictures in a row of the sheet of a validation."""

HeldOutLoss = Callable[[Mapping[str, PyTree], PyTree], float]
HeldOutErrors = Callable[[PyTree, PyTree, Mapping[str, Array], Array | np.integer], Float[Array, " B"]]


class Validator:
    """Validates one stage: metrics.jsonl gets the held-out loss, samples/ gets a grid of pictures.

    A stage that trains the autoencoder shows held-out images after encoding and decoding. Every other stage draws the
    prompts; training for inpainting also inpaints up to four held-out images with their captions as prompts.
    """

    def __init__(
        self,
        run: Run,
        plan: StagePlan,
        held_out: Dataset | None,
        frozen: Frozen,
        earlier: Results,
        metrics: Metrics,
        errors: HeldOutErrors | None = None,
    ) -> None:
        """errors: those of another validator with the same recipe, so as not to compile them again."""
        self._run, self._plan, self._frozen, self._earlier, self._metrics = run, plan, frozen, earlier, metrics
        self._settings, self._parallel = run.config.validation, plan.parallel
        self._samples = Path(run.config.output) / "samples"
        self._held_out_loss = None
        self._drawn: dict[int, list[Image.Image]] = {}
        self._captions: Sequence[str] = self._settings.prompts
        self._originals: list[Image.Image] = []
        self._masked: list[tuple[str, Image.Image, Image.Image]] = []
        self._prompts: list[str] = list(self._settings.prompts)
        self._true: list[Image.Image] = []
        if plan.holes and held_out is not None:
            self._masked = _masked_pictures(held_out.buckets[0], plan, count=4)
            self._captions = [*self._captions, *(caption for caption, _, _ in self._masked)]
        elif held_out is not None and self._settings.held_out_pictures and "vae" not in plan.stage.parts:
            records = _spread(held_out.buckets[0].records, self._settings.held_out_pictures)
            self._true = [_shown(record, plan.data) for record in records]
            self._prompts += [record.captions[0] for record in records]
            self._captions = self._prompts
        if "vae" in plan.stage.parts:
            pixels = held_out.buckets[0].arrays["pixels"][:, 0] if held_out is not None else ()
            shown = pixels[:: max(1, len(pixels) // 12)][:12]
            self._originals = [Image.fromarray(np.asarray(picture)) for picture in shown]
            self._captions = [""] * len(shown)
        self.errors = errors or make_held_out_errors(plan.recipe, self._settings)
        if held_out is not None:
            size = plan.data.batch_size
            self._held_out_loss = (
                make_held_out_reconstruction(plan.recipe, held_out, self._settings, size)
                if "vae" in plan.stage.parts
                else make_held_out_loss(plan.recipe, held_out, self._settings, size, self.errors)
            )

    def __call__(self, step: int, state: State) -> Path | None:
        """Measures and draws with the state (on the host) after `step` steps. Returns the grid of pictures, if any."""
        loss = None
        if self._held_out_loss is not None:
            best = self._parallel.place_model(evaluated(self._plan.recipe, state))
            with within(self._parallel.mesh):
                loss = self._held_out_loss(best, self._frozen)
        if self._captions:
            self._drawn = {k: v for k, v in self._drawn.items() if k == 0}  # the first and the newest are kept
            self._drawn[step] = self._draw(self._current(state))
        if loss is not None:
            self._metrics.held_out(step, loss, self._distance(self._drawn[step]) if self._true else None)
        if not self._captions:
            return None
        if step == 0:
            self._compare_framing()
        path = self._sheet(step)
        _save(path, grids.captioned(self._drawn[step], self._captions, columns=_COLUMNS))
        self._metrics.picture(step, "samples", path)
        return path

    @property
    def pictures(self) -> list[Image.Image]:
        """The pictures of the finished stage; empty without prompts."""
        return self._drawn.get(self._plan.stage.steps, [])

    @property
    def captions(self) -> list[str]:
        """What each picture shows."""
        return list(self._captions)

    def before_and_after(self, state: State) -> Path | None:
        """Saves a sheet of pictures by the base model, the stage before and the finished stage, with its state.

        Returns its path, or None without prompts. The stage before is left out if the run was resumed within this
        stage. The base model is given the init words in place of new words. A LoRA is shown at several weights, and
        the one whose pictures are nearest to the held-out images is logged.
        """
        if not self._captions:
            return None
        number, name = self._plan.number, self._plan.stage.name
        if self._originals:
            before = self._originals
        elif self._starts_as_base and 0 in self._drawn:
            before = self._drawn[0]
        else:
            before = self._draw(self._base(), self._without_words())
        columns = {"original" if self._originals else "base": before}
        if number and 0 in self._drawn and not self._originals:
            columns[self._run.config.stages[number - 1].name] = self._drawn[0]
        columns |= self._at_weights(state)
        blank = Image.new("RGB", before[0].size, "white")
        if self._true:
            columns = {"held out": [*[blank] * len(self._settings.prompts), *self._true], **columns}
        if self._masked:
            hidden = [Image.composite(Image.new("RGB", mask.size, "grey"), own, mask) for _, own, mask in self._masked]
            columns = {"given": [*[blank] * len(self._settings.prompts), *hidden], **columns}
        pictures = [picture for row in zip(*columns.values(), strict=True) for picture in row]
        captions = [f"{column}: {caption}" for caption in self._captions for column in columns]
        path = self._samples / f"{name}-before-after.png"
        _save(path, grids.captioned(pictures, captions, columns=len(columns)))
        self._metrics.picture(self._plan.stage.steps, "before-after", path)
        return path

    def _at_weights(self, state: State) -> dict[str, list[Image.Image]]:
        """Returns the pictures of the finished stage, by name; those of a LoRA at each weight."""
        stage = self._plan.stage
        finished = {stage.name: self._drawn[stage.steps]}
        if "lora" not in stage.train or stage.consistency_steps:
            return finished
        others = {weight: self._draw(self._current(state, weight)) for weight in self._settings.weights if weight != 1}
        drawn = dict(sorted((others | {1.0: self._drawn[stage.steps]}).items()))
        if self._true:
            apart = {weight: self._distance(pictures) for weight, pictures in drawn.items()}
            found = ", ".join(f"{weight:g}: {value:.4f}" for weight, value in apart.items())
            nearest = min(apart, key=apart.__getitem__)
            log.info("stage %s: weight %g is nearest to the held-out images (%s)", stage.name, nearest, found)
        return {f"{stage.name} {weight:g}": pictures for weight, pictures in drawn.items() if weight != 1} | finished

    def _distance(self, pictures: Sequence[Image.Image]) -> float:
        """Returns how far the pictures of the held-out captions are from the held-out images."""
        return likeness.distance(pictures[len(self._settings.prompts) :], self._true)

    def _compare_framing(self) -> None:
        """Warns if the training images show their subjects smaller than the model draws them."""
        plan = self._plan
        if plan.number or self._originals or self._masked:
            return
        given = []
        for record in _spread(plan.records, 16):
            with contextlib.suppress(DataError):  # an unreadable image that the run skips
                given.append(_shown(record, plan.data))
        if advice := likeness.framing_advice(given, self._drawn[0]):
            log.warning("stage %s: %s", plan.stage.name, advice)

    @property
    def _starts_as_base(self) -> bool:
        """Whether the stage begins with the model that `_base` returns, and the prompts have no new word."""
        plan = self._plan
        return not (plan.number or plan.new_words or plan.adapters)

    def over_time(self) -> Path | None:
        """Saves a sheet with the pictures of up to eight validations side by side, also of those before a resume.

        Returns its path, or None if there were fewer than three, which the sheet of before and after shows.
        """
        last, every = self._plan.stage.steps, self._settings.every
        if not self._captions or not every:
            return None
        size = _size(self._sheet(last))  # other prompts make other sheets
        steps = [n for n in [*range(0, last, every), last] if _size(self._sheet(n)) == size]
        if len(steps) < 3:
            return None
        shown = [steps[round(i * (len(steps) - 1) / 7)] for i in range(8)] if len(steps) > 8 else steps
        columns = [_pictures(self._sheet(step), len(self._captions)) for step in shown]
        pictures = [each for row in zip(*columns, strict=True) for each in row]
        for each in pictures:
            each.thumbnail((192, 192))
        path = self._samples / f"{self._plan.stage.name}-over-time.png"
        _save(path, grids.labelled(pictures, [f"step {step}" for step in shown], self._captions))
        return path

    def _sheet(self, step: int) -> Path:
        return self._samples / f"{self._plan.stage.name}-{step}.png"

    def _without_words(self) -> list[str]:
        """Returns the prompts with init words in place of new words."""
        prompts = self._prompts
        for stage in self._run.config.stages[: self._plan.number + 1]:
            for word, init in zip(stage.placeholder_tokens, stage.init_tokens, strict=False):
                if init and not init.startswith("<") and not Path(init).suffix:
                    prompts = [prompt.replace(word, init) for prompt in prompts]
        return prompts

    def _draw(self, model: Model, prompts: Sequence[str] | None = None) -> list[Image.Image]:
        """Draws one picture at a time, so that memory stays small. Prompt i and mask i have seed + i."""
        if self._originals:
            return [picture(values) for values in np.asarray(model.decode_latents(model.encode_image(self._originals)))]
        sd, settings, side = StableDiffusion(model), self._settings, self._plan.data.resolution
        shared: Any = {
            "negative_prompt": settings.negative_prompt,
            "steps": settings.steps,
            "guidance": settings.guidance,
            "sampler": settings.sampler,
            "height": side,
            "width": side,
            "clip_skip": self._run.config.clip_skip,
            "progress": False,
        }
        texts = self._prompts if prompts is None else prompts
        drawn = [_one(sd.text2image, side, text, seed=settings.seed + i, **shared) for i, text in enumerate(texts)]
        masked = enumerate(self._masked)
        return drawn + [_one(sd.inpaint, side, *given, seed=settings.seed + i, **shared) for i, given in masked]

    def _current(self, state: State, weight: float = 1.0) -> Model:
        """Returns the model as this state leaves it. weight: of the LoRA that the stage trains."""
        recipe = self._plan.recipe
        models = variables(recipe, evaluated(recipe, state), self._frozen)
        params = {part: trained["params"] for part, trained in models.items()}
        rows = after(recipe, self._earlier, state, self._frozen).rows
        model = Model(recipe.outline, params | self._untrained, rows, mesh=self._parallel.mesh)
        adapters = {part: trained["lora"] for part, trained in models.items() if "lora" in trained}
        model = model.with_lora(adapters, weight)
        params, adapters = self._parallel.place_model((model.params, model.adapters))
        return dataclasses.replace(model, params=params, adapters=adapters)

    @functools.cached_property
    def _untrained(self) -> dict[str, PyTree]:
        """The weights of the parts that the steps do not compute with. They are read once, and lie on the host."""
        recipe = self._plan.recipe
        parts = [part for part in recipe.outline.shapes if part not in recipe.models]
        with self._parallel.loading():
            return {part: jax.device_get(base_weights(recipe.outline, part, self._earlier)) for part in parts}

    def _base(self) -> Model:
        """Returns the model before the first stage, with the files beneath it."""
        outline, number = self._run.outline, self._plan.number
        at_hand = {} if number else self._frozen["params"] | self._untrained
        with self._parallel.loading():
            params = {part: at_hand[part] if part in at_hand else outline.load_weights(part) for part in outline.shapes}
        rows = self._run.beneath.results.rows
        return Model(outline, self._parallel.place_model(params), rows, mesh=self._parallel.mesh)


def _one(draw: Callable[..., list[Image.Image]], side: int, *arguments: Any, **settings: Any) -> Image.Image:
    """Returns the picture of a call, or a black one if it holds NaN: training goes on, as its state is finite."""
    try:
        return draw(*arguments, **settings)[0]
    except TrainingStopped as e:
        log.warning("%s", e)
        return Image.new("RGB", (side, side))


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """Returns up to `count` records, evenly spread."""
    return [records[row] for row in _spread_rows(len(records), count)]


def _spread_rows(total: int, count: int) -> range:
    return range(0, total, -(-total // count))


def _shown(record: Record, data: Data) -> Image.Image:
    """Returns an image as training shows it."""
    size = Size(data.resolution, data.resolution)
    (pixels,) = read_image(record.file, size, data.background, on_subject=data.crop == "subject")
    return Image.fromarray(pixels)


def _masked_pictures(bucket: Bucket, plan: StagePlan, *, count: int) -> list[tuple[str, Image.Image, Image.Image]]:
    """Returns some held-out images with their captions and masks. A mask covers whole latents."""
    factor = plan.recipe.outline.vae.config.factor
    found = []
    for row in _spread_rows(len(bucket.records), count):
        record = bucket.records[row]
        hole = np.asarray(bucket.arrays["hole"][row, 0, ..., 0]).astype(bool)
        mask = np.kron(hole, np.ones((factor, factor), bool))
        found.append((record.captions[0], _shown(record, plan.data), Image.fromarray(mask).convert("L")))
    return found


def make_held_out_reconstruction(
    recipe: Recipe, dataset: Dataset, settings: Validation, batch_size: int
) -> HeldOutLoss:
    """Returns `loss(trainable, frozen) -> float`, the mean squared error of the autoencoder on held-out images.

    Values are in [-1, 1], so the peak signal-to-noise ratio in decibels is `10 log10(4 / loss)`.
    """
    pictures = dataset.buckets[0].arrays["pixels"]
    count = min(settings.held_out_images or len(pictures), len(pictures))

    @jax.jit
    def errors(trainable: PyTree, pixels: Array) -> Float[Array, " B"]:
        images = pixels.astype(jnp.float32) / 127.5 - 1
        decoded = jnp.asarray(recipe.outline.vae.apply({"params": trainable["vae"]}, images))
        return jnp.mean(jnp.square(jnp.clip(decoded, -1, 1) - images), axis=(1, 2, 3))

    def loss(trainable: Mapping[str, PyTree], frozen: PyTree) -> float:
        total = 0.0
        for start in range(0, count, batch_size):
            rows = np.minimum(np.arange(start, start + batch_size), count - 1)
            total += float(np.sum(errors(trainable, np.asarray(pictures[rows, 0]))[: count - start]))
        return total / count

    return loss


def make_held_out_errors(recipe: Recipe, settings: Validation) -> HeldOutErrors:
    """Returns `errors(trainable, frozen, batch, timestep) -> [B]`, compiled once for all trainings of this recipe."""

    @jax.jit
    def errors(trainable: PyTree, frozen: PyTree, batch: Mapping[str, Array], timestep: Array) -> Float[Array, " B"]:
        def noise(row: Int[Array, ""], shape: tuple[int, ...]) -> Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), row), timestep)
            return jax.random.normal(key, shape, jnp.float32)

        latents = vae.scale_latents(recipe.outline.vae.config, vae.posterior_mean(batch["moments"]))
        draws = Draws(
            latents=latents,
            noise=jax.vmap(lambda row: noise(row, latents.shape[1:]))(batch["index"]),
            timesteps=jnp.full(batch["index"].shape, timestep),
            dropout=jnp.zeros(()),  # not used: no dropout and no perturbation here
            perturbation=jnp.zeros(()),
            guidance=jnp.full(batch["index"].shape, sum(recipe.stage.consistency_guidance) / 2),
        )
        return distance(recipe, variables(recipe, trainable, frozen), batch, draws, plain=True)

    return errors


def make_held_out_loss(
    recipe: Recipe, dataset: Dataset, settings: Validation, batch_size: int, errors: HeldOutErrors
) -> HeldOutLoss:
    """Returns `loss(trainable, frozen) -> float`, the plain mean squared error over held-out images.

    Each image is tried at `held_out_timesteps` time steps, evenly spread over the range of the stage. The latents are
    the mean of the posterior, and the noise depends only on the seed, the image and the time step. So two results
    differ only if the weights differ. See `step.distance`.
    """
    low, high = timestep_bounds(recipe)
    levels = settings.held_out_timesteps
    timesteps = [low + int((level + 0.5) * (high - low) / levels) for level in range(levels)]
    (images,) = dataset.buckets
    count = min(settings.held_out_images or len(images.records), len(images.records))
    size = min(batch_size, count)

    def loss(trainable: Mapping[str, PyTree], frozen: PyTree) -> float:
        total = 0.0
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)  # the last batch repeats its last image
            batch = {
                "index": rows.astype(np.int32),
                **{name: np.asarray(array[rows, 0]) for name, array in images.arrays.items()},
                **texts_of(dataset, images.text_rows[rows, 0]),
            }
            for timestep in timesteps:
                total += float(np.sum(errors(trainable, frozen, batch, np.int32(timestep))[: count - start]))
        return total / (count * levels)

    return loss


def _size(sheet: Path) -> tuple[int, int] | None:
    """Returns the size of an image file, or None if there is none."""
    if not sheet.exists():
        return None
    with Image.open(sheet) as image:
        return image.size


def _pictures(sheet: Path, count: int) -> list[Image.Image]:
    with Image.open(sheet) as image:
        return grids.uncaptioned(image, count, columns=_COLUMNS)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image, path)
