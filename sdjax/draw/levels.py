"""The timesteps and noise levels of a sampling run."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaincinv

from sdjax.errors import ConfigError

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "sgm_uniform", "simple")
"""The spacings of timesteps. `CURVES` has the spacings of noise levels."""


class Task(NamedTuple):
    """One run of a sampler. alphas_cumprod [T] is float64 and may end in 0."""

    alphas_cumprod: np.ndarray
    prediction_type: str
    options: Mapping[str, Any]
    steps: int
    first: int  # the first step that runs; above 0 where the strength is below 1

    @property
    def stride(self) -> int:
        """Training timesteps from one step to the next."""
        return len(self.alphas_cumprod) // self.steps

    @property
    def curve(self) -> str | None:
        """The spacing of the noise levels, in place of that of the timesteps; None without one."""
        return next((name for name in CURVES if self.options.get(f"use_{name}_sigmas")), None)

    def at(self, timestep: float) -> tuple[float, float]:
        """Returns alpha and sigma of a training timestep. A negative timestep means the end of sampling."""
        if timestep >= 0:
            value = self.alphas_cumprod[min(int(timestep), len(self.alphas_cumprod) - 1)]
        else:
            value = 1.0 if self.options["set_alpha_to_one"] else self.alphas_cumprod[0]
        return np.sqrt(value), np.sqrt(1 - value)


def spaced(task: Task, points: int, last: int) -> np.ndarray:
    """Spaces `points` timesteps over 0..last-1 (Lin et al. 2023, table 2) and returns the largest `steps` of them.

    The largest comes first. They are not rounded. "sgm_uniform" and "simple" are spacings of A1111 and ComfyUI.
    """
    spacing = task.options["timestep_spacing"]
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points)[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(points) * (last // points))[::-1] + task.options["steps_offset"]
    elif spacing == "trailing":
        timesteps = np.arange(last, 0, -len(task.alphas_cumprod) / task.steps).round() - 1
    elif spacing == "sgm_uniform":
        timesteps = np.linspace(last - 1, 0, task.steps + 1)
    elif spacing == "simple":
        timesteps = last - 1 - np.floor(np.arange(task.steps) * (last / task.steps))
    else:
        raise ConfigError(f"timestep_spacing {spacing!r} is not one of linspace, leading, trailing")
    return timesteps[: task.steps]  # some give one too many


def ve_table(task: Task) -> np.ndarray:
    """Returns ve of every training timestep. As in diffusers, an alphas_cumprod of 0 counts as 2^-24."""
    alphas_cumprod = np.where(task.alphas_cumprod == 0, 2.0**-24, task.alphas_cumprod)
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod).astype(np.float32).astype(np.float64)


def karras(high: float, low: float, steps: int) -> np.ndarray:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5, rho = 7."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7


def _exponential(high: float, low: float, steps: int) -> np.ndarray:
    """Even steps of log(ve)."""
    return np.exp(np.linspace(np.log(high), np.log(low), steps))


def _beta(high: float, low: float, steps: int) -> np.ndarray:
    """Quantiles of the beta distribution: Lee et al. 2024, "Beta Sampling is All You Need".

    As in diffusers and A1111 they divide the range of ve. In the paper and in ComfyUI they divide the timesteps.
    """
    return low + (high - low) * betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, steps))


CURVES: dict[str, Callable[[float, float, int], np.ndarray]] = {
    "karras": karras,
    "exponential": _exponential,
    "beta": _beta,
}
"""The spacings of noise levels. Each takes the largest ve, the smallest and their number, and returns them in order.

