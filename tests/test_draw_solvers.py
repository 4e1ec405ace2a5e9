"""The solvers beside their published formulas and beside diffusers' schedulers."""

import functools
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import SCHEDULERS, STOCHASTIC, evaluations_with_noise, parity
from schedules import CONFIGS, CURVED, IMAGE, MIX, NOISE, SHAPE, keys_of
from solver_runs import END, FRESH, denoise, eps_of, evaluations, limited

from sdjax.diffusion import NoiseSchedule, to_denoised
from sdjax.draw import sampling, settings
from sdjax.draw.levels import CURVES, TIMESTEP_SPACINGS
from sdjax.draw.samplers import SAMPLERS

FEWEST = {"dpm2_a": 4}
"""Of fewer steps, diffusers has the level below the next, sqrt(ve_next^2 - up^2), wrong by up to 1.5 % in float32."""
ZERO_SNR = ("ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd")

# Beside the formulas of their docstrings, in float64.


def by_ddim(x, levels):
    for now, then in pairwise(levels):
        denoised = denoise(x, now)
        x = then.alpha * limited(denoised) + then.sigma * eps_of(x, denoised, now)
    return x


def by_plms(x, levels):
    outputs = []

    def transfer(x, slope, now, then):
        return then.alpha * (x / now.alpha + (then.ve - now.ve) * slope)

    first = eps_of(x, limited(denoise(x, levels[0])), levels[0])
    guess = transfer(x, first, *levels[:2])
    second = eps_of(guess, limited(denoise(guess, levels[1])), levels[1])
    x, outputs = transfer(x, (first + second) / 2, *levels[:2]), [first]
    for now, then in pairwise(levels[1:]):
        outputs = [eps_of(x, limited(denoise(x, now)), now), *outputs]
        slope = {
            2: lambda e, e1: (3 * e - e1) / 2,
            3: lambda e, e1, e2: (23 * e - 16 * e1 + 5 * e2) / 12,
            4: lambda e, e1, e2, e3: (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24,
        }[min(len(outputs), 4)](*outputs[:4])
        x = transfer(x, slope, now, then)
    return x


def by_euler(x, levels):
    for now, then in pairwise(levels):
        x = then.alpha * (x / now.alpha + (then.ve - now.ve) * eps_of(x, limited(denoise(x, now)), now))
    return x


def by_heun(x, levels):
    for now, then in pairwise(levels):
        eps = eps_of(x, limited(denoise(x, now)), now)
        euler = then.alpha * (x / now.alpha + (then.ve - now.ve) * eps)
        if then == END:
            return euler
        eps_next = eps_of(euler, limited(denoise(euler, then)), then)
        x = then.alpha * (x / now.alpha + (then.ve - now.ve) * (eps + eps_next) / 2)


def by_dpm2(x, levels):
    for now, middle, then in zip(levels[::2], levels[1::2], [*levels[2::2], END], strict=False):
        eps = eps_of(x, limited(denoise(x, now)), now)
        if middle == END:
            return x / now.alpha - now.ve * eps
        np.testing.assert_allclose(middle.ve, np.sqrt(now.ve * then.ve), rtol=1e-9)
        half = middle.alpha * (x / now.alpha + (middle.ve - now.ve) * eps)
        eps = eps_of(half, limited(denoise(half, middle)), middle)
        x = then.alpha * (x / now.alpha + (then.ve - now.ve) * eps)


def by_lms(x, levels):
    slopes = []
    for i, (now, then) in enumerate(pairwise(levels)):
        slopes = [eps_of(x, limited(denoise(x, now)), now), *slopes][:4]
        past = [at.ve for at in levels[max(i - 3, 0) : i + 1]][::-1]
        total = 0
        for k, slope in enumerate(slopes):
            others = [ve for j, ve in enumerate(past) if j != k]
            antiderivative = np.poly1d(np.poly(others)).integ()  # of the product of (u - ve_j)
            integral = antiderivative(then.ve) - antiderivative(now.ve)
            total = total + integral / np.prod([past[k] - ve for ve in others]) * slope
        x = then.alpha * (x / now.alpha + total)
    return x


def by_dpmpp(x, levels, *, stochastic, heun=False):
    earlier = before = None
    for (now, then), noise in zip(pairwise(levels), FRESH, strict=False):
        denoised = limited(denoise(x, now))
        if then == END:
            return denoised
        h = then.lam - now.lam
        slope = 0 if before is None else (denoised - earlier) * h / (now.lam - before.lam)
        reach = 2 * h if stochastic else h
        factor = 1 - (1 - np.exp(-reach)) / reach if heun else (1 - np.exp(-reach)) / 2
        x = then.sigma / now.sigma * (np.exp(-h) if stochastic else 1) * x
        x = x + then.alpha * ((1 - np.exp(-reach)) * denoised + factor * slope)
        if stochastic:
            x = x + then.sigma * np.sqrt(1 - np.exp(-2 * h)) * noise
        earlier, before = denoised, now


@pytest.mark.parametrize(
    ("sampler", "options", "formula"),
    [
        ("ddim", {}, by_ddim),
        ("pndm", {"skip_prk_steps": True, "set_alpha_to_one": True}, by_plms),
        ("euler", {}, by_euler),
        ("heun", {}, by_heun),
        ("dpm2", {}, by_dpm2),
        ("lms", {}, by_lms),
        ("dpmpp_2m", {"lower_order_final": False}, functools.partial(by_dpmpp, stochastic=False)),
        ("dpmpp_2m_sde", {"lower_order_final": False}, functools.partial(by_dpmpp, stochastic=True)),
        (
            "dpmpp_2m",
            {"lower_order_final": False, "solver_type": "heun"},
            functools.partial(by_dpmpp, stochastic=False, heun=True),
        ),
    ],
)
def test_a_solver_is_its_formula(sampler, options, formula):
    levels, latents, _ = zip(*evaluations(sampler, 6, denoise, **options), strict=True)
    levels = list(dict.fromkeys(levels))  # heun and pndm evaluate at some levels twice
    assert len(levels) == (11 if sampler == "dpm2" else 6)
    expected = formula(NOISE.astype(np.float64), [*levels, END])
    np.testing.assert_allclose(latents[-1], expected, rtol=1e-9, atol=1e-9)


def test_runge_kutta_starts_pndm():
    """The first step of pndm is the classical method of fourth order, along the model's noise."""
    (now, half, _, then, *_), latents, _ = zip(*evaluations("pndm", 6, denoise), strict=True)
    transfer = lambda x, slope, to: to.alpha * (x / now.alpha + (to.ve - now.ve) * slope)
    e = lambda x, at: eps_of(x, limited(denoise(x, at)), at)
    x = NOISE.astype(np.float64)
    e_a = e(x, now)
    e_b = e(transfer(x, e_a, half), half)
    e_c = e(transfer(x, e_b, half), half)
    e_d = e(transfer(x, e_c, then), then)
    np.testing.assert_allclose(latents[3], transfer(x, (e_a + 2 * e_b + 2 * e_c + e_d) / 6, then), rtol=1e-9)


@pytest.mark.parametrize("kind", ["bh1", "bh2"])
def test_unipc_is_exact_for_denoised_latents_that_are_a_parabola(kind):
    """dx / dlam has the solution x_next = sigma_next / sigma x + sigma_next * integral of exp(u) denoised(u) du."""
    polynomial = np.poly1d([0.02, -0.3, 0.1])
    nodes, weights = np.polynomial.legendre.leggauss(20)

    def exact(x, now, then):
        u = now.lam + (then.lam - now.lam) * (nodes + 1) / 2
        integral = (then.lam - now.lam) / 2 * np.sum(weights * np.exp(u) * polynomial(u))
        return then.sigma / now.sigma * x + then.sigma * integral

    options = {"solver_order": 3, "lower_order_final": False, "solver_type": kind, "final_sigmas_type": "sigma_min"}
    parabola = lambda x, at: np.full(SHAPE, polynomial(at.lam))
    levels, latents, history = zip(*evaluations("unipc", 8, parabola, lambda x: x, **options), strict=True)
    corrected = [arrays[3] for arrays in history]
    for i in range(3, 7):
        np.testing.assert_allclose(corrected[i], exact(corrected[i - 1], *levels[i - 1 : i + 1]), rtol=1e-9)
        np.testing.assert_allclose(latents[i], exact(corrected[i], *levels[i : i + 2]), rtol=1e-9)


# Beside diffusers.


def model_numbers(x, timestep, xp):
    """A stand-in for the U-Net, bounded and smooth in x and t; `xp` is jnp or torch. x: [B, H, W, C]."""
    t = timestep / 1000
    return xp.tanh(x @ xp.asarray(MIX, dtype=x.dtype) + 0.3 * t) - 0.5 * xp.tanh(x) * (1 - t)


@functools.partial(jax.jit, static_argnames="prediction_type")
def run(table, state, keys, prediction_type):
    def denoise(x, level):
        return to_denoised(model_numbers(x, level.timestep, jnp), x, level.alpha, level.sigma, prediction_type)

    return sampling.sample(denoise, table, state, keys)


def ours(config, sampler, steps, *, spacing=None, strength=None):
    schedule = NoiseSchedule.from_config(config)
    table = sampling.tabulate(schedule, sampler, steps, spacing=spacing, strength=strength or 1.0)
    noise = jnp.asarray(NOISE)
    state = (
        sampling.initial(table, noise)
        if strength is None
        else sampling.initial_from_image(table, jnp.asarray(IMAGE), noise)
    )
    return np.asarray(run(table, state, keys_of(SHAPE[0]), schedule.prediction_type))


class Float64Torch:
    """torch for a scheduler that casts to float32, made to cast to float64."""

    def __getattr__(self, name):
        import torch

        return torch.float64 if name == "float32" else getattr(torch, name)


def theirs(config, sampler, steps, monkeypatch, *, spacing=None, strength=None, float64=False):
    """What a diffusers pipeline does with `Scheduler.from_config`, fed the same noise at every step."""
    import diffusers
    import torch

    extra = {}
    if spacing is not None:
        extra = {f"use_{spacing}_sigmas": True} if spacing in CURVES else {"timestep_spacing": spacing}
    if sampler.startswith("dpmpp"):
        extra["algorithm_type"] = "dpmsolver++" if sampler == "dpmpp_2m" else "sde-dpmsolver++"
    scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config, **extra)
    draws = evaluations_with_noise(sampler)

    def randn_tensor(shape, **_):
        i = next(draws)
        drawn = [jax.random.normal(jax.random.fold_in(key, i), SHAPE[1:], jnp.float32) for key in keys_of(SHAPE[0])]
        assert tuple(shape) == SHAPE
        return torch.tensor(np.asarray(drawn))

    module = sys.modules[type(scheduler).__module__]
    if sampler in STOCHASTIC:
        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    noise = torch.tensor(NOISE)
    if float64:
        monkeypatch.setattr(module, "torch", Float64Torch())
        noise = noise.double()

    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    if float64:
        scheduler.sigmas = scheduler.sigmas.double()
    if strength is None:
        latents = noise * scheduler.init_noise_sigma
    else:
        first = (steps - min(int(steps * strength), steps)) * scheduler.order
        timesteps = timesteps[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        latents = scheduler.add_noise(torch.tensor(IMAGE), noise, timesteps[:1].repeat(SHAPE[0]))
    for t in timesteps:
        output = model_numbers(scheduler.scale_model_input(latents, t), t.to(latents.dtype), torch)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents.numpy()


def assert_same(config, sampler, steps, monkeypatch, tolerance=2e-5, float64=False, **how):
    with monkeypatch.context() as patch:  # the next scheduler is to be made by torch as it is
        expected = theirs(config, sampler, steps, patch, float64=float64, **how)
    assert np.isfinite(expected).all()
    error = np.abs(ours(config, sampler, steps, **how) - expected).max() / np.abs(expected).max()
    assert error < tolerance, (sampler, steps, how, config)


@parity
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_published_configs_match_diffusers(sampler, name, monkeypatch):
    smallest = (1, FEWEST.get(sampler, 2), 5)
    if sampler == "pndm" and name == "emoji":
        smallest = (4, 5)  # below four diffusers' Runge-Kutta raises
    for steps in (*smallest, 20, 50):
        assert_same(CONFIGS[name], sampler, steps, monkeypatch)


@parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_spacings_and_prediction_types_match_diffusers(sampler, spacing, monkeypatch):
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        if prediction_type == "sample" and sampler in ("pndm", "euler_a", "dpm2", "dpm2_a"):
            continue  # diffusers raises
        config = CONFIGS["sd1"] | {"timestep_spacing": spacing, "prediction_type": prediction_type}
        # Of three steps with Heun diffusers' own rounding is 2.3e-5, where ours is 1e-5.
        for steps in (3, 20):
            assert_same(config, sampler, steps, monkeypatch, float64=sampler == "heun")
        assert_same(config, sampler, 16, monkeypatch, strength=0.6)


@parity
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("sampler", CURVED)
def test_spacings_of_noise_levels_match_diffusers(sampler, curve, monkeypatch):
    for name in ("sd1", "sd2v"):
        for steps in (1, FEWEST.get(sampler, 2), 20):
            for spacing in ("leading", "linspace", "trailing") if curve == "karras" else ("linspace",):
                assert_same(CONFIGS[name] | {"timestep_spacing": spacing}, sampler, steps, monkeypatch, spacing=curve)
    assert_same(CONFIGS["sd2v"] | {f"use_{curve}_sigmas": True}, sampler, 10, monkeypatch, strength=0.5)


@parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", [name for name in SCHEDULERS if name not in ("lcm", "tcd")])
def test_a_spacing_of_timesteps_takes_the_place_of_the_config(sampler, spacing, monkeypatch):
    """Turbo, Lightning and Hyper-SD models are drawn with a few steps of "trailing"."""
    other = {"timestep_spacing": "leading" if spacing != "leading" else "linspace"}
    other |= {"use_karras_sigmas": True} if sampler in CURVED else {}
    for steps in (1, 4):
        with monkeypatch.context() as patch:
            expected = theirs(CONFIGS["sdxl"] | {"timestep_spacing": spacing}, sampler, steps, patch)
        drawn = ours(CONFIGS["sdxl"] | other, sampler, steps, spacing=spacing)
        assert np.abs(drawn - expected).max() < 2e-5 * np.abs(expected).max(), steps


@parity
@pytest.mark.parametrize("strength", [0.1, 0.5, 0.75, 0.95, 1.0])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_strengths_match_diffusers(sampler, strength, monkeypatch):
    for config in CONFIGS.values():
        assert_same(config, sampler, 20, monkeypatch, strength=strength)


@parity
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", ZERO_SNR)
def test_zero_terminal_snr_matches_diffusers(sampler, spacing, monkeypatch):
    config = CONFIGS["sd2v"] | {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    # With sigma / alpha = 4096 the variance-exploding float32 of diffusers' Euler loses three digits; ours does not.
    float64 = sampler.startswith("euler")
    for steps in (2, 20):
        assert_same(config, sampler, steps, monkeypatch, float64=float64)
    if sampler in CURVED:
        assert_same(config, sampler, 20, monkeypatch, spacing="karras", float64=float64)


@parity
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("ddim", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
        ("ddim", {"set_alpha_to_one": True}),
        ("ddim", {"trained_betas": list(np.linspace(0.001, 0.015, 600)), "num_train_timesteps": 600}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("ddim", {"beta_schedule": "linear", "num_train_timesteps": 800}),
        ("ddpm", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("ddpm", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("ddpm", {"variance_type": "fixed_small_log"}),
        ("tcd", {"original_inference_steps": 100}),
        ("pndm", {"set_alpha_to_one": True, "skip_prk_steps": False}),
        ("pndm", {"skip_prk_steps": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        ("heun", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("euler", {"interpolation_type": "log_linear"}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 5.0, "set_alpha_to_one": True}),
        ("lcm", {"clip_sample": True, "clip_sample_range": 0.8}),
        ("lcm", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
        *(
            (sampler, options)
            for sampler in ("dpmpp_2m", "dpmpp_2m_sde")
            for options in (
                {"solver_order": 1},
                {"solver_order": 3},
                {"solver_type": "heun"},
                {"solver_type": "bh2"},
                {"lower_order_final": False},
                {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
                {"lambda_min_clipped": -3.0},
                {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"},
                {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
                {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
            )
        ),
        ("unipc", {"solver_order": 1}),
        ("unipc", {"solver_order": 3}),
        ("unipc", {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
        ("unipc", {"solver_type": "midpoint"}),
        ("unipc", {"disable_corrector": [0, 2]}),
        ("unipc", {"final_sigmas_type": "sigma_min"}),
        ("unipc", {"final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_order": 3}),
        ("unipc", {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}),
        ("unipc", {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}),
    ],
)
def test_scheduler_options_match_diffusers(sampler, options, monkeypatch):
    for steps in (7, 20):
        assert_same(CONFIGS["sd1"] | options, sampler, steps, monkeypatch, strength=0.9)
        if options.get("beta_schedule") != "squaredcos_cap_v2" or "use_karras_sigmas" not in options:
            assert_same(CONFIGS["sd1"] | options, sampler, steps, monkeypatch)


# Beyond it.


@jax.jit
def perfect_step(table, state, keys, i):
    return sampling.step(lambda x, level: jnp.asarray(IMAGE), state, i, table, keys)


@pytest.mark.parametrize("sampler", ["ddim", "pndm", "lms", "heun", "euler", "dpm2", "dpmpp_2m", "unipc", "restart"])
def test_a_perfect_denoiser_keeps_every_step_on_its_level(sampler):
    """With x0 known exactly, the way from noise to x0 is a straight line that every deterministic sampler follows."""
    strength = 1.0 if sampler in ("lms", "pndm") else 0.8  # these two follow diffusers off the line at first
    table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS["sd1"]), sampler, 10, strength=strength)
    image, noise = jnp.asarray(IMAGE), jnp.asarray(NOISE)
    state = sampling.initial_from_image(table, image, noise)
    for i in range(int(table.length)):
        np.testing.assert_allclose(state.latents, sampling.noised(table, i, image, noise), atol=2e-5)
        state = perfect_step(table, state, keys_of(2), i)
    # set_alpha_to_one = false: ddim and pndm stop at the first training timestep's level
    left = np.sqrt(1 - 0.99915) if sampler in ("ddim", "pndm") else 0
    np.testing.assert_allclose(state.latents, np.sqrt(1 - left**2) * IMAGE + left * NOISE, atol=2e-5)


@pytest.mark.parametrize(
    ("sampler", "name", "evaluations"),
    [("pndm", "sd1", 13), ("pndm", "emoji", 21), ("pndm", "emoji<4", 4), ("restart", "sd1", 23)],
)
def test_a_table_counts_evaluations_not_steps(sampler, name, evaluations):
    name, *few = name.split("<")
    table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS[name]), sampler, 3 if few else 12)
    assert table.length == evaluations


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm"])
def test_every_step_but_the_last_has_the_evaluations_of_its_sampler(sampler):
    per_step = SAMPLERS[sampler].evaluations
    for steps in (1, 2, 40):
        table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS["sd1"]), sampler, steps)
        assert table.length == per_step * steps - (per_step - 1)


def test_pndm_below_four_steps_starts_without_runge_kutta():
    config = {key: value for key, value in CONFIGS["sd2v"].items() if key != "skip_prk_steps"}
    np.testing.assert_array_equal(ours(config, "pndm", 3), ours(CONFIGS["sd2v"], "pndm", 3))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_zero_terminal_snr_stays_finite(sampler, prediction_type):
    config = CONFIGS["sd1"] | {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": prediction_type,
    }
    assert np.isfinite(ours(config, sampler, 5)).all()


def test_the_settings_name_the_samplers_and_spacings_that_there_are():
    assert list(settings.SAMPLER_LABELS) == list(SAMPLERS)
    assert list(settings.SPACING_LABELS) == [*TIMESTEP_SPACINGS, *CURVES]
