"""The diffusion process: noise schedules, noised latents, training targets, losses and their weights.

In all functions `x_t = alpha_t x_0 + sigma_t eps` with `alpha_t^2 = alphas_cumprod[t]` and `alpha_t^2 + sigma_t^2 = 1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

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
"""The values that complete a scheduler config without `_class_name`: those of Stable Diffusion 1."""

_WIDE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
BETA_DEFAULTS = {
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
"""Scheduler class of diffusers -> its defaults for the betas."""

RESCALING = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""The scheduler classes of diffusers that have `rescale_betas_zero_snr`. The others draw with the betas as they are."""


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A model's noise schedule over T training timesteps.

    alphas_cumprod: float32 [T]. If the config has the rescale to zero terminal SNR, they are the rescaled ones, and the
    last is exactly 0. betas: float32 [T], before the rescale. prediction_type: what the model predicts, see `target`.
    config: the scheduler config, which samplers also read.
    """

    alphas_cumprod: np.ndarray
    betas: np.ndarray
    prediction_type: str
    config: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads a `scheduler_config.json` of diffusers; `STABLE_DIFFUSION` completes one without `_class_name`.

        Raises ConfigError for an unknown beta schedule, prediction type or scheduler class.
        """
        if "_class_name" not in config:
            config = STABLE_DIFFUSION | dict(config)
        prediction_type = config.get("prediction_type", "epsilon")
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        betas = _betas(config)
        used = rescale_zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas
        return cls(_cumprod(1 - used), betas, prediction_type, config)


