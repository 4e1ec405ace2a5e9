"""Drawing: from a request and where it starts to final latents, one compiled program a shape, and pictures of them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax import conditioning, diffusion, inpainting, sampling
from sdjax.compiler_options import compiler_options, is_large
from sdjax.conditioning import Condition
from sdjax.errors import ConfigError
from sdjax.formats.png_parameters import parameters_text
from sdjax.inpainting import Frame
from sdjax.models import unet
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


class Given(NamedTuple):
    """What the model paints around, [B, h, w, *] each.

    kept: true latents, unit noise and the mask: after a step, cells the mask does not free yet are overwritten by the
    true latents at that step's noise. A cell of value v is free for the last part v of the steps (Levin and Fried
    2023, "Differential Diffusion"): 1 always, 0 never.
    channels: mask and masked latents, further channels of the input of a U-Net made for inpainting.
    """

    kept: tuple[Array, Array, Array] | None = None
    channels: Array | None = None


NOTHING_GIVEN = Given()


def check(sd: "StableDiffusion", request: Request) -> None:
    """Raises ConfigError for what a model cannot be drawn with; an outline of it will do."""
    for each in (request, request.second_pass(sd)):
        if each is not None:
            each.plan(sd)
            conditioning.groups(sd, each)


def text2image(sd: "StableDiffusion", request: Request) -> list[Image.Image]:
    """Pictures from noise, with a second pass over them enlarged where the request has one."""
    plan, larger = request.plan(sd), request.second_pass(sd)
    second = larger and larger.plan(sd)  # which may be refused, so before the first pass is drawn
    latents = draw(sd, request, plan, sampling.initial(plan, request.noise(sd)))
    if larger is None or second is None or request.hires is None:
        return pictures(sd, request, latents)
    noise = larger.noise(sd)
    if request.hires.upscaler == "latent":
        start = jax.image.resize(jnp.asarray(latents), noise.shape, "bilinear")
    else:
        decoded = (_as_picture(0, values) for values in np.asarray(sd.decode_latents(latents)))
        start = sd.encode_image(np.stack([pixels(picture, larger.width, larger.height) for picture in decoded]))
    return pictures(sd, request, draw(sd, larger, second, sampling.initial_from_image(second, start, noise)))


def img2img(sd: "StableDiffusion", request: Request, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures from images noised to the request's strength; one image, or one each."""
    plan = request.plan(sd)
    noise = request.noise(sd)
    start = sd.encode_image(np.stack([pixels(image, request.width, request.height) for image in images]))
    state = sampling.initial_from_image(plan, jnp.broadcast_to(start, noise.shape), noise)
    return pictures(sd, request, draw(sd, request, plan, state))


