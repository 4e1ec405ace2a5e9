"""Drawing: from a request and where it starts to final latents, one compiled program a shape, and pictures of them."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax import diffusion, sampling
from sdjax.formats.png_parameters import parameters_text
from sdjax.models import unet
from sdjax.models.layers import timestep_embedding
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


def draw(
    sd: "StableDiffusion", request: Request, plan: sampling.Plan, state: sampling.State
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of a request from where its plan starts."""
    # Prompts longer than the window give a longer context. Pictures whose contexts are equally long are drawn
    # together, so that none depends on how long its neighbours' prompts are.
    groups: dict[int, list[int]] = {}
    for row, texts in enumerate(zip(request.negatives, request.prompts, strict=True)):
        groups.setdefault(sd.windows(texts if _guided(sd, request) else texts[1:]), []).append(row)
    latents = np.empty(state.latents.shape, np.float32)
    for windows, rows in groups.items():
        own = state
        if len(groups) > 1:
            own = sampling.State(state.latents[np.array(rows)], state.history[:, np.array(rows)])
        latents[rows] = _denoise(sd, request, rows, windows, plan, own)
    return latents


def pictures(sd: "StableDiffusion", request: Request, latents: Float[np.ndarray, "B h w 4"]) -> list[Image.Image]:
    """The latents decoded, each picture with its settings in `info["parameters"]`."""
    drawn = []
    for i, values in enumerate(np.asarray(sd.decode_latents(latents))):
        picture = Image.fromarray(np.round(values * 255).astype(np.uint8))
        picture.info["parameters"] = parameters_text(vars(request), i, model=sd.name)
        drawn.append(picture)
    return drawn


def pixels(image: Image.Image, width: int, height: int) -> Float[np.ndarray, "H W 3"]:
    """An image as values in [0, 1], resized where needed; transparency becomes white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
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
    context: Float[Array, "N T D"],
    added: Mapping[str, Array] | None,
    guidance: Float[Array, ""],
    rescale: Float[Array, ""],
) -> Float[Array, "B h w 4"]:
    """The U-Net as the samplers' `denoise`. N = 2B (unconditional half first) is guided, N = B is not.

    `out = uncond + guidance (cond - uncond)` (Ho and Salimans 2022, eq. 6), then Lin et al.'s rescale; variables: as of
    `collections`.
    """
    copies = context.shape[0] // x.shape[0]
    timesteps = jnp.full((context.shape[0],), level.timestep, jnp.float32)
    out = model.apply(variables, jnp.tile(x, (copies, 1, 1, 1)), timesteps, context, added)
    out = jnp.asarray(out, jnp.float32)
    if copies == 2:
        uncond, cond = jnp.split(out, 2)
        guided = uncond + guidance * (cond - uncond)
        out = diffusion.rescale_guidance(cond, guided, rescale)
    return diffusion.to_denoised(out, x, level.alpha, level.sigma, prediction_type)


def _denoise(
    sd: "StableDiffusion",
    request: Request,
    rows: Sequence[int],
    windows: int,
    plan: sampling.Plan,
    state: sampling.State,
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of the given rows of a request."""
    from tqdm.auto import tqdm

    context, added = _condition(sd, request, rows, windows)
    variables = sd.variables("unet", [*rows] * (len(context) // len(rows)))
    keys = request.keys[np.array(rows)]
    guidance, rescale = jnp.float32(request.guidance), jnp.float32(request.guidance_rescale)
    for i in tqdm(range(int(plan.length)), desc=request.sampler, disable=not request.progress, leave=False):
        state = _sampler_step(
            sd.unet, sd.schedule.prediction_type, variables, state, np.int32(i), plan,
            keys, context, added, guidance, rescale,
        )  # fmt: skip
    return np.asarray(state.latents)


def _guided(sd: "StableDiffusion", request: Request) -> bool:
    """Whether an unconditional half is drawn beside; guidance 1 needs none, nor a model that takes it as input."""
    return request.guidance != 1.0 and not sd.unet.config.time_cond_proj_dim


def _condition(
    sd: "StableDiffusion", request: Request, rows: Sequence[int], windows: int
) -> tuple[Array, dict[str, Array] | None]:
    """Context and added conditions of the given rows; the unconditional half comes first when guidance is on."""
    prompts, negatives = ([texts[row] for row in rows] for texts in (request.prompts, request.negatives))
    guided = _guided(sd, request)
    texts = [*negatives, *prompts] if guided else prompts
    drawn = [row for row in [*rows] * (2 if guided else 1) for _ in range(windows)]
    context, pooled = sd.encode_prompts(texts, clip_skip=request.clip_skip, chunks=windows, pictures=drawn)
    if guided and sd.folder.model_index.get("force_zeros_for_empty_prompt"):
        # SDXL was trained with zeros, not an encoded empty text, where the prompt was dropped.
        empty = jnp.asarray([not text for text in negatives] + [False] * len(prompts))
        context = jnp.where(empty[:, None, None], jnp.zeros((), context.dtype), context)
        pooled = jnp.where(empty[:, None], jnp.zeros((), pooled.dtype), pooled)
    added = sd.added_conditions(pooled, request.height, request.width) or {}
    if width := sd.unet.config.time_cond_proj_dim:
        scale = jnp.full((len(texts),), (request.guidance - 1) * 1000, jnp.float32)
        added["timestep_cond"] = timestep_embedding(scale, width, flip_sin_to_cos=False, freq_shift=1)
    return context, added or None


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _sampler_step(model, prediction_type, variables, state, i, plan, keys, context, added, guidance, rescale):
    """One evaluation of the denoiser and the sampler's move; the same program for every sampler, seed and setting."""
    denoise = functools.partial(
        guided_denoise, model, prediction_type, variables,
        context=context, added=added, guidance=guidance, rescale=rescale,
    )  # fmt: skip
    return sampling.step(denoise, state, i, plan, keys)
