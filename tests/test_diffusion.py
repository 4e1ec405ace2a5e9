"""The noise schedule against the formulas, written again in NumPy, and against diffusers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax import diffusion
from sdjax.diffusion import NoiseSchedule
from sdjax.errors import ConfigError

SD = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample")
TIMESTEPS = jnp.asarray([0, 1, 250, 700, 998, 999])


def schedule_of(prediction_type="epsilon", zero_snr=False):
    return NoiseSchedule.from_config(SD | {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr})


def normal(seed, shape=(6, 4, 4, 4)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules_match_diffusers(kind, zero_snr):
    import diffusers
    import torch

    config = SD | {"beta_schedule": kind, "rescale_betas_zero_snr": zero_snr, "num_train_timesteps": 900}
    ours, theirs = NoiseSchedule.from_config(config), diffusers.DDIMScheduler.from_config(config)
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=2e-6, atol=1e-9)
    latents, noise, timesteps = normal(0), normal(1), np.array([0, 1, 250, 700, 898, 899])
    tensors = torch.tensor(np.asarray(latents)), torch.tensor(np.asarray(noise)), torch.tensor(timesteps)
    noised = diffusion.add_noise(ours, latents, noise, jnp.asarray(timesteps))
    np.testing.assert_allclose(noised, theirs.add_noise(*tensors).numpy(), atol=1e-5)
    velocity = diffusion.target(
        NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"}), latents, noise, jnp.asarray(timesteps)
    )
    np.testing.assert_allclose(velocity, theirs.get_velocity(*tensors).numpy(), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(diffusion._BETA_DEFAULTS))
def test_missing_betas_are_those_of_the_named_class(name):
    import diffusers

    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: accepted[key].default for key in ("beta_start", "beta_end", "beta_schedule")}
    np.testing.assert_array_equal(
        NoiseSchedule.from_config({"_class_name": name}).betas,
        NoiseSchedule.from_config({"_class_name": "DDIMScheduler"} | defaults).betas,
    )


@pytest.mark.parity
def test_rescaled_guidance_matches_diffusers():
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    cond, guided = normal(0), 5 * normal(1) + 1
    expected = rescale_noise_cfg(torch.tensor(np.asarray(guided)), torch.tensor(np.asarray(cond)), 0.7)
    np.testing.assert_allclose(diffusion.rescale_guidance(cond, guided, 0.7), expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(diffusion.rescale_guidance(cond, guided, 0.0), guided)


def test_a_config_without_a_class_is_stable_diffusion_1():
    schedule = NoiseSchedule.from_config({})
    assert schedule.alphas_cumprod.dtype == np.float32
    assert schedule.alphas_cumprod[0] == pytest.approx(0.99915, abs=1e-6)
    assert schedule.alphas_cumprod[-1] == pytest.approx(0.0046600, abs=1e-6)
    assert (schedule.config["clip_sample"], schedule.config["steps_offset"]) == (False, 1)
    assert NoiseSchedule.from_config({"prediction_type": "v_prediction"}).prediction_type == "v_prediction"


def test_trained_betas_come_before_the_formula():
    betas = np.linspace(0.001, 0.02, 300)
    schedule = NoiseSchedule.from_config(SD | {"trained_betas": betas.tolist()})
    np.testing.assert_allclose(schedule.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"beta_schedule": "sigmoid"}, ["'sigmoid'", "linear, scaled_linear, squaredcos_cap_v2"]),
        ({"prediction_type": "flow_prediction"}, ["'flow_prediction'", "epsilon, v_prediction, sample"]),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, ["FlowMatchEuler", "DDIMScheduler"]),
    ],
)
def test_unknown_values_are_named(config, names):
    with pytest.raises(ConfigError) as raised:
        NoiseSchedule.from_config(config)
    for name in names:
        assert name in str(raised.value)


def test_zero_terminal_snr_keeps_the_start_and_empties_the_end():
    plain, rescaled = schedule_of(), schedule_of(zero_snr=True)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-6)
    assert (np.diff(rescaled.alphas_cumprod) < 0).all()
    np.testing.assert_array_equal(rescaled.betas, plain.betas)
    # algorithm 1 is affine in sqrt(alphas_cumprod)
    before, after = np.sqrt(plain.alphas_cumprod.astype(np.float64)), np.sqrt(rescaled.alphas_cumprod)
    np.testing.assert_allclose(after, (before - before[-1]) * before[0] / (before[0] - before[-1]), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    zero_snr=st.booleans(),
    timestep=st.integers(0, 999),
    seed=st.integers(0, 2**31),
    size=st.floats(0.1, 10),
)
def test_the_target_denoises_the_noised_latents(kind, zero_snr, timestep, seed, size):
    schedule = schedule_of(kind, zero_snr)
    latents, noise = size * normal(seed, (2, 3, 3, 4)), normal(seed + 1, (2, 3, 3, 4))
    timesteps = jnp.full((2,), timestep)
    x = diffusion.add_noise(schedule, latents, noise, timesteps)
    output = diffusion.target(schedule, latents, noise, timesteps)
    alpha = jnp.sqrt(jnp.asarray(schedule.alphas_cumprod)[timesteps])
    sigma = jnp.sqrt(1 - alpha**2)
    denoised = diffusion.to_denoised(output, x, alpha, sigma, kind)
    if kind == "epsilon" and alpha[0] == 0:
        assert np.isfinite(denoised).all()  # nothing of the image is left to find
    else:
        np.testing.assert_allclose(denoised, latents, atol=2e-6 * (1 + size) / (alpha[0] if kind == "epsilon" else 1))
    one_level = diffusion.to_denoised(output, x, alpha[0], sigma[0], kind)
    np.testing.assert_array_equal(one_level, denoised)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_snr_is_alpha_squared_over_sigma_squared(zero_snr):
    schedule = schedule_of(zero_snr=zero_snr)
    alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)[np.asarray(TIMESTEPS)]
    np.testing.assert_allclose(diffusion.snr(schedule, TIMESTEPS), alphas_cumprod / (1 - alphas_cumprod), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights(kind, gamma):
    schedule = schedule_of(kind)
    snr = np.asarray(diffusion.snr(schedule, TIMESTEPS), np.float64)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    weights = diffusion.loss_weight(schedule, TIMESTEPS, min_snr_gamma=gamma)
    np.testing.assert_allclose(weights, np.minimum(snr, gamma) / divisor, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_debiased_weights(kind):
    schedule = schedule_of(kind)
    snr = np.asarray(diffusion.snr(schedule, TIMESTEPS), np.float64)
    assert snr.max() > 1000
    root = np.sqrt(np.minimum(snr, 1000))
    expected = {"epsilon": 1 / root, "v_prediction": 1 / (snr + 1), "sample": root}[kind]
    np.testing.assert_allclose(diffusion.loss_weight(schedule, TIMESTEPS, debiased=True), expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "at_zero"), [("epsilon", (1, 0)), ("v_prediction", (0, 1)), ("sample", (0, 0))])
def test_weights_are_defined_at_zero_snr(kind, at_zero):
    schedule, last = schedule_of(kind, zero_snr=True), jnp.asarray([999])
    assert diffusion.loss_weight(schedule, last, min_snr_gamma=5.0) == at_zero[0]
    assert diffusion.loss_weight(schedule, last, debiased=True) == at_zero[1]
    assert diffusion.loss_weight(schedule, last) == 1


@pytest.mark.parametrize("how", [{"min_snr_gamma": 0.0}, {"min_snr_gamma": 5.0, "debiased": True}])
def test_weights_that_make_no_sense_are_refused(how):
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        diffusion.loss_weight(schedule_of(), TIMESTEPS, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_traces_with_traced_timesteps_and_keeps_half_precision(kind):
    schedule = schedule_of(kind)

    @jax.jit
    def train_inputs(latents, noise, timesteps):
        return (
            diffusion.add_noise(schedule, latents, noise, timesteps),
            diffusion.target(schedule, latents, noise, timesteps),
            diffusion.loss_weight(schedule, timesteps, min_snr_gamma=5.0),
        )

    half = train_inputs(normal(0).astype(jnp.bfloat16), normal(1).astype(jnp.bfloat16), TIMESTEPS)
    full = train_inputs(normal(0), normal(1), TIMESTEPS)
    assert [array.dtype for array in half] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for low, high in zip(half, full, strict=True):
        np.testing.assert_allclose(low.astype(jnp.float32), high, atol=0.05)


def test_nothing_asked_weighs_every_timestep_alike():
    np.testing.assert_array_equal(diffusion.loss_weight(schedule_of(), TIMESTEPS), np.ones(6, np.float32))
