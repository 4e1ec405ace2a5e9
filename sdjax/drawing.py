"""Drawing: from a request and where it starts to final latents, one compiled program a shape, and pictures of them."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from sdjax import conditioning, diffusion, sampling
from sdjax.conditioning import Condition
from sdjax.formats.png_parameters import parameters_text
from sdjax.models import unet
from sdjax.request import Request

if TYPE_CHECKING:
    from sdjax.pipeline import StableDiffusion


def draw(
    sd: "StableDiffusion", request: Request, plan: sampling.Plan, state: sampling.State
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of a request from where its plan starts."""
    groups = conditioning.groups(sd, request)
    latents = np.empty(state.latents.shape, np.float32)
    for group in groups:
        own = state
        if len(groups) > 1:
            own = sampling.State(state.latents[np.array(group.rows)], state.history[:, np.array(group.rows)])
        latents[group.rows] = _denoise(sd, request, group, plan, own)
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
    conditions: Sequence[Condition],
    weights: Float[Array, "B k"],
    guidance: Float[Array, ""],
    rescale: Float[Array, ""],
) -> Float[Array, "B h w 4"]:
    """The U-Net as the samplers' `denoise`. Conditions of 1 + k texts (the negative first) are guided, of one are not.

    `out = uncond + guidance (cond - uncond)` (Ho and Salimans 2022, eq. 6), with k > 1 prompts the sum of their
    weighted differences (Liu et al. 2022, eq. 11), then Lin et al.'s rescale; variables: as of `collections`, for as
    many examples as each of the conditions has.
    """
    outputs = []
    for context, added in conditions:
        copies = context.shape[0] // x.shape[0]
        timesteps = jnp.full((context.shape[0],), level.timestep, jnp.float32)
        out = model.apply(variables, jnp.tile(x, (copies, 1, 1, 1)), timesteps, context, added)
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
) -> Float[np.ndarray, "B h w 4"]:
    """Final latents of some pictures of a request."""
    from tqdm.auto import tqdm

    conditions = conditioning.conditions(sd, request, group, int(plan.length))
    variables = sd.variables("unet", group.rows * (len(conditions[0][0].context) // len(group.rows)))
    keys = request.keys[np.array(group.rows)]
    guidance, rescale = jnp.float32(request.guidance), jnp.float32(request.guidance_rescale)
    for i in tqdm(range(int(plan.length)), desc=request.sampler, disable=not request.progress, leave=False):
        state = _sampler_step(
            sd.unet, sd.schedule.prediction_type, variables, state, np.int32(i), plan,
            keys, conditions[i], group.weights, guidance, rescale,
        )  # fmt: skip
    return np.asarray(state.latents)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _sampler_step(model, prediction_type, variables, state, i, plan, keys, conditions, weights, guidance, rescale):
    """One evaluation of the denoiser and the sampler's move; the same program for every sampler, seed and setting."""
    denoise = functools.partial(
        guided_denoise, model, prediction_type, variables,
        conditions=conditions, weights=weights, guidance=guidance, rescale=rescale,
    )  # fmt: skip
    return sampling.step(denoise, state, i, plan, keys)