def inpaint(sd: "StableDiffusion", request: Request, frames: Sequence[Frame]) -> list[Image.Image]:
    """Masked regions painted anew, at strength 1 from noise alone; one frame, or one each."""
    plan = request.plan(sd)
    noise = request.noise(sd)
    everyone = lambda array: jnp.broadcast_to(jnp.asarray(array, jnp.float32), (len(noise), *array.shape[1:]))
    images, masks = (np.stack(arrays) for arrays in zip(*(frame.canvas() for frame in frames), strict=True))
    latents = everyone(sd.encode_image(images))
    mask = everyone(inpainting.cells(masks, sd.vae.config.factor))
    state = sampling.initial(plan, noise)
    if request.strength < 1:
        start = latents
        fill = frames[0].options.fill
        if fill == "blurred":
            start = everyone(sd.encode_image(np.stack(list(map(inpainting.filled, images, masks)))))
        elif fill != "original":
            start = jnp.where(mask > 0, request.fresh_noise(sd) if fill == "noise" else jnp.zeros_like(start), start)
        state = sampling.initial_from_image(plan, start, noise)
    if for_inpainting(sd):
        given = Given(channels=everyone(_mask_channels(sd, images, masks)))
    else:
        given = Given(kept=(latents, noise, mask))
    whole = list(frames) * (len(noise) // len(frames))
    paste = lambda i, painted: whole[i].paste(painted)
    return pictures(sd, request, draw(sd, request, plan, state, given), paste)


def for_inpainting(sd: "StableDiffusion") -> bool:
    """Whether the U-Net takes mask and masked latents beside the latents. ConfigError for other kinds of input."""
    own, latent = sd.unet.config.in_channels, sd.vae.config.latent_channels
    if own not in (latent, 2 * latent + 1):
        choices = f"{latent} or, for inpainting, {2 * latent + 1}"
        raise ConfigError(f"{sd.name}: a U-Net of {own} input channels; drawn with are {choices}")
    return own != latent


def _mask_channels(
    sd: "StableDiffusion", images: Float[np.ndarray, "B H W 3"], masks: Float[np.ndarray, "B H W"]
) -> Float[Array, "B h w 5"]:
    """What a U-Net made for inpainting sees beside the latents; the masked half of the range is grey."""
    hard = masks >= 0.5
    masked = np.where(hard[..., None], np.float32(0.5), images)
    cells = inpainting.cells(hard.astype(np.float32), sd.vae.config.factor)
    return jnp.concatenate([jnp.asarray(cells), sd.encode_image(masked)], axis=-1)


def draw(
    sd: "StableDiffusion", request: Request, plan: sampling.Plan, state: sampling.State, given: Given = NOTHING_GIVEN
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of a request from where its plan starts."""
    if for_inpainting(sd) and given.channels is None:  # all of the picture is to be painted
        size = (1, request.height, request.width)
        blank = _mask_channels(sd, np.zeros((*size, 3), np.float32), np.ones(size, np.float32))
        given = given._replace(channels=jnp.broadcast_to(blank, (len(state.latents), *blank.shape[1:])))
    groups = conditioning.groups(sd, request)
    latents = np.empty(state.latents.shape, np.float32)
    for group in groups:
        own, around = state, given
        if len(groups) > 1:
            picked = np.array(group.rows)
            own = sampling.State(state.latents[picked], state.history[:, picked])
            around = jax.tree.map(lambda leaf, picked=picked: leaf[picked], given)
        latents[group.rows] = _denoise(sd, request, group, plan, own, around)
    return latents


def _as_picture(i: int, values: Float[np.ndarray, "H W 3"]) -> Image.Image:
    return Image.fromarray(np.round(values * 255).astype(np.uint8))


def pictures(
    sd: "StableDiffusion",
    request: Request,
    latents: Float[np.ndarray, "B h w 4"],
    finish: Callable[[int, Float[np.ndarray, "H W 3"]], Image.Image] = _as_picture,
) -> list[Image.Image]:
    """The latents decoded and finished, each picture with its settings in `info["parameters"]`."""
    drawn = []
    for i, values in enumerate(np.asarray(sd.decode_latents(latents))):
        picture = finish(i, values)
        picture.info["parameters"] = parameters_text(vars(request), i, model=sd.name)
        drawn.append(picture)
    return drawn


def pixels(image: Image.Image, width: int, height: int) -> Float[np.ndarray, "H W 3"]:
    """An image as values in [0, 1], resized where needed; transparency becomes white."""
    image = inpainting.on_white(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 255


def guided_denoise(
    model: unet.UNet,
    prediction_type: str,
    variables: Mapping[str, Any],
    x: Float[Array, "B h w 4"],
    level: sampling.Level,
    *,
    conditions: Sequence[Condition],
    weights: Float[Array, "B k"],
    guidance: Float[Array, ""],
    rescale: Float[Array, ""],
    channels: Float[Array, "B h w c"] | None = None,
) -> Float[Array, "B h w 4"]:
    """The U-Net as the samplers' `denoise`. Conditions of 1 + k texts (the negative first) are guided, of one are not.

    `out = uncond + guidance (cond - uncond)` (Ho and Salimans 2022, eq. 6), with k > 1 prompts the sum of their
    weighted differences (Liu et al. 2022, eq. 11), then Lin et al.'s rescale; variables: as of `collections`, for as
    many examples as each of the conditions has. channels: further ones of the U-Net's input.
    """
    latents = x if channels is None else jnp.concatenate([x, channels], axis=-1)
    outputs = []
    for context, added in conditions:
        copies = context.shape[0] // x.shape[0]
        timesteps = jnp.full((context.shape[0],), level.timestep, jnp.float32)
        out = model.apply(variables, jnp.tile(latents, (copies, 1, 1, 1)), timesteps, context, added)
        outputs += jnp.split(jnp.asarray(out, jnp.float32), copies)
    out, *conds = outputs
    if conds:
        uncond = out
        shift = sum(
            (weights[:, j, None, None, None] * (cond - uncond) for j, cond in enumerate(conds)),
            start=jnp.zeros_like(uncond),
        )
        whole = conds[0] if len(conds) == 1 else uncond + shift
        out = diffusion.rescale_guidance(whole, uncond + guidance * shift, rescale)
    return diffusion.to_denoised(out, x, level.alpha, level.sigma, prediction_type)


def _denoise(
    sd: "StableDiffusion",
    request: Request,
    group: conditioning.Group,
    plan: sampling.Plan,
    state: sampling.State,
    given: Given,
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of some pictures of a request."""
    from tqdm.auto import tqdm

    conditions = conditioning.conditions(sd, request, group, int(plan.length))
    variables = sd.variables("unet", group.rows * (len(conditions[0][0].context) // len(group.rows)))
    keys = request.keys[np.array(group.rows)]
    guidance, rescale = jnp.float32(request.guidance), jnp.float32(request.guidance_rescale)
    sampler_step = _compiled_sampler_step(sd.unet.compute.target, is_large(sd.params["unet"]))
    for i in tqdm(range(int(plan.length)), desc=request.sampler, disable=not request.progress, leave=False):
        state = sampler_step(
            sd.unet, sd.schedule.prediction_type, variables, state, np.int32(i), plan,
            keys, conditions[i], group.weights, guidance, rescale, given,
        )  # fmt: skip
    return np.asarray(state.latents)


@functools.cache
def _compiled_sampler_step(platform: str, large: bool):
    options = compiler_options(platform, large=large)
    return jax.jit(_sampler_step, static_argnums=(0, 1), donate_argnums=3, compiler_options=options)


def _sampler_step(
    model, prediction_type, variables, state, i, plan, keys, conditions, weights, guidance, rescale, given
):
    """One evaluation of the denoiser and the sampler's move; the same program for every sampler, seed and setting."""
    denoise = functools.partial(
        guided_denoise, model, prediction_type, variables,
        conditions=conditions, weights=weights, guidance=guidance, rescale=rescale, channels=given.channels,
    )  # fmt: skip
    state = sampling.step(denoise, state, i, plan, keys)
    if given.kept is not None:
        true, noise, mask = given.kept
        free = mask > 1 - (i + 1) / plan.length
        state = state._replace(latents=jnp.where(free, state.latents, sampling.noised(plan, i + 1, true, noise)))
    return state
