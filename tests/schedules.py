"""Scheduler configs as published, and the latents and keys that the tests of the samplers share."""

import jax
import numpy as np

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
CONFIGS = {
    "sd1": BETAS
    | {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sd2v": BETAS
    | {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
    "sdxl": BETAS
    | {
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": False,
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    "emoji": BETAS
    | {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "dynamic_thresholding_ratio": 0.995,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": False,
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "leading",
        "trained_betas": None,
    },
}
CURVED = ("lms", "heun", "euler", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
"""The samplers whose scheduler class in diffusers has Karras, exponential and beta sigmas."""

SHAPE = (2, 3, 5, 4)  # [B, H, W, C]
_random = np.random.default_rng(0)
NOISE, IMAGE = (_random.standard_normal((2, *SHAPE)) * [[[[[1.0]]]], [[[[0.7]]]]]).astype(np.float32)
MIX = (_random.standard_normal((4, 4)) / 2).astype(np.float32)


def keys_of(count):
    return jax.random.split(jax.random.key(7), count)