The scheduler option of "karras" is `use_karras_sigmas`, and so on."""


def _ve_at(timesteps: np.ndarray, table: np.ndarray, task: Task) -> np.ndarray:
    """Interpolates ve at fractional timesteps: as diffusers does, but for "sgm_uniform" as k-diffusion does."""
    if task.options["timestep_spacing"] == "sgm_uniform":
        return np.exp(np.interp(timesteps, np.arange(len(table)), np.log(table)))
    return np.interp(timesteps, np.arange(len(table)), table)


def timestep_of(ve: np.ndarray | float, table: np.ndarray) -> Any:
    """Interpolates the fractional timestep of each ve linearly in log(ve), in the shape of ve.

    The table is in float32, as in diffusers: some samplers round the timestep, and the last bits decide how.
    """
    return np.interp(np.log(ve), np.log(table.astype(np.float32)), np.arange(len(table)))


def _with_last(ve: np.ndarray, last: float, task: Task) -> np.ndarray:
    """Appends the ve that sampling ends at: `last` for final_sigmas_type "sigma_min", otherwise 0."""
    kind = task.options.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise ConfigError(f"final_sigmas_type {kind!r} is not one of zero, sigma_min")
    if (np.diff(ve) >= 0).any():
        raise ConfigError(f"{task.steps} steps put two noise levels in one place; use fewer")
    return np.append(ve, last if kind == "sigma_min" else 0).astype(np.float32).astype(np.float64)


def scales(ve: np.ndarray | float) -> tuple[Any, Any]:
    """Returns alpha and sigma, in the shape of ve = sigma / alpha."""
    alpha = 1 / np.sqrt(1 + ve**2)
    return alpha, ve * alpha


def k_diffusion_grid(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Returns timesteps [steps] and ve [steps + 1] of the samplers that interpolate ve at fractional timesteps.

    The last ve is where the last step ends.
    """
    table = ve_table(task)
    timesteps = spaced(task, task.steps, len(table))
    kind = task.options.get("interpolation_type", "linear")
    if kind == "linear":
        ve = _ve_at(timesteps, table, task)
    elif kind == "log_linear":
        ve = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), task.steps + 1))
    else:
        raise ConfigError(f"interpolation_type {kind!r} is not one of linear, log_linear")
    if task.curve:
        ve = CURVES[task.curve](ve[0], ve[-1], task.steps)
        timesteps = timestep_of(ve, table)
    return timesteps, _with_last(ve, table[0], task)


def ancestral_step(ve: float, ve_next: float) -> tuple[float, float]:
    """Divides a step in two: down to a level below ve_next, and up from there to ve_next with fresh noise.

    Returns that level, and the deviation of the noise in the variance-exploding scaling. Source: k-diffusion's
    `get_ancestral_step` with eta = 1, which is the variance of Ho et al. 2020:

        up = ve_next * sqrt(1 - (ve_next / ve)^2)
        down = sqrt(ve_next^2 - up^2) = ve_next^2 / ve
    """
    return ve_next**2 / ve, ve_next * np.sqrt(1 - (ve_next / ve) ** 2)


class SolverGrid(NamedTuple):
    """The noise levels of an exponential solver."""

    timesteps: np.ndarray  # [steps]
    alpha: np.ndarray  # [steps + 1], as are the two below
    sigma: np.ndarray
    half_log_snr: np.ndarray  # log(alpha / sigma), the papers' lambda


def solver_grid(task: Task, *, lowest: float = -np.inf, floor: bool = False, curve_last: bool = False) -> SolverGrid:
    """Returns the noise levels of the exponential solvers, which leave out the last of steps + 1 spaced timesteps.

    lowest: timesteps whose log(alpha / sigma) is smaller are left out. floor: Karras timesteps are rounded down, as
    those of the other curves are, instead of to the nearest. curve_last: final_sigmas_type "sigma_min" means the
    smallest ve of the curve instead of the smallest ve of training.
    """
    for option, choices in (("solver_order", (1, 2, 3)), ("solver_type", ("midpoint", "heun", "bh1", "bh2", "logrho"))):
        if (value := task.options[option]) not in choices:
            raise ConfigError(f"{option} {value!r} is not one of {', '.join(map(str, choices))}")
    table = ve_table(task)
    last = len(table) - int(np.searchsorted(-np.log(table)[::-1], lowest))
    timesteps = spaced(task, task.steps + 1, last)
    if task.options["timestep_spacing"] != "sgm_uniform":
        timesteps = timesteps.round()
    ve, lowest_ve = _ve_at(timesteps, table, task), table[0]
    if task.curve:
        ve = CURVES[task.curve](table[-1], table[0], task.steps)
        timesteps = timestep_of(ve, table)
        down = floor or task.curve != "karras"
        timesteps = np.floor(timesteps) if down else timesteps.round()
        lowest_ve = ve[-1] if curve_last else lowest_ve
    alpha, sigma = scales(_with_last(ve, lowest_ve, task))
    return SolverGrid(timesteps, alpha, sigma, np.log(alpha) - np.log(sigma))
