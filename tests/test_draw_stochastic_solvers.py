"""The solvers that add noise, beside the algorithms of k-diffusion, A1111 and ComfyUI in their own scaling.

diffusers has some of these samplers too; `test_draw_solvers` compares them with its schedulers.
"""

from itertools import pairwise

import numpy as np
import pytest
from schedules import NOISE
from solver_runs import ALPHAS_CUMPROD, END, FRESH, At, denoise, eps_of, evaluations, limited

from sdjax.draw import stochastic_solvers
from sdjax.draw.samplers import SAMPLERS

TABLE = np.sqrt(1 / ALPHAS_CUMPROD - 1).astype(np.float32).astype(np.float64)


class Model:
    """The denoiser as k-diffusion calls it, with x in the variance-exploding scaling. Counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, ve):
        self.calls += 1
        alpha = 1 / np.sqrt(1 + ve**2)
        t = np.interp(np.log(ve), np.log(TABLE), np.arange(len(TABLE)))
        return limited(denoise(alpha * x, At(t, alpha, alpha * ve)))

    @property
    def noise(self):
        """The noise of the last evaluation."""
        return FRESH[self.calls - 1]


def karras(n, low, high):
    ramp = np.linspace(0, 1, n)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def to_d(x, sigma, denoised):
    return (x - denoised) / sigma


def get_ancestral_step(sigma_from, sigma_to):
    up = min(sigma_to, (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up


def by_euler_ancestral(model, x, sigmas):
    for now, then in pairwise(sigmas):
        denoised = model(x, now)
        down, up = get_ancestral_step(now, then)
        x = x + to_d(x, now, denoised) * (down - now) + model.noise * up
    return x


def by_dpm2_ancestral(model, x, sigmas):
    for now, then in pairwise(sigmas):
        denoised = model(x, now)
        down, up = get_ancestral_step(now, then)
        d = to_d(x, now, denoised)
        if down == 0:
            return x + d * (down - now)
        middle = np.exp((np.log(now) + np.log(down)) / 2)
        half = x + d * (middle - now)
        x = x + to_d(half, middle, model(half, middle)) * (down - now) + model.noise * up


def by_dpmpp_2s_ancestral(model, x, sigmas):
    for now, then in pairwise(sigmas):
        denoised = model(x, now)
        down, up = get_ancestral_step(now, then)
        if down == 0:
            return denoised
        t, h = -np.log(now), np.log(now) - np.log(down)
        s = t + h / 2
        half = np.exp(-s) / np.exp(-t) * x - np.expm1(-h / 2) * denoised
        x = np.exp(-(t + h)) / np.exp(-t) * x - np.expm1(-h) * model(half, np.exp(-s)) + model.noise * up


def by_dpmpp_sde(model, x, sigmas):
    for now, then in pairwise(sigmas):
        denoised = model(x, now)
        if then == 0:
            return x + to_d(x, now, denoised) * (then - now)
        first = model.noise
        middle = np.exp((np.log(now) + np.log(then)) / 2)
        down, up = get_ancestral_step(now, middle)
        half = down / now * x - np.expm1(np.log(down) - np.log(now)) * denoised + first * up
        denoised = model(half, middle)
        # k-diffusion draws both from one Brownian path over sigma.
        path = [0, np.sqrt(now - middle) * first]
        path.append(path[1] + np.sqrt(middle - then) * model.noise)
        down, up = get_ancestral_step(now, then)
        x = down / now * x - np.expm1(np.log(down) - np.log(now)) * denoised + path[2] / np.sqrt(now - then) * up


def by_dpmpp_3m_sde(model, x, sigmas):
    denoised_1 = denoised_2 = h_1 = h_2 = None
    for now, then in pairwise(sigmas):
        denoised = model(x, now)
        if then == 0:
            return denoised
        h = np.log(now) - np.log(then)
        x = np.exp(-2 * h) * x - np.expm1(-2 * h) * denoised
        phi_2 = np.expm1(-2 * h) / (2 * h) + 1
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            x = x + phi_2 * d1 - (phi_2 / (2 * h) - 0.5) * d2
        elif h_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        x = x + model.noise * then * np.sqrt(-np.expm1(-2 * h))
        denoised_1, denoised_2, h_1, h_2 = denoised, denoised_1, h, h_1


def by_er_sde(model, x, sigmas):
    scaler = lambda u: u * (np.exp(u**0.3) + 10)
    old_denoised = old_d = None
    for i, (s, t) in enumerate(pairwise(sigmas)):
        denoised = model(x, s)
        if t == 0:
            return denoised
        r = scaler(t) / scaler(s)
        x = r * x + (1 - r) * denoised
        d = None
        if old_denoised is not None:
            dt = t - s
            positions = t + np.arange(200) * -dt / 200
            d = (denoised - old_denoised) / (s - sigmas[i - 1])
            x = x + (dt + np.sum(1 / scaler(positions)) * -dt / 200 * scaler(t)) * d
            if old_d is not None:
                bend = (d - old_d) / ((s - sigmas[i - 2]) / 2)
                integral = np.sum((positions - s) / scaler(positions)) * -dt / 200
                x = x + (dt**2 / 2 + integral * scaler(t)) * bend
        x = x + model.noise * np.sqrt(t**2 - s**2 * r**2)
        old_denoised, old_d = denoised, d


def by_restart(model, x, sigmas):
    steps, restarts = len(sigmas) - 1, {}
    if steps >= 20:
        count, times = (9, 1) if steps < 36 else (steps // 4, 2)
        sigmas = [*karras(steps - count * times, sigmas[-2], sigmas[0]), 0.0]
        restarts = {int(np.argmin(np.abs(np.array(sigmas) - 0.1))): (count + 1, times)}
    pairs = []
    for i in range(len(sigmas) - 1):
        pairs.append((sigmas[i], sigmas[i + 1]))
        if i + 1 in restarts:
            count, times = restarts[i + 1]
            highest = int(np.argmin(np.abs(np.array(sigmas) - 2)))
            pairs += times * list(pairwise(karras(count, sigmas[i + 1], sigmas[highest])))
    last = np.inf
    for now, then in pairs:
        if last < now * (1 - 1e-9):
            x = x + model.noise * np.sqrt(now**2 - last**2)
        d = to_d(x, now, model(x, now))
        euler = x + d * (then - now)
        x = euler if then == 0 else x + (d + to_d(euler, then, model(euler, then))) / 2 * (then - now)
        last = then
    return x


@pytest.mark.parametrize("steps", [1, 2, 6, 20, 36])
@pytest.mark.parametrize(
    ("sampler", "algorithm"),
    [
        ("euler_a", by_euler_ancestral),
        ("dpm2_a", by_dpm2_ancestral),
        ("dpmpp_2s_a", by_dpmpp_2s_ancestral),
        ("dpmpp_sde", by_dpmpp_sde),
        ("dpmpp_3m_sde", by_dpmpp_3m_sde),
        ("er_sde", by_er_sde),
        ("restart", by_restart),
    ],
)
def test_a_solver_is_the_algorithm_of_k_diffusion(sampler, algorithm, steps):
    sigmas = [*TABLE[[999 - int(k * 1000 / steps) for k in range(steps)]], 0.0]
    model = Model()
    expected = algorithm(model, NOISE * np.sqrt(1 + sigmas[0] ** 2), sigmas)
    *_, (_, latents, _) = run = list(evaluations(sampler, steps, denoise, timestep_spacing="simple"))
    assert len(run) == model.calls
    # Ours interpolates timesteps in float32, as diffusers does.
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-5)


def by_lcm(x, levels):
    for (now, then), noise in zip(pairwise(levels), FRESH, strict=False):
        s = 10 * now.t
        x0 = 0.25 / (s**2 + 0.25) * x + s / np.sqrt(s**2 + 0.25) * limited(denoise(x, now))
        x = then.alpha * x0 + then.sigma * noise
    return x


def by_ddpm(x, levels):
    """The product of two normal densities: of x given x_next, and of x_next given the denoised latents."""
    for (now, then), noise in zip(pairwise(levels), FRESH, strict=False):
        a, mean = now.alpha / then.alpha, then.alpha * limited(denoise(x, now))
        if then == END:
            return mean
        precision = a**2 / (1 - a**2) + 1 / then.sigma**2
        x = (a / (1 - a**2) * x + mean / then.sigma**2) / precision + noise / np.sqrt(precision)


def by_tcd(x, levels):
    at = lambda t: At(t, np.sqrt(ALPHAS_CUMPROD[int(t)]), np.sqrt(1 - ALPHAS_CUMPROD[int(t)]))
    for (now, then), noise in zip(pairwise([*levels[:-1], at(0)]), FRESH, strict=False):
        below = at(0.7 * then.t)
        x0 = limited(denoise(x, now))
        x = below.alpha * x0 + below.sigma * eps_of(x, x0, now)
        if then.t > 0:
            ratio = then.alpha / below.alpha
            x = ratio * x + np.sqrt(1 - ratio**2) * noise
    return x


@pytest.mark.parametrize(("sampler", "formula"), [("lcm", by_lcm), ("ddpm", by_ddpm), ("tcd", by_tcd)])
def test_a_solver_over_timesteps_is_its_formula(sampler, formula):
    levels, latents, _ = zip(*evaluations(sampler, 6, denoise), strict=True)
    expected = formula(NOISE.astype(np.float64), [*levels, END])
    np.testing.assert_allclose(latents[-1], expected, rtol=1e-9, atol=1e-9)


STOCHASTIC = [name for name, method in SAMPLERS.items() if method.entries.__module__ == stochastic_solvers.__name__]


@pytest.mark.parametrize("sampler", ["dpm2_a", "dpmpp_2m_sde", *STOCHASTIC])
def test_noise_keeps_the_variance_of_every_level(sampler):
    """With x0 known exactly, the latents of every evaluation are alpha * x0 + sigma * noise, of unit variance."""
    normal = np.random.default_rng(2).standard_normal((50, 20_000))
    perfect, unlimited = lambda x, at: np.full_like(x, 0.5), lambda x: x
    first = next(evaluations(sampler, 20, perfect, unlimited, normal[0], normal))[0]
    start = first.alpha * 0.5 + first.sigma * normal[0]
    levels, latents, _ = zip(*evaluations(sampler, 20, perfect, unlimited, start, normal[1:]), strict=True)
    for at, x in zip(levels[1:], latents[:-1], strict=True):
        assert abs(x.mean() - at.alpha * 0.5) < 0.03 * at.sigma, at
        assert abs(x.std() - at.sigma) < 0.03 * at.sigma, at
