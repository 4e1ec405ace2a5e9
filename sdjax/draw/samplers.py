"""The samplers by name, with the scheduler options that each reads."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.draw import solvers, stochastic_solvers
from sdjax.draw.levels import CURVES, TIMESTEP_SPACINGS, Task
from sdjax.draw.solvers import Entry


class Sampler(NamedTuple):
    """One sampler.

    entries: the solver. options: the options of the scheduler class in diffusers, with the defaults of that class.
    curves: whether the sampler takes any noise levels, so that `levels.CURVES` can space them.
    scaled_start: whether the sigma of the first level scales the initial noise; with timesteps spaced "leading" it
    never does. evaluations: of the denoiser in a step, except that the last step often needs only one.
    """

    entries: Callable[[Task], Iterator[Entry]]
    options: Mapping[str, Any]
    curves: bool = False
    scaled_start: bool = False
    evaluations: int = 1

    @property
    def spacings(self) -> tuple[str, ...]:
        """The spacings that the sampler takes."""
        of_timesteps = TIMESTEP_SPACINGS if "timestep_spacing" in self.options else ()
        return of_timesteps + (tuple(CURVES) if self.curves else ())


ONLY = {
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "timestep_type": ("discrete",),
    "predict_x0": (True,),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
}
"""Scheduler options with the values that are supported. Only classes with Karras sigmas have them."""

_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_CURVES = {f"use_{name}_sigmas": False for name in CURVES}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_NO_CLIP = {"clip_sample": False, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_SOLVER = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_MULTISTEP = _LINSPACE | _CURVES | _ZERO_SNR | _THRESHOLD | _SOLVER
_DPMPP = {
    **_MULTISTEP,
    "solver_type": "midpoint",
    "euler_at_final": False,
    "lambda_min_clipped": -np.inf,
    "beta_schedule": "linear",
}
_K_DIFFUSION = _LINSPACE | _CURVES | _ZERO_SNR  # of the samplers that diffusers lacks
_CONSISTENCY = {**_ZERO_SNR, "set_alpha_to_one": True, "original_inference_steps": 50}

_levels = functools.partial(Sampler, curves=True, scaled_start=True)
_two_levels = functools.partial(_levels, evaluations=2)

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(solvers.ddim, _LEADING | _ZERO_SNR | _THRESHOLD | _CLIP | {"set_alpha_to_one": True}),
    "ddpm": Sampler(
        stochastic_solvers.ddpm, _LEADING | _ZERO_SNR | _THRESHOLD | _CLIP | {"variance_type": "fixed_small"}
    ),
    "pndm": Sampler(solvers.pndm, {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False}),
    "lms": _levels(solvers.lms, _LINSPACE | _CURVES),
    "heun": _two_levels(solvers.heun, _LINSPACE | _CURVES | _NO_CLIP),
    "euler": _levels(
        solvers.euler,
        {**(_LINSPACE | _CURVES | _ZERO_SNR), "interpolation_type": "linear", "final_sigmas_type": "zero"},
    ),
    "euler_a": _levels(stochastic_solvers.euler_ancestral, _LINSPACE | _ZERO_SNR),
    "dpm2": _two_levels(solvers.dpm2, _LINSPACE | _CURVES),
    "dpm2_a": _two_levels(solvers.dpm2_ancestral, _LINSPACE | _CURVES),
    "dpmpp_2m": Sampler(solvers.dpmpp_2m, _DPMPP, curves=True),
    "dpmpp_2m_sde": Sampler(solvers.dpmpp_2m_sde, _DPMPP, curves=True),
    "dpmpp_3m_sde": _levels(stochastic_solvers.dpmpp_3m_sde, _K_DIFFUSION),
    "dpmpp_sde": _two_levels(stochastic_solvers.dpmpp_sde, _K_DIFFUSION),
    "dpmpp_2s_a": _two_levels(stochastic_solvers.dpmpp_2s_ancestral, _K_DIFFUSION),
    "unipc": Sampler(solvers.unipc, {**_MULTISTEP, "solver_type": "bh2", "disable_corrector": []}, curves=True),
    "restart": _two_levels(stochastic_solvers.restart, _K_DIFFUSION),
    "er_sde": _levels(stochastic_solvers.er_sde, _K_DIFFUSION),
    "lcm": Sampler(stochastic_solvers.lcm, _CONSISTENCY | _THRESHOLD | _NO_CLIP | {"timestep_scaling": 10.0}),
    "tcd": Sampler(stochastic_solvers.tcd, _CONSISTENCY),
}
