"""The spacings of timesteps and noise levels beside the formulas of ComfyUI, A1111 and the papers."""

import numpy as np
import pytest
import scipy.stats
from solver_runs import ALPHAS_CUMPROD

from sdjax.draw.levels import Task, k_diffusion_grid, solver_grid
from sdjax.draw.samplers import SAMPLERS

TABLE = np.sqrt(1 / ALPHAS_CUMPROD - 1)


def grids(steps, **options):
    """(timesteps, ve) of the two kinds of grid."""
    task = lambda sampler: Task(ALPHAS_CUMPROD, "epsilon", {**SAMPLERS[sampler].options, **options}, steps, 0)
    yield k_diffusion_grid(task("euler"))
    with np.errstate(divide="ignore"):
        grid = solver_grid(task("dpmpp_2m"))
    yield grid.timesteps, grid.sigma / grid.alpha


@pytest.mark.parametrize("steps", [1, 4, 7, 30])
def test_sgm_uniform_and_simple_are_those_of_comfyui(steps):
    for timesteps, ve in grids(steps, timestep_spacing="sgm_uniform"):
        expected = [999 - 999 * k / steps for k in range(steps)]
        np.testing.assert_allclose(timesteps, expected, atol=1e-9)
        logs = np.interp(expected, np.arange(1000), np.log(TABLE))
        np.testing.assert_allclose(ve, [*np.exp(logs), 0], rtol=1e-6)
    for timesteps, ve in grids(steps, timestep_spacing="simple"):
        expected = [len(TABLE) - (1 + int(k * (len(TABLE) / steps))) for k in range(steps)]
        np.testing.assert_array_equal(timesteps, expected)
        np.testing.assert_allclose(ve, [*TABLE[expected], 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("karras", lambda high, low, at: (high ** (1 / 7) + at * (low ** (1 / 7) - high ** (1 / 7))) ** 7),
        ("exponential", lambda high, low, at: high * (low / high) ** at),
        ("beta", lambda high, low, at: low + (high - low) * scipy.stats.beta.ppf(1 - at, 0.6, 0.6)),
    ],
)
def test_curves_run_from_the_first_to_the_last_level_of_training(name, formula):
    for timesteps, ve in grids(9, **{f"use_{name}_sigmas": True}):
        np.testing.assert_allclose(ve, [*formula(TABLE[-1], TABLE[0], np.linspace(0, 1, 9)), 0], rtol=1e-6)
        np.testing.assert_allclose(TABLE[np.round(timesteps).astype(int)], ve[:-1], rtol=0.2)
        assert (timesteps[0], timesteps[-1]) == (999, 0)
