"""How a stage is doing: the loss on held-out images, and pictures, with the same noise and seeds each time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from PIL import Image, ImageDraw, ImageFont

from sdjax import lora
from sdjax.data.dataset import Bucket, Dataset
from sdjax.data.images import Size, read_image
from sdjax.draw.pipeline import StableDiffusion
from sdjax.formats.png_parameters import save_png
from sdjax.loading import load_weights
from sdjax.model import Model
from sdjax.models import vae
from sdjax.train.config import Validation
from sdjax.train.made import NOTHING, Made, base_weights, result
from sdjax.train.metrics import Metrics
from sdjax.train.stages import Ready, Run, StagePlan
from sdjax.train.step import Draws, Recipe, State, distance, evaluated, timestep_bounds, variables

HeldOutLoss = Callable[[Mapping[str, PyTree], PyTree], float]
HeldOutErrors = Callable[[PyTree, PyTree, Mapping[str, Array], Array | np.integer], Float[Array, " B"]]


class Validator:
    """Validates one stage: metrics.jsonl gets the held-out loss, samples/ a grid of the pictures.

    The pictures of an autoencoder are held-out ones, encoded and decoded; all others are drawn from the prompts, and in
    training for inpainting up to four held-out ones, inpainted by their captions.
    """

    def __init__(
        self,
        run: Run,
        plan: StagePlan,
        held_out: Dataset | None,
        ready: Ready,
        earlier: Made,
        metrics: Metrics,
        errors: HeldOutErrors | None = None,
    ) -> None:
        """errors: of another validator of the same recipe, so as not to compile it again."""
        self._run, self._plan, self._ready, self._earlier, self._metrics = run, plan, ready, earlier, metrics
        self._settings = run.config.validation
        self._samples = Path(run.config.output) / "samples"
        self._held_out_loss = None
        self._drawn: dict[int, list[Image.Image]] = {}
        self._captions: Sequence[str] = self._settings.prompts
        self._originals: list[Image.Image] = []
        self._masked: list[tuple[str, Image.Image, Image.Image]] = []
        if plan.holes and held_out is not None:
            self._masked = _masked_pictures(held_out.buckets[0], plan, count=4)
            self._captions = [*self._captions, *(caption for caption, _, _ in self._masked)]
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

    def __call__(self, step: int, state: State) -> None:
        """Loss and pictures of the state (on the host) after `step` steps."""
        best = evaluated(self._plan.recipe, state)
        if self._held_out_loss is not None:
            self._metrics.held_out(step, self._held_out_loss(best, self._ready.frozen))
        if self._captions:
            self._drawn = {k: v for k, v in self._drawn.items() if k == 0}  # the first and the newest are kept
            self._drawn[step] = self._draw(self._current(state))
            _save_grid(self._samples / f"{self._plan.stage.name}-{step}.png", self._drawn[step], self._captions)

    def before_and_after(self) -> Path | None:
        """The pictures of the base model, of the stage before and of the finished one; None without prompts.

        The stage before is left out of a run that was resumed within this one. The base model gets a new word's init
        words in its place.
        """
        if not self._captions:
            return None
        number, name = self._plan.number, self._plan.stage.name
        is_base = self._earlier == NOTHING and 0 in self._drawn and not self._plan.words
        before = self._originals or (self._drawn[0] if is_base else self._draw(self._base(), self._without_words()))
        columns = {"original" if self._originals else "base": before}
        if number and 0 in self._drawn and not self._originals:
            columns[self._run.config.stages[number - 1].name] = self._drawn[0]
        columns[name] = self._drawn[self._plan.stage.steps]
        path = self._samples / f"{name}-before-after.png"
        if self._masked:
            blank = Image.new("RGB", before[0].size, "white")
            hidden = [Image.composite(Image.new("RGB", mask.size, "grey"), own, mask) for _, own, mask in self._masked]
            columns = {"given": [*[blank] * len(self._settings.prompts), *hidden], **columns}
        _save_comparison(path, columns, self._captions)
        return path

    def _without_words(self) -> list[str]:
        """The prompts with init words in place of new ones."""
        prompts = list(self._settings.prompts)
        for stage in self._run.config.stages[: self._plan.number + 1]:
            for word, init in zip(stage.placeholder_tokens, stage.init_tokens, strict=False):
                if init and not init.startswith("<") and not Path(init).suffix:
                    prompts = [prompt.replace(word, init) for prompt in prompts]
        return prompts

    def _draw(self, sd: StableDiffusion, prompts: Sequence[str] | None = None) -> list[Image.Image]:
        """The pictures, one at a time so that memory stays small; prompt i and mask i have seed + i."""
        if self._originals:
            pixels = np.asarray(sd.decode_latents(sd.encode_image(self._originals)))
            return [Image.fromarray(np.round(picture * 255).astype(np.uint8)) for picture in pixels]
        settings, side = self._settings, self._plan.data.resolution
        common: Any = {name: getattr(settings, name) for name in ("negative_prompt", "steps", "guidance", "sampler")}
        common |= {"height": side, "width": side, "clip_skip": self._run.config.clip_skip, "progress": False}
        texts = settings.prompts if prompts is None else prompts
        drawn = [sd.text2image(text, seed=settings.seed + i, **common) for i, text in enumerate(texts)]
        drawn += [sd.inpaint(*masked, seed=settings.seed + i, **common) for i, masked in enumerate(self._masked)]
        return [picture for (picture,) in drawn]

    def _current(self, state: State) -> StableDiffusion:
        """The model as this state leaves it."""
        recipe, frozen = self._plan.recipe, self._ready.frozen
        models = variables(recipe, evaluated(recipe, state), frozen)
        params = {
            name: lora.merge(own["params"], own["lora"]) if "lora" in own else own["params"]
            for name, own in models.items()
        }
        for part in recipe.outline.shapes.keys() - params.keys():
            params[part] = base_weights(recipe.outline, part, self._earlier)
        rows = result(recipe, self._earlier, state, frozen).rows
        return StableDiffusion(Model(recipe.outline, params, rows))

    def _base(self) -> StableDiffusion:
        """The model before the first stage."""
        at_hand = self._ready.frozen["params"] if self._earlier == NOTHING else {}
        outline = self._run.outline
        params = {part: at_hand[part] if part in at_hand else load_weights(outline, part) for part in outline.shapes}
        return StableDiffusion(Model(outline, params))


def _masked_pictures(bucket: Bucket, plan: StagePlan, *, count: int) -> list[tuple[str, Image.Image, Image.Image]]:
    """Some held-out images with their captions and their masks, which cover whole latents."""
    size, factor = Size(plan.data.resolution, plan.data.resolution), plan.recipe.outline.vae.config.factor
    rows = range(0, len(bucket.records), -(-len(bucket.records) // count))
    found = []
    for row, record in ((row, bucket.records[row]) for row in rows):
        (pixels,) = read_image(record.path, size, plan.data.background)
        hole = np.asarray(bucket.arrays["hole"][row, 0, ..., 0]).astype(bool)
        mask = np.kron(hole, np.ones((factor, factor), bool))
        found.append((record.captions[0], Image.fromarray(pixels), Image.fromarray(mask).convert("L")))
    return found


def make_held_out_reconstruction(
    recipe: Recipe, dataset: Dataset, settings: Validation, batch_size: int
) -> HeldOutLoss:
    """`loss(trainable, frozen) -> float`: mean squared error of held-out pictures in [-1, 1] after the autoencoder.

    The peak signal-to-noise ratio in decibels is `10 log10(4 / loss)`.
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
    """`errors(trainable, frozen, batch, timestep) -> [B]`, compiled once for all that trains by this recipe."""

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
        )
        return distance(recipe, variables(recipe, trainable, frozen), batch, draws, plain=True)

    return errors


