"""Update rules that add fresh noise at every step, in the form of `draw.solvers`.

`down` and `up` in the formulas are those of `levels.ancestral_step`. Those of k-diffusion have eta = 1.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from sdjax.draw.levels import Task, ancestral_step, k_diffusion_grid, karras, scales, spaced, timestep_of, ve_table
from sdjax.draw.solvers import NOISE, X0, Entry, H, Row, X, heun_step
from sdjax.errors import ConfigError


def euler_ancestral(task: Task) -> Iterator[Entry]:
    """Ancestral sampling: k-diffusion's `sample_euler_ancestral`.

    eps = (x - alpha * denoised) / sigma
    x = alpha_next * (x / alpha + (down - ve) * eps + up * noise)
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    for i in range(task.first, task.steps):
        down, up = ancestral_step(ve[i], ve[i + 1])
        eps = (X - alpha[i] * X0) / sigma[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * (X0 + down * eps + up * NOISE)]


def dpmpp_2s_ancestral(task: Task) -> Iterator[Entry]:
    """DPM-Solver++(2S): Lu et al. 2022, "DPM-Solver++", algorithm 1; k-diffusion's `sample_dpmpp_2s_ancestral`.

        middle = sqrt(ve * down)
        x_middle = alpha_middle * toward(middle, denoised)
        x = alpha_next * (toward(down, denoised(x_middle)) + up * noise)
        toward(level, denoised) = level / ve * x / alpha + (1 - level / ve) * denoised

    The last step returns `denoised`.
    """
    timesteps, ve = k_diffusion_grid(task)
    (alpha, sigma), table = scales(ve), ve_table(task)
    for i in range(task.first, task.steps):
        down, up = ancestral_step(ve[i], ve[i + 1])
        middle = np.sqrt(ve[i] * down)
        alpha_middle, sigma_middle = scales(middle)
        begin = X / alpha[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha_middle * _toward(middle / ve[i], begin), begin]
        if down > 0:
            moved = _toward(down / ve[i], H[0]) + up * NOISE
            yield (timestep_of(middle, table), alpha_middle, sigma_middle), [alpha[i + 1] * moved]


def _toward(share: float, begin: Row) -> Row:
    """Moves latents on a straight line to the denoised latents, until this share of the way is left."""
    return share * begin + (1 - share) * X0


def dpmpp_sde(task: Task) -> Iterator[Entry]:
    """DPM-Solver++ in its SDE form, of one step and second order: k-diffusion's `sample_dpmpp_sde` with r = 1/2.

        middle = sqrt(ve * ve_next)
        x_middle = alpha_middle * (toward(down_middle, denoised) + up_middle * noise_1)
        x = alpha_next * (toward(down, denoised(x_middle)) + up * noise)
        noise = (sqrt(ve - middle) * noise_1 + sqrt(middle - ve_next) * noise_2) / sqrt(ve - ve_next)

    `toward` is that of `dpmpp_2s_ancestral`. down_middle and up_middle are those of a step from ve to `middle`. The
    noises are the increments of one Brownian motion in ve, as in k-diffusion. The last step returns `denoised`.
    """
    timesteps, ve = k_diffusion_grid(task)
    (alpha, sigma), table = scales(ve), ve_table(task)
    for i in range(task.first, task.steps):
        middle = np.sqrt(ve[i] * ve[i + 1])
        alpha_middle, sigma_middle = scales(middle)
        down, up = ancestral_step(ve[i], middle)
        begin = X / alpha[i]
        moved = _toward(down / ve[i], begin) + up * NOISE
        yield (timesteps[i], alpha[i], sigma[i]), [alpha_middle * moved, begin, NOISE]
        if middle > 0:
            down, up = ancestral_step(ve[i], ve[i + 1])
            noise = np.sqrt(ve[i] - middle) * H[1] + np.sqrt(middle - ve[i + 1]) * NOISE
            moved = _toward(down / ve[i], H[0]) + up / np.sqrt(ve[i] - ve[i + 1]) * noise
            yield (timestep_of(middle, table), alpha_middle, sigma_middle), [alpha[i + 1] * moved]


