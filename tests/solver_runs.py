"""Runs of a solver in float64: its rows, applied to arrays. For tests beside the published formulas."""

from typing import NamedTuple

import numpy as np
from schedules import MIX, NOISE, SHAPE

from sdjax.draw.levels import Task
from sdjax.draw.samplers import SAMPLERS
from sdjax.draw.solvers import HISTORY

ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
FRESH = np.random.default_rng(1).standard_normal((80, *SHAPE))


class At(NamedTuple):
    """A noise level of a run."""

    t: float
    alpha: float
    sigma: float

    ve = property(lambda self: self.sigma / self.alpha)
    lam = property(lambda self: np.log(self.alpha / self.sigma))


END = At(-1, 1.0, 0.0)


def limited(denoised):
    return np.clip(denoised, -0.3, 0.3)


def evaluations(sampler, steps, denoiser, limit=limited, start=NOISE, fresh=FRESH, **options):
    """Yields (level, new latents, new history) of each evaluation, from the rows of the solver.

    fresh: the noise that each evaluation may add. options: of the scheduler.
    """
    options = {**SAMPLERS[sampler].options, **options}
    with np.errstate(divide="ignore", invalid="ignore"):  # the last level has sigma = 0, so log(alpha / sigma) = inf
        entries = list(SAMPLERS[sampler].entries(Task(ALPHAS_CUMPROD, "epsilon", options, steps, 0)))
    latents, history = start.astype(np.float64), np.zeros((HISTORY, *start.shape))
    for (level, rows), noise in zip(entries, fresh, strict=False):
        denoised = denoiser(latents, At(*level))
        terms = np.stack([latents, *history, denoised, limit(denoised), noise])
        latents, *new = np.tensordot(np.stack(rows), terms, 1)
        history = np.stack([*new, *np.zeros((HISTORY - len(new), *start.shape))])
        yield At(*level), latents, history


def denoise(x, at):
    return np.tanh(x @ MIX.astype(np.float64) + at.t / 1000)


def eps_of(x, denoised, at):
    return (x - at.alpha * denoised) / at.sigma
