"""Drawing: computes the final latents of a request, with one compiled program for each shape, and decodes them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax import diffusion, lora
from sdjax.data.images import Size, picture, pixels
from sdjax.draw import conditioning, inpainting, sampling, upscaling
from sdjax.draw.conditioning import Condition
from sdjax.draw.inpainting import Frame
from sdjax.draw.request import Request
from sdjax.draw.settings import SIZE_CONDITIONS, changed, labelled
from sdjax.errors import ConfigError, TrainingStopped
from sdjax.formats.png_parameters import parameters_text
from sdjax.model import Model
from sdjax.models import unet
from sdjax.outline import Outline
from sdjax.runtime.compiler_options import compiler_options, is_large
from sdjax.runtime.devices import split_examples, within


class Given(NamedTuple):
    """The image around the masked region, in inpainting. Each array is [B, h, w, *].

    kept: true latents, unit noise and the mask, for a standard model. After each step, the cells that the mask does
    not free yet are overwritten by the true latents at the noise level of that step. A cell of value v is free for the
    last share v of the steps (Levin and Fried 2023, "Differential Diffusion"): always if v = 1, never if v = 0.
    channels: mask and masked latents, for a U-Net that takes them as further input channels.
    """

    kept: tuple[Array, Array, Array] | None = None
    channels: Array | None = None


NOTHING_GIVEN = Given()


def check(outline: Outline, request: Request) -> None:
    """Raises ConfigError for a request that the model cannot draw."""
    for drawn in (request, request.second_pass(outline)):
        if drawn is not None:
            drawn.sampler_table(outline)
            conditioning.groups(outline, drawn)


def text2image(model: Model, request: Request) -> list[Image.Image]:
    """Draws pictures from noise, and from the enlarged pictures once more if the request has a second pass."""
    table, larger = _table(model, request), request.second_pass(model.outline)
    second = larger and _table(model, larger)  # now, so that an error comes before the first pass is drawn
    latents = sample_latents(model, request, table, sampling.initial(table, request.noise(model.outline)))
    if larger is None or second is None:
        return pictures(model, request, latents)
    noise, size = larger.noise(model.outline), Size(*larger.size)
    upscaler = request.settings["hires_upscaler"]
    if upscaler == "latent":
        start = jax.image.resize(jnp.asarray(latents), noise.shape, "bilinear")
    else:
        decoded = [picture(values) for values in np.asarray(model.decode_latents(latents))]
        if upscaler != "lanczos":
            decoded = [upscaling.load(upscaler).enlarge(image, size) for image in decoded]
        start = model.encode_image(np.stack([pixels(image, size) for image in decoded]))
    state = sampling.initial_from_image(second, start, noise)
    return pictures(model, request, sample_latents(model, larger, second, state))


def img2img(model: Model, request: Request, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Draws pictures from images noised to the strength of the request. images: one for all pictures, or one each."""
    table, noise = _table(model, request), request.noise(model.outline)
    start = model.encode_image(np.stack([pixels(image, Size(*request.size)) for image in images]))
    state = sampling.initial_from_image(table, jnp.broadcast_to(start, noise.shape), noise)
    return pictures(model, request, sample_latents(model, request, table, state))