def make_held_out_loss(
    recipe: Recipe, dataset: Dataset, settings: Validation, batch_size: int, errors: HeldOutErrors
) -> HeldOutLoss:
    """`loss(trainable, frozen) -> float`: the plain mean squared error over held-out images, as of `distance`.

    Each image is tried at `held_out_timesteps` time steps, evenly spread over the stage's range, with noise that
    depends on the seed, the image and the time step alone, and at its posterior's mean: only the weights tell two
    results apart.
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
            texts = images.text_rows[rows, 0]
            batch = {
                "index": rows.astype(np.int32),
                **{name: np.asarray(array[rows, 0]) for name, array in images.arrays.items()},
                **{name: np.asarray(array[texts]) for name, array in dataset.texts.items()},
            }
            for timestep in timesteps:
                total += float(np.sum(errors(trainable, frozen, batch, np.int32(timestep))[: count - start]))
        return total / (count * levels)

    return loss


def _save_grid(path: Path, pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4) -> None:
    """The pictures in rows with their captions below."""
    columns = min(columns, len(pictures))
    rows = [list(pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    labels = [list(captions[i : i + columns]) for i in range(0, len(captions), columns)]
    _save(path, _sheet(rows, labels))


def _save_comparison(path: Path, columns: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> None:
    """One row a prompt, one column a state of the model, each named."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    labels = [[f"{name}: {caption}" for name in columns] for caption in captions]
    _save(path, _sheet(rows, labels))


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image, path)


def _sheet(rows: list[list[Image.Image]], labels: list[list[str]]) -> Image.Image:
    """Pictures of one size in rows, a line of text below each; small ones are enlarged so that the text has room."""
    factor = -(-192 // rows[0][0].width)
    side, line, gap = rows[0][0].width * factor, 22, 6
    height = rows[0][0].height * factor
    sheet = Image.new("RGB", (gap + len(rows[0]) * (side + gap), gap + len(rows) * (height + line + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for y, (pictures, texts) in enumerate(zip(rows, labels, strict=True)):
        for x, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            left, top = gap + x * (side + gap), gap + y * (height + line + gap)
            sheet.paste(picture.resize((side, height), Image.Resampling.NEAREST), (left, top))
            pen.text((left, top + height + 2), _fitting(text, font, side), fill="black", font=font)
    return sheet


def _fitting(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