def altered(schedule: NoiseSchedule, *, prediction_type: str = "", zero_terminal_snr: bool = False) -> NoiseSchedule:
    """Returns the schedule with another prediction type (empty: unchanged), rescaled to zero terminal SNR, or both.

    The scheduler config changes too, for sampling and export. With zero terminal SNR its timestep spacing becomes
    "trailing", so that sampling starts at pure noise (Lin et al. 2023, section 3.3), and a class that is not in
    `RESCALING` becomes DDIMScheduler. Raises ConfigError for an unknown prediction type, and for epsilon with zero
    terminal SNR: in pure noise, the noise tells nothing about the image.
    """
    prediction_type = prediction_type or schedule.prediction_type
    rescaled = zero_terminal_snr or bool(schedule.config.get("rescale_betas_zero_snr"))
    if not zero_terminal_snr and prediction_type == schedule.prediction_type:
        return schedule
    if rescaled and prediction_type == "epsilon":
        raise ConfigError("zero terminal SNR cannot be learnt with prediction_type 'epsilon': use 'v_prediction'")
    config = {**schedule.config, "prediction_type": prediction_type}
    if zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        name = config["_class_name"].removeprefix("Flax")
        if name not in RESCALING:
            implied = {**BETA_DEFAULTS.get(name, {}), "clip_sample": False, "set_alpha_to_one": False}
            config = implied | config | {"_class_name": "DDIMScheduler"}
    return NoiseSchedule.from_config(config)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Returns betas [T] with which the last timestep is pure noise and the first is unchanged; the last beta is 1.

    `sqrt(alphas_cumprod)` is shifted and scaled. Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample
    Steps are Flawed", algorithm 1. Computed on the host.
    """
    root = np.sqrt(_cumprod(1 - betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return 1 - np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def snr(schedule: NoiseSchedule, timesteps: Int[Array, " B"]) -> Float[Array, " B"]:
    """Returns the signal-to-noise ratio alpha^2 / sigma^2 of each timestep; 0 where alpha is 0."""
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def is_used(strength: float | Float[Array, ""]) -> bool:
    """Whether an option is used. 0 is off. An array counts as used, because only the device knows its value."""
    return isinstance(strength, jax.Array) or bool(strength)


def noise(
    key: PRNGKeyArray,
    shape: tuple[int, int, int],
    *,
    offset: float | Float[Array, ""] = 0.0,
    multires_iterations: int = 0,
    multires_discount: float = 0.3,
) -> Float[Array, "h w C"]:
    """Returns the noise of one example, float32 [h, w, C]: normal numbers of unit variance, with options.

    offset: adds `offset` times one normal number for each channel (Guttenberg 2023, "Diffusion with Offset Noise"). The
    standard deviation becomes sqrt(1 + offset^2).
    multires_iterations: adds this number of octaves (Whitaker 2023, "Multi-Resolution Noise for Diffusion Model
    Training"). Octave i is normal noise of h // 2^i x w // 2^i, enlarged linearly, times multires_discount^i; octaves
    end when a side is 1. The sum is divided by its standard deviation. This is `pyramid_noise_like` of kohya's scripts
    for a batch of one, with one difference: kohya makes each octave smaller by a random factor of 2 to 4, not by 2.
    Random sizes would need a compilation each.
    """
    if not is_used(offset) and not multires_iterations:
        return jax.random.normal(key, shape, jnp.float32)
    keys = jax.random.split(key, 2 + multires_iterations)
    total = jax.random.normal(keys[0], shape, jnp.float32)
    if is_used(offset):
        total += offset * jax.random.normal(keys[1], (1, 1, shape[2]), jnp.float32)
    if not multires_iterations:
        return total
    for i in range(multires_iterations):
        height, width = (max(1, side >> i) for side in shape[:2])
        octave = jax.random.normal(keys[2 + i], (height, width, shape[2]), jnp.float32)
        total += multires_discount**i * jax.image.resize(octave, shape, "linear")
        if 1 in (height, width):
            break
    return total / jnp.std(total, ddof=1)


def draw_timestep(
    key: PRNGKeyArray,
    low: int,
    high: int,
    *,
    bias: str = "none",
    multiplier: float = 1.0,
    portion: float = 0.25,
) -> Int[Array, ""]:
    """Returns a random timestep for one example, from low to high - 1, int32.

    bias: "none": all timesteps are equally likely. "earlier" (nearer to the image) or "later": the first or last
    `portion` of the timesteps (rounded down) is `multiplier` times as likely as the rest. The SDXL training script of
    diffusers does the same, without low and high. Raises ConfigError for another bias.
    """
    if bias == "none":
        return jax.random.randint(key, (), low, high)
    weights = np.ones(high - low, np.float32)
    favoured = int(portion * len(weights))
    if bias == "earlier":
        weights[:favoured] *= multiplier
    elif bias == "later":
        weights[len(weights) - favoured :] *= multiplier
    else:
        raise ConfigError(f"timestep_bias {bias!r} is not one of none, earlier, later")
    return jax.random.choice(key, jnp.arange(low, high, dtype=jnp.int32), p=jnp.asarray(weights / weights.sum()))


def add_noise(
    schedule: NoiseSchedule,
    latents: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    timesteps: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """Returns the noised latents `alpha latents + sigma noise`, in their dtype (Ho et al. 2020, equation 4)."""
    alpha, sigma = levels(schedule, timesteps)
    return _combine(alpha, latents, sigma, noise)


def target(
    schedule: NoiseSchedule,
    latents: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    timesteps: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """Returns what the model should predict: the noise (epsilon), the latents (sample), or the velocity (v_prediction).

    The velocity is `alpha noise - sigma latents` (Salimans & Ho 2022).
    """
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return latents
    alpha, sigma = levels(schedule, timesteps)
    return _combine(-sigma, latents, alpha, noise)


def to_denoised(
    output: Float[Array, "B ..."],
    x: Float[Array, "B ..."],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    prediction_type: str,
) -> Float[Array, "B ..."]:
    """Returns the clean latents x0 implied by the output of a model for `x = alpha x0 + sigma eps`, in the dtype of x.

    alpha, sigma: scalars or [B]. At alpha = 0 the output of an epsilon model implies nothing about x0. There 2^-12 is
    used for alpha, as in diffusers, so that the result is finite. Raises ConfigError for an unknown prediction type.
    """
    if prediction_type == "sample":
        return output.astype(x.dtype)
    if prediction_type == "v_prediction":
        return _combine(alpha, x, -sigma, output)
    if prediction_type == "epsilon":
        divisor = jnp.where(alpha > 0, alpha, 2.0**-12)
        return _combine(1 / divisor, x, -sigma / divisor, output)
    raise ConfigError(f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


def distance(
    output: Float[Array, "B ..."], target: Float[Array, "B ..."], kind: str, c: Float[Array, " B"]
) -> Float[Array, "B ..."]:
    """Returns the distance of each number of the output from the target, float32; d is their difference.

    kind: "l2": d^2. "l1": |d|. "huber": kohya's pseudo-Huber distance `2c (sqrt(d^2 + c^2) - c)`, which is about d^2
    for d far below c, and about 2c |d| for d far above. c: positive, from `huber_threshold`; only "huber" uses it.
    Raises ConfigError for another kind.
    """
    difference = output.astype(jnp.float32) - target.astype(jnp.float32)
    if kind == "l2":
        return jnp.square(difference)
    if kind == "l1":
        return jnp.abs(difference)
    if kind == "huber":
        c = jnp.reshape(c, (-1,) + (1,) * (difference.ndim - 1))
        square = jnp.square(difference)
        # The same without the difference of two numbers that are nearly equal.
        return 2 * c * square / (jnp.sqrt(square + jnp.square(c)) + c)
    raise ConfigError(f"loss {kind!r} is not one of l2, l1, huber")


def huber_threshold(
    schedule: NoiseSchedule, timesteps: Int[Array, " B"], c: float | Float[Array, ""], kind: str
) -> Float[Array, " B"]:
    """Returns the c of `distance` for each example, at which the distance turns from squared to absolute; float32.

    c: in (0, 1]. kind: "constant": c. "exponential": c^(t / T), which is 1 at the image and c at the noise. "snr":
    `(1 - c) / (1 + s)^2 + c` with s = sqrt(1 / alphas_cumprod - 1), with the same ends; c where alphas_cumprod is 0.
    Sources: kohya's sd-scripts since 0.9, with `huber_scale` = 1; Khrapov et al. 2024, "Improving Diffusion Models's
    Data-Corruption Resistance using Scheduled Pseudo-Huber Loss". Raises ConfigError for another kind.
    """
    if kind == "constant":
        return jnp.full(timesteps.shape, c, jnp.float32)
    if kind == "exponential":
        log_c = jnp.log(c) if isinstance(c, jax.Array) else float(np.log(c))
        return jnp.exp(log_c / len(schedule.alphas_cumprod) * timesteps.astype(jnp.float32))
    if kind == "snr":
        alpha, sigma = levels(schedule, timesteps)
        return (1 - c) * jnp.square(alpha / (alpha + sigma)) + c
    raise ConfigError(f"huber_schedule {kind!r} is not one of constant, exponential, snr")


def loss_weight(
    schedule: NoiseSchedule,
    timesteps: Int[Array, " B"],
    *,
    min_snr_gamma: float | Float[Array, ""] | None = None,
    debiased: bool = False,
) -> Float[Array, " B"]:
    """Returns the weight of each example's loss, float32; ones without options.

    min_snr_gamma: g of Hang et al. 2023, section 3.4; 5 is usual. An array may also be 0, which gives ones. The weights
    by prediction type:
        sample: min(snr, g)
        epsilon: min(snr, g) / snr, and 1 at snr = 0, which is the limit
        v_prediction: min(snr, g) / (snr + 1), which is 0 at the last timestep with zero terminal SNR
    debiased: as in Yu et al. 2024, for v_prediction as in kohya's scripts. The weights by prediction type:
        sample: sqrt(min(snr, 1000))
        epsilon: 1 / sqrt(min(snr, 1000)), and 0 at snr = 0, where nothing of the image is visible
        v_prediction: 1 / (min(snr, 1000) + 1)
    Raises ConfigError for both options at once, and for a gamma that is not positive.
    """
    if min_snr_gamma is not None and debiased:
        raise ConfigError("min_snr_gamma and debiased both weigh the timesteps: choose one")
    given = isinstance(min_snr_gamma, jax.Array)
    if min_snr_gamma is not None and not given and not min_snr_gamma > 0:
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
            "v_prediction": 1 / (jnp.minimum(ratio, 1000.0) + 1),
            "sample": jnp.where(ratio > 0, root, 0.0),
        }
    else:
        return jnp.ones_like(ratio)
    chosen = weights[schedule.prediction_type]
    return jnp.where(min_snr_gamma > 0, chosen, 1.0) if given else chosen


def rescale_guidance(
    cond: Float[Array, "B ..."], guided: Float[Array, "B ..."], phi: float | Float[Array, ""]
) -> Float[Array, "B ..."]:
    """Returns the guided prediction with its standard deviation moved towards that of the conditional prediction.

    phi: in [0, 1]; 0 changes nothing. The standard deviations are those of each image. For a guided
    prediction of standard deviation 0, as of a model whose last layer starts as zeros, the result is finite.
    Source: Lin et al. 2023, section 3.4, equations 15 and 16.
    """
    axes = tuple(range(1, cond.ndim))
    spread = jnp.std(guided, axis=axes, keepdims=True)
    ratio = jnp.std(cond, axis=axes, keepdims=True) / jnp.where(spread > 0, spread, jnp.ones_like(spread))
    phi = jnp.asarray(phi, guided.dtype)
    return guided * (phi * ratio + (1 - phi))


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """Returns the betas of a scheduler config, float32 [T].

    They are rounded in the same places as in diffusers, because an error in 1 - beta grows over a thousand products.
    """
    if (trained := config.get("trained_betas")) is not None:
        return np.asarray(trained, np.float32)
    options = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule") if key in config}
    if len(options) < 3:
        if config["_class_name"] not in BETA_DEFAULTS:
            raise ConfigError(f"scheduler {config['_class_name']!r} is not one of {', '.join(BETA_DEFAULTS)}")
        options = BETA_DEFAULTS[config["_class_name"]] | options
    start, end, kind = options["beta_start"], options["beta_end"], options["beta_schedule"]
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


def levels(schedule: NoiseSchedule, timesteps: Int[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Returns alpha and sigma of each timestep, float32."""
    alphas_cumprod = jnp.asarray(schedule.alphas_cumprod)[timesteps]
    return jnp.sqrt(alphas_cumprod), jnp.sqrt(1 - alphas_cumprod)


def _combine(
    a: Float[Array, "..."], x: Float[Array, "B ..."], b: Float[Array, "..."], y: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Returns `a x + b y`, computed in float32, in the dtype of x. a, b: scalars, or one number for each example."""
    a, b = (jnp.reshape(factor, (-1,) + (1,) * (x.ndim - 1)) for factor in (a, b))
    return (a * x.astype(jnp.float32) + b * y.astype(jnp.float32)).astype(x.dtype)