def dpmpp_3m_sde(task: Task) -> Iterator[Entry]:
    """DPM-Solver++(3M) in its SDE form: k-diffusion's `sample_dpmpp_3m_sde`.

    Let h = log(ve / ve_next), let h_1 and h_2 belong to the two steps before, and let r_0 = h_1 / h, r_1 = h_2 / h:

        slope = (denoised - denoised_1) / r_0
        bend = (slope - (denoised_1 - denoised_2) / r_1) / (r_0 + r_1)
        x = alpha_next * (exp(-2 * h) * x / alpha + (1 - exp(-2 * h)) * denoised
            + phi_2 * (slope + r_0 * bend) - phi_3 * bend + ve_next * sqrt(1 - exp(-2 * h)) * noise)
        phi_2 = 1 - (1 - exp(-2 * h)) / (2 * h)
        phi_3 = phi_2 / (2 * h) - 1 / 2

    The first step has neither slope nor bend, the second no bend. The last step returns `denoised`.
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    h = -np.diff(np.log(ve))
    for i in range(task.first, task.steps):
        moved, history, known = X0, [X0, H[0]], i - task.first
        if ve[i + 1] > 0:
            reach = 2 * h[i]
            lost = -np.expm1(-reach)
            moved = (1 - lost) * X / alpha[i] + lost * X0 + ve[i + 1] * np.sqrt(lost) * NOISE
            phi_2 = 1 - lost / reach
            if known > 0:
                r_0 = h[i - 1] / h[i]
                slope = (X0 - H[0]) / r_0
                moved = moved + phi_2 * slope
            if known > 1:
                r_1 = h[i - 2] / h[i]
                bend = (slope - (H[0] - H[1]) / r_1) / (r_0 + r_1)
                moved = moved + (phi_2 * r_0 - (phi_2 / reach - 0.5)) * bend
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * moved, *history]


def er_sde(task: Task) -> Iterator[Entry]:
    """ER-SDE-Solver-3: Cui et al. 2023, "Elucidating the Solution Space of Extended Reverse-Time SDE", algorithm 3.

    Let phi(u) = u * (exp(u^0.3) + 10), r = phi(ve_next) / phi(ve) and w = ve_next - ve:

        slope = (denoised - denoised_1) / (ve - ve_1)
        bend = 2 * (slope - slope_1) / (ve - ve_2)
        x = alpha_next * (r * x / alpha + (1 - r) * denoised + (w + phi(ve_next) * I_0) * slope
            + (w^2 / 2 + phi(ve_next) * I_1) * bend + sqrt(ve_next^2 - r^2 * ve^2) * noise)
        I_k = integral from ve_next to ve of (u - ve)^k / phi(u) du

    The integrals are sums over 200 points, as in ComfyUI's `sample_er_sde`. The first step has neither slope nor bend,
    the second no bend. The last step returns `denoised`.
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    phi = lambda u: u * (np.exp(u**0.3) + 10)
    for i in range(task.first, task.steps):
        moved, slope, known = X0, 0 * X, i - task.first
        if ve[i + 1] > 0:
            width, ratio = ve[i + 1] - ve[i], phi(ve[i + 1]) / phi(ve[i])
            deviation = np.sqrt(max(ve[i + 1] ** 2 - (ratio * ve[i]) ** 2, 0))
            moved = ratio * X / alpha[i] + (1 - ratio) * X0 + deviation * NOISE
            points = np.linspace(ve[i + 1], ve[i], 200, endpoint=False)
            weights = phi(ve[i + 1]) / phi(points) * -width / 200
            if known > 0:
                slope = (X0 - H[0]) / (ve[i] - ve[i - 1])
                moved = moved + (width + weights.sum()) * slope
            if known > 1:
                bend = 2 * (slope - H[1]) / (ve[i] - ve[i - 2])
                moved = moved + (width**2 / 2 + np.dot(weights, points - ve[i])) * bend
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * moved, X0, slope]


