"""The samplers by name, with the scheduler options that each reads."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.draw import solvers, stochastic_solvers
from sdjax.draw.levels import Task
from sdjax.draw.solvers import Entry


class Sampler(NamedTuple):
    """One sampler.

    entries: the solver. options: the options of the scheduler class in diffusers, with the defaults of that class.
    scaled_start: whether the sigma of the first level scales the initial noise; with timesteps spaced "leading" it
    never does.
    """

    entries: Callable[[Task], Iterator[Entry]]
    options: Mapping[str, Any]
    scaled_start: bool = False


ONLY = {
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "timestep_type": "discrete",
    "predict_x0": True,
    "sigma_min": None,
    "sigma_max": None,
    "variance_type": None,
}
"""Scheduler options with the only value that is supported. Only scheduler classes with Karras sigmas have them."""

_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_KARRAS = {"use_karras_sigmas": False}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SOLVER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_DPMPP = {
    **(_LINSPACE | _KARRAS | _ZERO_SNR | _THRESHOLD | _SOLVER),
    "solver_type": "midpoint",
    "euler_at_final": False,
    "lambda_min_clipped": -np.inf,
    "beta_schedule": "linear",
}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(
        solvers.ddim,
        {
            **(_LEADING | _ZERO_SNR | _THRESHOLD),
            "set_alpha_to_one": True,
            "clip_sample": True,
            "clip_sample_range": 1.0,
        },
    ),
    "pndm": Sampler(solvers.pndm, {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False}),
    "lms": Sampler(solvers.lms, {**_LINSPACE, **_KARRAS}, scaled_start=True),
    "heun": Sampler(
        solvers.heun, {**_LINSPACE, **_KARRAS, "clip_sample": False, "clip_sample_range": 1.0}, scaled_start=True
    ),
    "euler": Sampler(
        solvers.euler,
        {**(_LINSPACE | _KARRAS | _ZERO_SNR), "interpolation_type": "linear", "final_sigmas_type": "zero"},
        scaled_start=True,
    ),
    "euler_a": Sampler(stochastic_solvers.euler_ancestral, {**_LINSPACE, **_ZERO_SNR}, scaled_start=True),
    "dpmpp_2m": Sampler(solvers.dpmpp_2m, _DPMPP),
    "dpmpp_2m_sde": Sampler(solvers.dpmpp_2m_sde, _DPMPP),
    "unipc": Sampler(
        solvers.unipc,
        {**(_LINSPACE | _KARRAS | _ZERO_SNR | _THRESHOLD | _SOLVER), "solver_type": "bh2", "disable_corrector": []},
    ),
    "lcm": Sampler(
        stochastic_solvers.lcm,
        {
            **(_ZERO_SNR | _THRESHOLD),
            "clip_sample": False,
            "clip_sample_range": 1.0,
            "set_alpha_to_one": True,
            "original_inference_steps": 50,
            "timestep_scaling": 10.0,
        },
    ),
}
