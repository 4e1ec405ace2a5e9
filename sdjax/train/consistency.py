"""Latent consistency distillation: what a model learns that is to draw in a few steps.

A teacher with guidance draws along a path from noise to a picture. The student `f(x, t)` learns to name the end of the
path from any place of it, so that it can jump there. Both are one model: the teacher without the adapter that is
trained, the student with it. In `x_t`, the noised latents of a training picture, the teacher takes one step of DDIM
along its path, from t to s; the student's result at t should be its own result at s, which counts as a constant.
Sources: Luo et al. 2023, "Latent Consistency Models", algorithm 1 with a solver that skips k timesteps, and "LCM-LoRA".
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax import diffusion
from sdjax.diffusion import NoiseSchedule

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""The numbers of `boundary`, which the sampler `lcm` must know too. They are those of diffusers."""

Predict = Callable[[Float[Array, "B h w C"], Int[Array, " B"]], Float[Array, "B h w C"]]
"""(noised latents, timesteps) -> output of a U-Net."""


def path(timesteps: Int[Array, " B"], steps: int, count: int) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """Returns for each timestep the nearest noisier one t of the teacher's, and s, to which its step from t leads.

    steps: of the teacher's whole path; count: timesteps of the schedule. The teacher's timesteps are k - 1, 2k - 1, ...
    with k = count // steps; the last step leads to 0.
    """
    skip = count // steps
    start = jnp.minimum(timesteps // skip, steps - 1) * skip + skip - 1
    return start, jnp.maximum(start - skip, 0)


def boundary(timesteps: Int[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns c_skip and c_out, float32: 1 and 0 at t = 0, where f must be its input; almost 0 and 1 elsewhere."""
    scaled = TIMESTEP_SCALING * timesteps.astype(jnp.float32)
    total = jnp.square(scaled) + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / jnp.sqrt(total)


def result(
    schedule: NoiseSchedule, output: Float[Array, "B h w C"], x: Float[Array, "B h w C"], timesteps: Int[Array, " B"]
) -> Float[Array, "B h w C"]:
    """Returns f(x, t) = c_skip x + c_out x0, with the clean latents x0 that the output of the U-Net implies."""
    skip, out = map(_spread, boundary(timesteps))
    return skip * x + out * _denoised(schedule, output, x, timesteps)


def teacher_step(
    schedule: NoiseSchedule,
    conditional: Float[Array, "B h w C"],
    unconditional: Float[Array, "B h w C"],
    x: Float[Array, "B h w C"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    guidance: Float[Array, " B"],
) -> Float[Array, "B h w C"]:
    """Returns the latents after one step of DDIM with guidance from `start` to `end` (Song et al. 2020, equation 12).

    conditional, unconditional: outputs of the U-Net for the caption and for the empty caption. guidance: the scale, 1
    for none; the papers' w is one less.
    """
    output = unconditional + _spread(guidance) * (conditional - unconditional)
    denoised = _denoised(schedule, output, x, start)
    alpha, sigma = map(_spread, diffusion.levels(schedule, start))
    noise = (x - alpha * denoised) / sigma
    return diffusion.add_noise(schedule, denoised, noise, end)


def pair(
    schedule: NoiseSchedule,
    student: Predict,
    teacher: Callable[[Float[Array, "B h w C"], Int[Array, " B"]], tuple[Array, Array]],
    latents: Float[Array, "B h w C"],
    noise: Float[Array, "B h w C"],
    timesteps: Int[Array, " B"],
    guidance: Float[Array, " B"],
    steps: int,
) -> tuple[Float[Array, "B h w C"], Float[Array, "B h w C"]]:
    """Returns the student's result at t, and its target: the student's result at s, which no gradient goes through.

    teacher: returns the conditional and the unconditional output. timesteps: any; `path` gives t and s.
    """
    start, end = path(timesteps, steps, len(schedule.alphas_cumprod))
    x = diffusion.add_noise(schedule, latents, noise, start)
    moved = teacher_step(schedule, *teacher(x, start), x, start, end, guidance)
    target = result(schedule, student(moved, end), moved, end)
    return result(schedule, student(x, start), x, start), jax.lax.stop_gradient(target)


def _denoised(
    schedule: NoiseSchedule, output: Float[Array, "B h w C"], x: Float[Array, "B h w C"], timesteps: Int[Array, " B"]
) -> Float[Array, "B h w C"]:
    return diffusion.to_denoised(output, x, *diffusion.levels(schedule, timesteps), schedule.prediction_type)


def _spread(numbers: Float[Array | np.ndarray, " B"]) -> Float[Array, "B 1 1 1"]:
    return jnp.asarray(numbers)[:, None, None, None]
