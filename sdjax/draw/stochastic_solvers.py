"""Update rules that add fresh noise at every step, in the form of `draw.solvers`."""

from collections.abc import Iterator

import numpy as np

from sdjax.draw.levels import Task, k_diffusion_grid, scales
from sdjax.draw.solvers import NOISE, X0, Entry, X
from sdjax.errors import ConfigError


def euler_ancestral(task: Task) -> Iterator[Entry]:
    """Ancestral sampling: k-diffusion's `sample_euler_ancestral` with eta = 1.

    An Euler step leads to a level `down` below the next one, and fresh noise leads from there up to the next one:

        up = ve_next * sqrt(1 - (ve_next / ve)^2)
        down = sqrt(ve_next^2 - up^2) = ve_next^2 / ve
        eps = (x - alpha * denoised) / sigma
        x = alpha_next * (x / alpha + (down - ve) * eps + up * noise)
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    for i in range(task.first, task.steps):
        up = ve[i + 1] * np.sqrt(1 - (ve[i + 1] / ve[i]) ** 2)
        down = ve[i + 1] ** 2 / ve[i]
        eps = (X - alpha[i] * X0) / sigma[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * (X0 + down * eps + up * NOISE)]


def lcm(task: Task) -> Iterator[Entry]:
    """Multistep sampling of consistency models: Luo et al. 2023, "Latent Consistency Models", algorithm 3.

        s = timestep_scaling * t
        c_skip = 0.25 / (s^2 + 0.25)
        c_out = s / sqrt(s^2 + 0.25)
        x0 = c_skip * x + c_out * denoised
        x = alpha_next * x0 + sigma_next * noise

    The last step returns x0.
    """
    original, count = task.options["original_inference_steps"], len(task.alphas_cumprod)
    if task.steps > original:
        raise ConfigError(f"steps {task.steps} must be at most {original} (original_inference_steps) for 'lcm'")
    trained = (np.arange(1, original + 1) * (count // original) - 1)[::-1]
    timesteps = trained[np.linspace(0, original, task.steps, endpoint=False).astype(int)]
    for i in range(task.first, task.steps):
        alpha, sigma = task.at(timesteps[i])
        time = timesteps[i] * task.options["timestep_scaling"]
        skip, out = 0.25 / (time**2 + 0.25), time / np.sqrt(time**2 + 0.25)
        moved = out * X0 + skip * X
        if i + 1 < task.steps:
            alpha_next, sigma_next = task.at(timesteps[i + 1])
            moved = alpha_next * moved + sigma_next * NOISE
        yield (timesteps[i], alpha, sigma), [moved]
