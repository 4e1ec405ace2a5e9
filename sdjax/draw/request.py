"""One call to draw: its prompts, seeds and settings, checked against the model before anything is computed."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax.draw import sampling, upscaling
from sdjax.draw.inpainting import Frame, make_frames
from sdjax.draw.settings import (
    LARGEST_SIDE,
    SIZE_CONDITIONS,
    InpaintSettings,
    PictureSettings,
    Settings,
    Strength,
    TextToImageSettings,
    Watch,
    complete,
)
from sdjax.errors import ConfigError
from sdjax.outline import Outline
from sdjax.settings import Range, Seed, read_value, wrong

_SECOND_NOISE = 1_000_000
"""Folded into the key of a picture for its second noise. Samplers fold in the numbers of steps, which are smaller."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One call to draw: a prompt and a seed for each picture, and the settings that all pictures share.

    settings: complete, with the guidance, and with height and width in pixels.
    strength: the share of the noise schedule that is run, in (0, 1].
    latents: unit noise in place of the noise of the seeds.
    earlier_steps: the number of steps of the pass before this one; the steps in prompts count on from there.
    watch: called after each evaluation of the U-Net; see `draw.settings.Settings`.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    variation_seeds: tuple[int, ...]
    settings: PictureSettings
    strength: float = 1.0
    latents: Float[Array, "B h w 4"] | None = None
    progress: bool = True
    earlier_steps: int = 0
    watch: Watch | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.settings["height"], self.settings["width"]
        assert height is not None and width is not None
        return height, width

    @property
    def size_conditions(self) -> Float[np.ndarray, "6"]:
        """SDXL's size conditions; see `data.images.size_conditions`."""
        defaults = self.size, (0, 0), self.size
        sizes = [self.settings[name] or default for name, default in zip(SIZE_CONDITIONS, defaults, strict=True)]
        return np.asarray(sizes, np.float32).reshape(6)

    @property
    def guidance(self) -> float:
        """Scale of the classifier-free guidance. 1 is off."""
        guidance = self.settings["guidance"]
        assert guidance is not None
        return guidance

    @property
    def spacing(self) -> str | None:
        """The spacing of the timesteps or noise levels; None: the model's. Raises ConfigError if two are given."""
        spacing, karras = self.settings["spacing"], self.settings["karras"]
        if karras and spacing not in (None, "karras"):
            raise ConfigError(f"karras and spacing {spacing!r} are both given: choose one")
        return "karras" if karras else spacing

    @property
    def keys(self) -> Array:
        """One key for each picture, from its seed alone."""
        return _keys(self.seeds)

    def latent_shape(self, outline: Outline) -> tuple[int, int, int, int]:
        """Shape [B, h, w, C] of the latents."""
        height, width = (side // outline.vae.config.factor for side in self.size)
        return len(self.prompts), height, width, outline.vae.config.latent_channels

    def noise(self, outline: Outline) -> Float[Array, "B h w 4"]:
        """The unit noise that each picture starts from: the given latents, or the noise of its seed."""
        shape = self.latent_shape(outline)
        if self.latents is None:
            noise = _normal(self.keys, shape[1:])
            if strength := self.settings["variation_strength"]:
                noise = slerp(noise, _normal(_keys(self.variation_seeds), shape[1:]), strength)
            return noise
        latents = jnp.asarray(self.latents, jnp.float32)
        if latents.shape != shape:
            raise ConfigError(f"latents have shape {latents.shape}; this call needs {shape}")
        return latents

    def second_noise(self, outline: Outline) -> Float[Array, "B h w 4"]:
        """More unit noise from the same seeds."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _SECOND_NOISE))(self.keys)
        return _normal(keys, self.latent_shape(outline)[1:])

    def second_pass(self, outline: Outline) -> "Request | None":
        """The request for the pass over the enlarged picture; None without one."""
        settings, multiple = self.settings, outline.size_multiple
        if settings["hires_scale"] == 1:
            return None
        height, width = (round(side * settings["hires_scale"] / multiple) * multiple for side in self.size)
        steps = settings["hires_steps"] or settings["steps"]
        larger: PictureSettings = {**settings, "height": height, "width": width, "steps": steps, "hires_scale": 1.0}
        return dataclasses.replace(
            self,
            settings=larger,
            strength=settings["hires_strength"],
            latents=None,
            earlier_steps=settings["steps"],
        )

    def sampler_table(self, outline: Outline) -> sampling.Table:
        """The table of the sampler. Raises ConfigError for settings that the model cannot draw with."""
        settings, steps = self.settings, self.settings["steps"]

        def tabulate(outline: Outline, strength: float) -> sampling.Table:
            outline.hidden_state(settings["clip_skip"])  # only to check clip_skip
            return sampling.tabulate(
                outline.schedule, settings["sampler"], steps, spacing=self.spacing, strength=strength
            )

        table = tabulate(outline, self.strength)
        if (refiner := outline.refiner) is None or settings["hires_scale"] != 1:
            return table  # of two passes, only the second is refined
        count = len(outline.schedule.betas)
        last = lambda n: tabulate(refiner.outline, min(1.0, (n + 0.5) / steps))
        table = sampling.switched(table, count - round(refiner.switch * count), last)
        if table.switch == table.length:
            raise ConfigError(f"refiner switch {refiner.switch}: none of {steps} steps is left for the refiner")
        return table


def slerp(start: Float[Array, "B ..."], end: Float[Array, "B ..."], share: float) -> Float[Array, "B ..."]:
    """The point at a share of the way from start to end on the great circle between them (Shoemake 1985).

    Each example of the batch is one point.
    """
    axes = tuple(range(1, start.ndim))
    norm = lambda values: jnp.sqrt(jnp.sum(values**2, axes, keepdims=True))
    cosine = jnp.sum(start * end, axes, keepdims=True) / (norm(start) * norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    apart = jnp.sin(angle) > 1e-4  # equal or opposite points have no unique great circle
    sine = jnp.where(apart, jnp.sin(angle), 1.0)
    curved = (jnp.sin((1 - share) * angle) * start + jnp.sin(share * angle) * end) / sine
    return jnp.where(apart, curved, (1 - share) * start + share * end)


def _keys(seeds: Sequence[int]) -> Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def _normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


# ------------------------------------------------------------------------------------------------ making requests


def text2image_request(
    outline: Outline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    settings: TextToImageSettings,
) -> Request:
    """The request of `StableDiffusion.text2image`. With `latents` the pictures have the size of these."""
    factor = outline.vae.config.factor
    size = (outline.native_size, outline.native_size)
    if (latents := settings.get("latents")) is not None:
        size = (latents.shape[1] * factor, latents.shape[2] * factor)
        settings = {**settings, "height": None, "width": None}
    return _request(outline, prompt, negative_prompt, settings, size=size)


def img2img_request(
    outline: Outline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    image: Image.Image | Sequence[Image.Image],
    settings: Settings,
    *,
    strength: float,
) -> tuple[Request, list[Image.Image]]:
    """The request of `StableDiffusion.img2img` and its images."""
    images = _images(image)
    size = (max(8, images[0].height // 8 * 8), max(8, images[0].width // 8 * 8))
    request = _request(outline, prompt, negative_prompt, settings, size=size, strength=strength)
    _check_count(images, request)
    return request, images


def inpaint_request(
    outline: Outline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    image: Image.Image | Sequence[Image.Image],
    mask: Image.Image | Sequence[Image.Image] | None,
    settings: InpaintSettings,
    *,
    strength: float,
) -> tuple[Request, list[Frame]]:
    """The request of `StableDiffusion.inpaint` and the frames to paint."""
    images = _images(image)
    masks: list[Any] = list(mask) if isinstance(mask, list | tuple) else [mask]
    if len(masks) not in (1, len(images)):
        raise ConfigError(f"{len(masks)} masks for {len(images)} images: give one, or one each")
    names = PictureSettings.__optional_keys__
    frames = make_frames(
        images,
        masks,
        complete({name: value for name, value in settings.items() if name in names}),
        size=(settings.get("height"), settings.get("width")),
        native=outline.native_size,
        multiple=outline.size_multiple,
    )
    request = _request(outline, prompt, negative_prompt, settings, size=frames[0].drawn, strength=strength)
    _check_count(frames, request)
    return request, frames


def _check_count(images: Sequence[object], request: Request) -> None:
    if len(images) not in (1, len(request.prompts)):
        raise ConfigError(f"{len(images)} images for {len(request.prompts)} pictures: give one, or one each")


def _request(
    outline: Outline,
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    settings: Mapping[str, Any],
    *,
    size: tuple[int, int],
    strength: float = 1.0,
) -> Request:
    """Makes a request. size: height and width in pixels where the settings have none."""
    prompts = _texts(prompt, "prompt")
    negatives = _texts(negative_prompt, "negative_prompt")
    negatives = negatives * len(prompts) if isinstance(negative_prompt, str) else negatives
    settings = dict(settings)
    count = read_value(int, settings.pop("num_images", 1), "num_images")
    if not prompts or count < 1:
        raise ConfigError(f"{len(prompts)} prompts times num_images = {count}: at least one picture is needed")
    if len(negatives) != len(prompts):
        raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one each")
    for name, default in zip(("height", "width"), size, strict=True):
        side = Annotated[int, Range(outline.size_multiple, LARGEST_SIDE, multiple=outline.size_multiple)]
        settings[name] = read_value(side, settings.get(name) or default, name)
    if settings.get("guidance") is None:
        settings["guidance"] = outline.guidance
    for name in SIZE_CONDITIONS:
        if (numbers := settings.get(name)) is None:
            continue
        if not outline.is_sdxl:
            raise ConfigError(f"{name} is a condition of SDXL, which {outline.name} does not take")
        if any(not 0 <= number <= LARGEST_SIDE for number in numbers):
            raise wrong(name, numbers, f"numbers from 0 to {LARGEST_SIDE}")
    repeat = lambda texts: tuple(text for text in texts for _ in range(count))
    total = len(prompts) * count
    # As in A1111, variations are of one picture: the second seed counts up instead of the first.
    varied = bool(settings.get("variation_strength"))
    seeds = _seeds("seed", settings.pop("seed", 0), total, counting=not varied)
    variation_seeds = _seeds("variation_seed", settings.pop("variation_seed", 0), total, counting=True)
    call = {name: settings.pop(name) for name in ("latents", "progress", "watch") if name in settings}
    strength = read_value(Strength, strength, "strength")
    completed = complete(settings)
    upscaling.check(completed)
    return Request(repeat(prompts), repeat(negatives), seeds, variation_seeds, completed, strength, **call)


def _texts(given: Any, name: str) -> list[str]:
    if not isinstance(given, str) and not (
        isinstance(given, Iterable) and all(isinstance(text, str) for text in given)
    ):
        raise wrong(name, given, "a text, or a list of texts")
    return [given] if isinstance(given, str) else list(given)


def _images(given: Any, name: str = "image") -> list[Image.Image]:
    images = [given] if isinstance(given, Image.Image) else list(given) if isinstance(given, (list, tuple)) else []
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ConfigError(f"{name} is a {type(given).__name__}: give a PIL image, or a list of them")
    return images


def _seeds(name: str, seed: int | Sequence[int], count: int, *, counting: bool) -> tuple[int, ...]:
    """A seed for each picture. counting: whether a single seed counts up."""
    seeds = list(seed) if isinstance(seed, Sequence) else [seed + i * counting for i in range(count)]
    if len(seeds) != count:
        raise ConfigError(f"{name}: {len(seeds)} for {count} pictures: give one, or one each")
    return tuple(read_value(Seed, seed, name) for seed in seeds)
