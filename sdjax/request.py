"""What one call to draw asks for: its settings, checked against the model before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from PIL import Image

from sdjax import sampling
from sdjax.errors import ConfigError
from sdjax.inpainting import Frame, Inpainting, make_frames
from sdjax.prompt_syntax import EMPHASES, SYNTAXES
from sdjax.solvers import SAMPLERS

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


_FRESH = 1_000_000  # beyond the steps of any sampler, which fold their numbers into the same keys


class Settings(TypedDict, total=False):
    """What every way of drawing takes by keyword; the defaults are those of `Request`.

    steps: of the sampler. guidance: classifier-free guidance scale (Ho and Salimans 2022), 1 = off.
    guidance_rescale: phi of Lin et al. 2023, 3.4, in [0, 1].
    seed: image i of the call uses seed + i, whatever the batch; or one each.
    variation_strength: above 0 every image has seed's noise, moved by so much (0..1, along the sphere) towards that of
    variation_seed + i; or seeds one each.
    height, width: pixels, multiples of 8. sampler: one of `solvers.SAMPLERS`. karras: noise levels of Karras et al.
    2022. clip_skip: 1 = last layer of the text model, 2 = penultimate, None = the model's own. num_images: pictures of
    each prompt. latents: unit noise in place of the seeds'. progress: show a bar.
    """

    steps: int
    guidance: float
    guidance_rescale: float
    seed: int | Sequence[int]
    variation_seed: int | Sequence[int]
    variation_strength: float
    height: int | None
    width: int | None
    sampler: str
    karras: bool
    clip_skip: int | None
    prompt_syntax: str
    emphasis: str
    num_images: int
    latents: Float[Array, "B h w 4"] | None
    progress: bool


class HiresSettings(Settings, total=False):
    """Those of `Settings` and of `Hires`."""

    hires_scale: float
    hires_steps: int | None
    hires_strength: float
    hires_upscaler: str


class InpaintSettings(Settings, total=False):
    """Those of `Settings` and of `inpainting.Inpainting`."""

    mask_grow: int
    mask_blur: int
    fill: str
    only_masked: bool
    padding: int


UPSCALERS = ("latent", "lanczos")
_RANGES = {
    "steps": (1, 1000),
    "guidance": (0, 1000),
    "guidance_rescale": (0, 1),
    "variation_strength": (0, 1),
    "seed": (0, 2**32 - 1),
    "variation_seed": (0, 2**32 - 1),
    "clip_skip": (1, 1000),
    "hires_scale": (1, 8),
    "hires_steps": (1, 1000),
}
_CHOICES = {
    "sampler": tuple(SAMPLERS),
    "prompt_syntax": SYNTAXES,
    "emphasis": EMPHASES,
    "hires_upscaler": UPSCALERS,
}


def check_values(values: Mapping[str, Any]) -> None:
    """ConfigError for a setting, by its name, that no model could be drawn with."""
    for name, value in values.items():
        if name in _RANGES and value is not None and not _RANGES[name][0] <= value <= _RANGES[name][1]:
            low, high = _RANGES[name]
            raise ConfigError(f"{name} = {value}: must lie in {low}..{high}")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise ConfigError(f"{name} = {value!r}: choices are {', '.join(_CHOICES[name])}")
        if name in ("strength", "hires_strength") and value is not None and not 0 < value <= 1:
            raise ConfigError(f"{name} = {value}: must lie above 0 and at most at 1")


@dataclasses.dataclass(frozen=True)
class Hires:
    """A second pass over the enlarged picture, as of `img2img`. ConfigError for a bad value.

    scale: of height and width, 1 = no second pass. steps: default those of the first; steps * strength run.
    upscaler: "latent", bilinear on the latents, or "lanczos", on the decoded picture. Prompts count their steps on, as
    in A1111: with 20 steps in the first pass, `[a:b:21]` changes after one of the second, `[a:b:1.5]` after half of
    those it runs.
    """

    scale: float = 1.0
    steps: int | None = None
    strength: float = 0.5
    upscaler: str = "latent"

    def __post_init__(self) -> None:
        check_values({f"hires_{name}": value for name, value in vars(self).items()})


@dataclasses.dataclass(frozen=True)
class Request:
    """One call to draw: a prompt a picture, and the settings they share. ConfigError for one out of range.

    earlier_steps: of the pass before, from which prompts count on.
    """

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    height: int
    width: int
    steps: int = 20
    guidance: float = 7.5
    guidance_rescale: float = 0.0
    seeds: tuple[int, ...] = (0,)
    variation_seeds: tuple[int, ...] = (0,)
    variation_strength: float = 0.0
    sampler: str = "dpmpp_2m"
    karras: bool = False
    clip_skip: int | None = None
    prompt_syntax: str = "a1111"
    emphasis: str = "original"
    strength: float = 1.0
    inpainting: Inpainting | None = None
    hires: Hires | None = None
    latents: Float[Array, "B h w 4"] | None = None
    progress: bool = True
    earlier_steps: int = 0

    def __post_init__(self) -> None:
        check_values(vars(self))
        for name, seeds in (("seed", self.seeds), ("variation_seed", self.variation_seeds)):
            for seed in seeds:
                check_values({name: seed})

    @property
    def keys(self) -> Array:
        """One key a picture, from its own seed alone."""
        return _keys(self.seeds)

    def latent_shape(self, sd: "StableDiffusion") -> tuple[int, int, int, int]:
        factor = sd.vae.config.factor
        return len(self.prompts), self.height // factor, self.width // factor, sd.vae.config.latent_channels

    def noise(self, sd: "StableDiffusion") -> Float[Array, "B h w 4"]:
        """The unit noise each picture starts from: the latents given, else its seed's own."""
        shape = self.latent_shape(sd)
        if self.latents is None:
            noise = _normal(self.keys, shape[1:])
            if self.variation_strength:
                noise = slerp(noise, _normal(_keys(self.variation_seeds), shape[1:]), self.variation_strength)
            return noise
        latents = jnp.asarray(self.latents, jnp.float32)
        if latents.shape != shape:
            raise ConfigError(f"latents have shape {latents.shape}; this call needs {shape}")
        return latents

    def second_pass(self, sd: "StableDiffusion") -> "Request | None":
        """The request of the pass over the enlarged picture."""
        if self.hires is None or self.hires.scale == 1:
            return None
        multiple = size_multiple(sd)
        height, width = (round(side * self.hires.scale / multiple) * multiple for side in (self.height, self.width))
        return dataclasses.replace(
            self,
            height=height,
            width=width,
            steps=self.hires.steps or self.steps,
            strength=self.hires.strength,
            hires=None,
            latents=None,
            earlier_steps=self.steps,
        )

    def fresh_noise(self, sd: "StableDiffusion") -> Float[Array, "B h w 4"]:
        """More unit noise from the same seeds."""
        keys = jax.vmap(lambda key: jax.random.fold_in(key, _FRESH))(self.keys)
        return _normal(keys, self.latent_shape(sd)[1:])

    def plan(self, sd: "StableDiffusion") -> sampling.Plan:
        """The sampling run. Raises ConfigError for what this model cannot be drawn with."""
        sd.hidden_state(self.clip_skip)
        return sampling.plan(sd.schedule, self.sampler, self.steps, karras=self.karras, strength=self.strength)