def inpaint(model: Model, request: Request, frames: Sequence[Frame]) -> list[Image.Image]:
    """Paints masked regions anew. frames: one for all pictures, or one each. Strength 1 starts from noise alone."""
    outline = model.outline
    table, noise = _table(model, request), request.noise(outline)
    for_all = lambda array: jnp.broadcast_to(jnp.asarray(array, jnp.float32), (len(noise), *array.shape[1:]))
    images, masks = (np.stack(arrays) for arrays in zip(*(frame.canvas() for frame in frames), strict=True))
    latents = for_all(model.encode_image(images))
    mask = for_all(inpainting.cells(masks, outline.vae.config.factor))
    state = sampling.initial(table, noise)
    if request.strength < 1:
        start, fill = latents, request.settings["fill"]
        if fill == "blurred":
            start = for_all(model.encode_image(np.stack(list(map(inpainting.filled, images, masks)))))
        elif fill != "original":
            filling = request.second_noise(outline) if fill == "noise" else jnp.zeros_like(start)
            start = jnp.where(mask > 0, filling, start)
        state = sampling.initial_from_image(table, start, noise)
    if outline.is_inpainting:
        given = Given(channels=for_all(mask_channels(model, images, masks)))
    else:
        given = Given(kept=(latents, noise, mask))
    latents = sample_latents(model, request, table, state, given)
    whole = list(frames) * (len(noise) // len(frames))
    return pictures(model, request, latents, [frame.paste for frame in whole])


def _table(model: Model, request: Request) -> sampling.Table:
    """The table of the sampler. Raises ConfigError for a request that the model cannot draw."""
    count = len(request.prompts)
    adapters = max(map(lora.stacked, model.adapters.values()), default=0)
    if adapters and count != adapters:
        raise ConfigError(f"{adapters} LoRAs for {count} pictures: one each is needed")
    return request.sampler_table(model.outline)


def mask_channels(
    model: Model, images: Float[np.ndarray, "B H W 3"], masks: Float[np.ndarray, "B H W"]
) -> Float[Array, "B h w 5"]:
    """The further input channels of a U-Net made for inpainting: the mask, and the latents of the image without it.

    images: in [0, 1]. Masked pixels are made grey. masks: in [0, 1]; a pixel is masked from 0.5 on.
    """
    hard = masks >= 0.5
    masked = np.where(hard[..., None], np.float32(0.5), images)
    cells = inpainting.cells(hard.astype(np.float32), model.outline.vae.config.factor)
    return jnp.concatenate([jnp.asarray(cells), model.encode_image(masked)], axis=-1)


def sample_latents(
    model: Model, request: Request, table: sampling.Table, state: sampling.State, given: Given = NOTHING_GIVEN
) -> Float[np.ndarray, "B h w 4"]:
    """The final latents of a request. state: the one that its table starts from."""
    if model.outline.is_inpainting and given.channels is None:  # the whole picture is to be painted
        size = (1, *request.size)
        blank = mask_channels(model, np.zeros((*size, 3), np.float32), np.ones(size, np.float32))
        given = given._replace(channels=jnp.broadcast_to(blank, (len(state.latents), *blank.shape[1:])))
    groups = conditioning.groups(model.outline, request)
    latents = np.empty(state.latents.shape, np.float32)
    for group in groups:
        start, around = state, given
        if len(groups) > 1:
            picked = np.array(group.rows)
            start = sampling.State(state.latents[picked], state.history[:, picked])
            around = jax.tree.map(lambda leaf, picked=picked: leaf[picked], given)
        latents[group.rows] = _sample_group(model, request, group, table, start, around)
    return latents


def pictures(
    model: Model,
    request: Request,
    latents: Float[np.ndarray, "B h w 4"],
    pasting: Sequence[Callable[[Float[np.ndarray, "H W 3"]], Image.Image]] | None = None,
) -> list[Image.Image]:
    """Decodes latents to pictures that carry their settings in `info["parameters"]`.

    Raises TrainingStopped for a picture that holds NaN, which would come out black.
    pasting: in inpainting, for each picture the function that pastes the decoded pixels, in [0, 1], into its image.
    """
    drawn = []
    for i, values in enumerate(np.asarray(model.decode_latents(latents))):
        if not np.isfinite(values).all():
            raise TrainingStopped(
                f"the picture of {request.prompts[i][:80]!r} is not a number (NaN): the weights of its prompt or LoRA "
                "are too large, or float16 overflows, where bfloat16 and float32 do not"
            )
        image = pasting[i](values) if pasting else picture(values)
        fields = png_fields(request, i, model.outline.name, inpainted=pasting is not None)
        if (refiner := model.outline.refiner) is not None:
            fields |= {"Refiner": Path(refiner.outline.name).stem, "Refiner switch at": refiner.switch}
        image.info["parameters"] = parameters_text(request.prompts[i], request.negatives[i], fields)
        if (upscaler := request.settings["upscale"]) is not None:
            image = upscaling.upscale(image, upscaler, request.settings["scale"])
        drawn.append(image)
    return drawn


def png_fields(request: Request, i: int, name: str, *, inpainted: bool) -> dict[str, Any]:
    """Label -> value of the settings that A1111 writes into picture i. name: of the model."""
    settings, (height, width) = request.settings, request.size
    fields = labelled({**settings, "spacing": request.spacing}, ["steps", "sampler", "spacing", "guidance"])
    fields |= {"Seed": request.seeds[i], "Size": f"{width}x{height}", "Model": Path(name).stem}
    fields |= labelled(settings, changed(settings, ["guidance_rescale", "freeu"]))
    fields |= labelled({"strength": request.strength}, ["strength"] if request.strength != 1 else [])
    fields |= labelled(settings, changed(settings, ["clip_skip", "emphasis", *SIZE_CONDITIONS]))
    if settings["variation_strength"]:
        fields |= {"Variation seed": request.variation_seeds[i]} | labelled(settings, ["variation_strength"])
    if settings["hires_scale"] != 1:
        steps = ["hires_steps"] if settings["hires_steps"] else []
        names = {**settings, "hires_upscaler": Path(settings["hires_upscaler"]).stem}
        fields |= labelled(names, ["hires_strength", "hires_scale", *steps, "hires_upscaler"])
    if inpainted:
        fields |= labelled(settings, [name for name in ("mask_blur", "mask_grow") if settings[name]])
        fields |= labelled(settings, changed(settings, ["fill", "only_masked"]))
        fields |= labelled(settings, ["padding"] if settings["only_masked"] else [])
    return fields


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
    """The U-Net with guidance as the `denoise` function of the samplers.

    A picture with a single text is not guided. With a negative prompt and k prompts that AND joins, the output is

        uncond + guidance * sum over j of weights[j] * (cond[j] - uncond)

    (Ho and Salimans 2022, equation 6; Liu et al. 2022, equation 11, for k > 1), then rescaled as in Lin et al. 2023.
    variables: see `Model.variables`, for as many examples as each of the conditions has. conditions: the negative
    prompt first. channels: further input channels of the U-Net.
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


def _sample_group(
    model: Model,
    request: Request,
    group: conditioning.Group,
    table: sampling.Table,
    state: sampling.State,
    given: Given,
) -> Float[np.ndarray, "B h w 4"]:
    """The final latents of one group of pictures."""
    from tqdm.auto import tqdm

    switch, length = int(table.switch), int(table.length)
    settings, split = request.settings, functools.partial(split_examples, model.mesh)
    keys, weights, given = split((request.keys[np.array(group.rows)], group.weights, given))
    guidance, rescale = jnp.float32(request.guidance), jnp.float32(settings["guidance_rescale"])
    turns = [(model, group, range(switch))] if switch else []
    if model.refiner is not None and switch < length:
        texts = conditioning.refined(model.refiner.outline, request, group)
        turns.append((model.refiner, texts, range(switch, length)))
    with tqdm(total=length, desc=settings["sampler"], disable=not request.progress, leave=False) as bar:
        for turn, texts, evaluations in turns:
            conditions = conditioning.conditions(turn, request, texts, evaluations)
            variables = turn.variables("unet", group.rows * (len(conditions[0][0].context) // len(group.rows)))
            unet, prediction_type = turn.outline.unet, turn.outline.schedule.prediction_type
            sampler_step = compiled_sampler_step(turn.outline)
            for i, condition in zip(evaluations, conditions, strict=True):
                # The compiler may place the result otherwise, and would compile the step again for it.
                state = sampling.State(split(state.latents), split(state.history, axis=1))
                with within(model.mesh):
                    state = sampler_step(
                        unet, prediction_type, variables, state, np.int32(i), table,
                        keys, condition, weights, guidance, rescale, given,
                    )  # fmt: skip
                bar.update()
                if request.watch is not None:
                    request.watch(i + 1, length, state.latents)
    return np.asarray(state.latents)


def compiled_sampler_step(outline: Outline) -> Any:
    """Returns `_sampler_step` as a compiled function, which all models of this size share."""
    return _compiled(outline.unet.compute.target, is_large(outline.shapes["unet"]))


@functools.cache
def _compiled(platform: str, large: bool) -> Any:
    options = compiler_options(platform, large=large)
    return jax.jit(_sampler_step, static_argnums=(0, 1), donate_argnums=3, compiler_options=options)


def _sampler_step(
    model, prediction_type, variables, state, i, table, keys, conditions, weights, guidance, rescale, given
):
    """One evaluation of the denoiser and the step of the sampler: one program for every sampler, seed and setting."""
    denoise = functools.partial(
        guided_denoise, model, prediction_type, variables,
        conditions=conditions, weights=weights, guidance=guidance, rescale=rescale, channels=given.channels,
    )  # fmt: skip
    state = sampling.step(denoise, state, i, table, keys)
    if given.kept is not None:
        true, noise, mask = given.kept
        free = mask > 1 - (i + 1) / table.length
        state = state._replace(latents=jnp.where(free, state.latents, sampling.noised(table, i + 1, true, noise)))
    return state
