"""The noise schedule: how images are noised, what the model is asked for, and what each timestep weighs in the loss.

Everywhere `x_t = alpha_t x_0 + sigma_t eps` with `alpha_t^2 = alphas_cumprod[t]` and `alpha_t^2 + sigma_t^2 = 1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sdjax.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# What a scheduler config without a `_class_name` is completed with: the one Stable Diffusion 1 was published with.
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

# What diffusers' classes take for what their config leaves out.
_WIDE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
_BETA_DEFAULTS = {
    "DDIMScheduler": _WIDE,
    "DDPMScheduler": _WIDE,
    "DEISMultistepScheduler": _WIDE,
    "DPMSolverMultistepScheduler": _WIDE,
    "DPMSolverSinglestepScheduler": _WIDE,
    "EulerAncestralDiscreteScheduler": _WIDE,
    "EulerDiscreteScheduler": _WIDE,
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "LCMScheduler": _NARROW | {"beta_schedule": "scaled_linear"},
    "LMSDiscreteScheduler": _WIDE,
    "PNDMScheduler": _WIDE,
    "TCDScheduler": _NARROW | {"beta_schedule": "scaled_linear"},
    "UniPCMultistepScheduler": _WIDE,
}


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A model's noise schedule over T training timesteps.

    Both arrays are float32 [T]. `alphas_cumprod` is after the zero-terminal-SNR rescale where the config asks for it
    (its last entry is then exactly 0), `betas` before it. `config` is the scheduler config: samplers read it too.
    """

    alphas_cumprod: np.ndarray
    betas: np.ndarray
    prediction_type: str
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Read a diffusers scheduler_config.json; a dict without `_class_name` is completed with Stable Diffusion 1's.

        Raises ConfigError for a beta schedule, prediction type or scheduler class that is not known.
        """
        if "_class_name" not in config:
            config = STABLE_DIFFUSION | dict(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        betas = _betas(config)
        used = rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
        return cls(_cumprod(1 - used), betas, prediction_type, config)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(alphas_cumprod) so that the last timestep is pure noise and the first stays (host side).

    betas [T] -> betas [T], the last exactly 1. Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
    Flawed", algorithm 1.
    """
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def snr(schedule: NoiseSchedule, timesteps: Int[Array, " B"]) -> Float[Array, " B"]:
    """Signal-to-noise ratio alpha^2 / sigma^2 of each timestep; 0 at a zero-SNR end."""
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def add_noise(
    schedule: NoiseSchedule,
    latents: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    timesteps: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """Noised latents `alpha latents + sigma noise`, in the latents' dtype (Ho et al. 2020, equation 4)."""
    alpha, sigma = _levels(schedule, timesteps)
    return _combine(alpha, latents, sigma, noise)


def target(
    schedule: NoiseSchedule,
    latents: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    timesteps: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """What the model should answer: the noise, `alpha noise - sigma latents` (Salimans & Ho 2022) or the latents."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return latents
    alpha, sigma = _levels(schedule, timesteps)
    return _combine(-sigma, latents, alpha, noise)


def to_denoised(
    output: Float[Array, "B ..."],
    x: Float[Array, "B ..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    prediction_type: str,
) -> Float[Array, "B ..."]:
    """The clean latents that a model output for `x = alpha x0 + sigma eps` implies; in x's dtype.

    alpha, sigma: scalars or [B]. An epsilon model says nothing about x0 at alpha = 0: there alpha counts as 2^-12, as
    in diffusers, so that the answer stays finite.
    """
    if prediction_type == "sample":
        return output.astype(x.dtype)
    if prediction_type == "v_prediction":
        return _combine(alpha, x, -sigma, output)
    if prediction_type == "epsilon":
        divisor = jnp.where(alpha > 0, alpha, 2.0**-12)
        return _combine(1 / divisor, x, -sigma / divisor, output)
    raise ConfigError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def loss_weight(
    schedule: NoiseSchedule,
    timesteps: Int[Array, " B"],
    *,
    min_snr_gamma: float | None = None,
    debiased: bool = False,
) -> Float[Array, " B"]:
    """Weight of each example's squared error, float32; ones when nothing is asked for.

    min_snr_gamma (Hang et al. 2023, section 3.4; 5 is usual): sample `min(snr, g)`, epsilon that over snr (1 at
    snr = 0, its limit), v that over snr + 1. debiased (Yu et al. 2024): epsilon `1 / sqrt(min(snr, 1000))` (0 at
    snr = 0, where the image cannot be seen), v `1 / (snr + 1)` as kohya has it, sample `sqrt(min(snr, 1000))`.
    Raises ConfigError for both at once or a gamma that is not positive.
    """
    if min_snr_gamma is not None and debiased:
        raise ConfigError("min_snr_gamma and debiased both weigh the timesteps: choose one")
    if min_snr_gamma is not None and not min_snr_gamma > 0:
        raise ConfigError(f"min_snr_gamma {min_snr_gamma} must be positive (5 is usual)")
    ratio = snr(schedule, timesteps)
    safe_ratio = jnp.where(ratio > 0, ratio, 1.0)
    if min_snr_gamma is not None:
        capped = jnp.minimum(ratio, min_snr_gamma)
        weights = {
            "epsilon": jnp.where(ratio > 0, capped / safe_ratio, 1.0),
            "v_prediction": capped / (ratio + 1),
            "sample": capped,
        }
    elif debiased:
        root = jnp.sqrt(jnp.minimum(safe_ratio, 1000.0))
        weights = {
            "epsilon": jnp.where(ratio > 0, 1 / root, 0.0),
            "v_prediction": 1 / (ratio + 1),
            "sample": jnp.where(ratio > 0, root, 0.0),
        }
    else:
        return jnp.ones_like(ratio)
    return weights[schedule.prediction_type]


def rescale_guidance(
    cond: Float[Array, "B ..."], guided: Float[Array, "B ..."], phi: float | Float[Array, ""]
) -> Float[Array, "B ..."]:
    """Bring the guided prediction's spread back towards the conditional one's, by phi in [0, 1] (0: not at all).

    Lin et al. 2023, section 3.4, equations 15 and 16; the standard deviations are each image's own.
    """
    axes = tuple(range(1, cond.ndim))
    ratio = jnp.std(cond, axis=axes, keepdims=True) / jnp.std(guided, axis=axes, keepdims=True)
    phi = jnp.asarray(phi, guided.dtype)
    return guided * (phi * ratio + (1 - phi))


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """float32 [T]; rounded where diffusers rounds, since an error in 1 - beta grows over a thousand products."""
    if (trained := config.get("trained_betas")) is not None:
        return np.asarray(trained, np.float32)
    given = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule") if key in config}
    if len(given) < 3:
        if config["_class_name"] not in _BETA_DEFAULTS:
            raise ConfigError(f"scheduler {config['_class_name']!r} is not one of {', '.join(_BETA_DEFAULTS)}")
        given = _BETA_DEFAULTS[config["_class_name"]] | given
    start, end, kind = given["beta_start"], given["beta_end"], given["beta_schedule"]
    count = config.get("num_train_timesteps", 1000)
    if kind == "linear":
        return np.linspace(start, end, count, dtype=np.float32)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count, dtype=np.float32) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, equation 17
        alpha_bar = np.cos((np.linspace(0, 1, count + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)
    raise ConfigError(f"beta_schedule {kind!r} is not one of linear, scaled_linear, squaredcos_cap_v2")


def _cumprod(alphas: np.ndarray) -> np.ndarray:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _levels(schedule: NoiseSchedule, timesteps: Int[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """alpha and sigma of each timestep, float32."""
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def _combine(
    a: Float[Array, "..."], x: Float[Array, "B ..."], b: Float[Array, "..."], y: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """a x + b y in float32, with scalars or one factor an example, returned in x's dtype."""
    a, b = (jnp.reshape(factor, (-1,) + (1,) * (x.ndim - 1)) for factor in (a, b))
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)