def restart(task: Task) -> Iterator[Entry]:
    """Restart: Xu et al. 2023, "Restart Sampling for Improving Generative Processes", algorithm 1.

    The steps are those of `heun`. At the level nearest to ve = 0.1, noise leads back up to the level nearest to ve = 2,
    from where further steps lead down again. As in A1111, fewer than 20 steps have no restart. Of 20 steps or more, 9
    follow a restart; of 36 or more, a quarter follows each of two. With a restart all levels are those of Karras et al.
    """
    ve = k_diffusion_grid(task)[1][task.first :]
    again = times = 0
    if (steps := len(ve) - 1) >= 20:
        again, times = (9, 1) if steps < 36 else (steps // 4, 2)
        ve = np.append(karras(ve[0], ve[-2], steps - again * times), 0)
    low, high = (int(np.argmin(np.abs(ve - level))) for level in (0.1, 2))
    repeated = list(pairwise(karras(ve[high], ve[low], again + 1))) if high < low else []
    path = [*pairwise(ve[: low + 1]), *(times * repeated), *pairwise(ve[low:])]
    table = ve_table(task)
    for levels, (following, _) in zip(path, [*path[1:], (0.0, 0.0)], strict=True):
        yield from heun_step(timestep_of(np.array(levels), table), np.array(levels), max(following, levels[1]))


def ddpm(task: Task) -> Iterator[Entry]:
    """DDPM: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equation 7, between any two levels.

        a = (alpha / alpha_next)^2
        x = (alpha_next * (1 - a) * denoised + sqrt(a) * sigma_next^2 * x) / sigma^2 + deviation * noise

    The deviation is sqrt(1 - a) * sigma_next / sigma, or sqrt(1 - a) if variance_type is "fixed_large". The last step
    leads to alpha_next = 1.
    """
    if (kind := task.options["variance_type"]) not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise ConfigError(f"variance_type {kind!r} is not one of fixed_small, fixed_small_log, fixed_large")
    timesteps = spaced(task, task.steps, len(task.alphas_cumprod)).round()
    levels = [*map(task.at, timesteps), (1.0, 0.0)]
    for i in range(task.first, task.steps):
        (alpha, sigma), (alpha_next, sigma_next) = levels[i : i + 2]
        ratio = (alpha / alpha_next) ** 2
        moved = (alpha_next * (1 - ratio) * X0 + alpha / alpha_next * sigma_next**2 * X) / sigma**2
        if timesteps[i] > 0:
            moved = moved + np.sqrt(1 - ratio) * (1 if kind == "fixed_large" else sigma_next / sigma) * NOISE
        yield (timesteps[i], alpha, sigma), [moved]


def lcm(task: Task) -> Iterator[Entry]:
    """Multistep sampling of consistency models: Luo et al. 2023, "Latent Consistency Models", algorithm 3.

        s = timestep_scaling * t
        c_skip = 0.25 / (s^2 + 0.25)
        c_out = s / sqrt(s^2 + 0.25)
        x0 = c_skip * x + c_out * denoised
        x = alpha_next * x0 + sigma_next * noise

    The last step returns x0.
    """
    timesteps = _distilled_timesteps(task)
    for i in range(task.first, task.steps):
        alpha, sigma = task.at(timesteps[i])
        time = timesteps[i] * task.options["timestep_scaling"]
        skip, out = 0.25 / (time**2 + 0.25), time / np.sqrt(time**2 + 0.25)
        moved = out * X0 + skip * X
        if i + 1 < task.steps:
            alpha_next, sigma_next = task.at(timesteps[i + 1])
            moved = alpha_next * moved + sigma_next * NOISE
        yield (timesteps[i], alpha, sigma), [moved]


def tcd(task: Task) -> Iterator[Entry]:
    """Trajectory consistency: Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4, gamma = 0.3.

    A step leads down to the timestep s = floor((1 - gamma) * t_next), and noise leads up from there to t_next:

        eps = (x - alpha * denoised) / sigma
        x_s = alpha_s * denoised + sigma_s * eps
        x = alpha_next / alpha_s * x_s + sqrt(1 - (alpha_next / alpha_s)^2) * noise

    The last step ends at the first training timestep, without noise.
    """
    timesteps = _distilled_timesteps(task)
    for i in range(task.first, task.steps):
        following = timesteps[i + 1] if i + 1 < task.steps else 0
        (alpha, sigma), (alpha_s, sigma_s) = task.at(timesteps[i]), task.at(np.floor(0.7 * following))
        moved = alpha_s * X0 + sigma_s * (X - alpha * X0) / sigma
        if i + 1 < task.steps:
            ratio = task.at(following)[0] / alpha_s
            moved = ratio * moved + np.sqrt(1 - ratio**2) * NOISE
        yield (timesteps[i], alpha, sigma), [moved]


def _distilled_timesteps(task: Task) -> np.ndarray:
    """Returns the timesteps of a run, out of those that a consistency model was distilled at."""
    original, count = task.options["original_inference_steps"], len(task.alphas_cumprod)
    if task.steps > original:
        raise ConfigError(f"steps {task.steps} must be at most {original} (original_inference_steps) for lcm and tcd")
    trained = (np.arange(1, original + 1) * (count // original) - 1)[::-1]
    return trained[np.linspace(0, original, task.steps, endpoint=False).astype(int)]