def slerp(start: Float[Array, "B ..."], end: Float[Array, "B ..."], share: float) -> Float[Array, "B ..."]:
    """From start to end along the great circle between them (Shoemake 1985), each example its own."""
    axes = tuple(range(1, start.ndim))
    norm = lambda values: jnp.sqrt(jnp.sum(values**2, axes, keepdims=True))
    cosine = jnp.sum(start * end, axes, keepdims=True) / (norm(start) * norm(end))
    angle = jnp.arccos(jnp.clip(cosine, -1, 1))
    apart = jnp.sin(angle) > 1e-4  # else both are one, or opposite: there is no circle, or no only one
    sine = jnp.where(apart, jnp.sin(angle), 1.0)
    curved = (jnp.sin((1 - share) * angle) * start + jnp.sin(share * angle) * end) / sine
    return jnp.where(apart, curved, (1 - share) * start + share * end)


def _keys(seeds: Sequence[int]) -> Array:
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def _normal(keys: Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def for_text2image(
    sd: "StableDiffusion", prompt: str | Sequence[str], negative_prompt: str | Sequence[str], settings: HiresSettings
) -> Request:
    """As of `StableDiffusion.text2image`, like the two below."""
    size = (sd.unet.config.sample_size,) * 2
    own: dict[str, Any] = dict(settings)
    if (latents := settings.get("latents")) is not None:
        size = latents.shape[1:3]
        own |= {"height": None, "width": None}
    height, width = (side * sd.vae.config.factor for side in size)
    hires = {field.name: f"hires_{field.name}" for field in dataclasses.fields(Hires)}
    own["hires"] = Hires(**{field: own.pop(name) for field, name in hires.items() if name in own})
    return _request(sd, prompt, negative_prompt, own, size=(height, width))


def for_img2img(
    sd: "StableDiffusion",
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    image: Image.Image | Sequence[Image.Image],
    settings: Settings,
    *,
    strength: float,
) -> tuple[Request, list[Image.Image]]:
    images = [image] if isinstance(image, Image.Image) else list(image)
    size = (max(8, images[0].height // 8 * 8), max(8, images[0].width // 8 * 8))
    request = _request(sd, prompt, negative_prompt, settings | {"strength": strength}, size=size)
    _check_count(images, request)
    return request, images


def for_inpaint(
    sd: "StableDiffusion",
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    image: Image.Image | Sequence[Image.Image],
    mask: Image.Image | Sequence[Image.Image] | None,
    settings: InpaintSettings,
    *,
    strength: float,
) -> tuple[Request, list[Frame]]:
    images = [image] if isinstance(image, Image.Image) else list(image)
    masks: list[Any] = list(mask) if isinstance(mask, list | tuple) else [mask]
    if len(masks) not in (1, len(images)):
        raise ConfigError(f"{len(masks)} masks for {len(images)} images: give one, or one each")
    own: dict[str, Any] = {**settings, "strength": strength}
    names = [field.name for field in dataclasses.fields(Inpainting)]
    own["inpainting"] = options = Inpainting(**{name: own.pop(name) for name in names if name in own})
    frames = make_frames(
        images,
        masks,
        options,
        size=(settings.get("height"), settings.get("width")),
        native=sd.unet.config.sample_size * sd.vae.config.factor,
        multiple=size_multiple(sd),
    )
    request = _request(sd, prompt, negative_prompt, own, size=frames[0].drawn)
    _check_count(frames, request)
    return request, frames


def _check_count(images: Sequence[object], request: Request) -> None:
    if len(images) not in (1, len(request.prompts)):
        raise ConfigError(f"{len(images)} images for {len(request.prompts)} pictures: give one, or one each")


def _request(
    sd: "StableDiffusion",
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str],
    settings: Mapping[str, Any],
    *,
    size: tuple[int, int],
) -> Request:
    """settings: fields of `Request`, seed and num_images. size: height and width where they give none."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
    own = dict(settings)
    count = own.pop("num_images", 1)
    if not prompts or count < 1:
        raise ConfigError(f"{len(prompts)} prompts times num_images = {count}: at least one picture is needed")
    if len(negatives) != len(prompts):
        raise ConfigError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one, or one each")
    multiple = size_multiple(sd)
    for name, default in zip(("height", "width"), size, strict=True):
        own[name] = length = settings.get(name) or default
        if length < multiple or length % multiple:
            raise ConfigError(f"{name} = {length}: must be a positive multiple of {multiple}")
    if sd.adapters and len(prompts) * count != (adapted := len(jax.tree.leaves(sd.adapters)[0])):
        raise ConfigError(f"{adapted} LoRAs for {len(prompts) * count} pictures: one each is needed")
    repeat = lambda texts: tuple(text for text in texts for _ in range(count))
    total = len(prompts) * count
    # Variations are of one picture, as in A1111: there the second seed counts up.
    own["seeds"] = _seeds("seed", own.pop("seed", 0), total, counting=not own.get("variation_strength"))
    own["variation_seeds"] = _seeds("variation_seed", own.pop("variation_seed", 0), total, counting=True)
    return Request(repeat(prompts), repeat(negatives), **own)


def _seeds(name: str, given: int | Sequence[int], count: int, *, counting: bool) -> tuple[int, ...]:
    if isinstance(given, Sequence):
        if len(given) != count:
            raise ConfigError(f"{name}: {len(given)} for {count} pictures: give one, or one each")
        return tuple(given)
    return tuple(given + i * counting for i in range(count))


def size_multiple(sd: "StableDiffusion") -> int:
    """Pixels that a picture's sides must be multiples of."""
    return max(8, sd.vae.config.factor)
