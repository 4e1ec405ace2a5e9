"""The update rule of each sampler, as one small matrix for each evaluation of the denoiser.

A solver below runs once, on the host in float64. It computes with rows instead of latents: a row holds the coefficients
of a linear combination of the arrays that an evaluation has at hand, so `_X / 2` means "half the latents".

Each docstring gives the update as a formula. In it `x` are the latents, `denoised` is the denoiser's estimate of the
latents without noise (clipped or thresholded if the scheduler config asks for it), `noise` is fresh unit noise, and
`_next` marks a value at the next noise level. Latents are kept in the variance-preserving scaling
`x = alpha * x0 + sigma * eps`. k-diffusion keeps them in the variance-exploding scaling `x / alpha = x0 + ve * eps`:
k-diffusion's `x` is `x / alpha` here, its `sigma` is `ve = sigma / alpha`, and its `d = (x - denoised) / sigma` is
`eps`. The coefficients convert between the scalings, so float32 is exact enough even where the last training timestep
is pure noise (zero terminal SNR, alpha = 0).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sdjax.errors import ConfigError

HISTORY = 5  # arrays remembered from one evaluation to the next; pndm needs the most

Row = np.ndarray  # [4 + HISTORY], the coefficients of latents, history, denoised latents (raw and limited) and noise
Entry = tuple[tuple[float, float, float], list[Row]]  # (timestep, alpha, sigma), [new latents, *new history]

_X, *_H, _RAW, _X0, _NOISE = np.eye(4 + HISTORY)  # _RAW: denoised as the model says; _X0: denoised, then limited


class Task(NamedTuple):
    """One run of a sampler. alphas_cumprod [T] is float64 and may end in 0."""

    alphas_cumprod: np.ndarray
    prediction_type: str
    options: Mapping[str, Any]
    steps: int
    first: int  # the first step that runs; above 0 where the strength is below 1

    @property
    def stride(self) -> int:
        """Training timesteps from one step to the next."""
        return len(self.alphas_cumprod) // self.steps

    def at(self, timestep: float) -> tuple[float, float]:
        """Returns alpha and sigma of a training timestep. A negative timestep means the end of sampling."""
        if timestep >= 0:
            value = self.alphas_cumprod[min(int(timestep), len(self.alphas_cumprod) - 1)]
        else:
            value = 1.0 if self.options["set_alpha_to_one"] else self.alphas_cumprod[0]
        return np.sqrt(value), np.sqrt(1 - value)


def _spaced(task: Task, points: int, last: int) -> np.ndarray:
    """Spaces `points` timesteps over 0..last-1 (Lin et al. 2023, table 2) and returns the largest `steps` of them.

    The largest comes first. They are not rounded.
    """
    spacing = task.options["timestep_spacing"]
    if spacing == "linspace":
        timesteps = np.linspace(0, last - 1, points)[::-1]
    elif spacing == "leading":
        timesteps = (np.arange(points) * (last // points))[::-1] + task.options["steps_offset"]
    elif spacing == "trailing":
        timesteps = np.arange(last, 0, -len(task.alphas_cumprod) / task.steps).round() - 1
    else:
        raise ConfigError(f"timestep_spacing {spacing!r} is not one of linspace, leading, trailing")
    return timesteps[: task.steps]  # arange may give one too many


def _ve_table(task: Task) -> np.ndarray:
    """Returns ve of every training timestep. As in diffusers, an alphas_cumprod of 0 counts as 2^-24."""
    alphas_cumprod = np.where(task.alphas_cumprod == 0, 2.0**-24, task.alphas_cumprod)
    return np.sqrt((1 - alphas_cumprod) / alphas_cumprod).astype(np.float32).astype(np.float64)


def _karras(low: float, high: float, steps: int) -> np.ndarray:
    """Returns `steps` values of ve, the highest first.

    Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", equation 5 with rho = 7.
    """
    return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7


def _timestep_of(ve: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Interpolates the fractional timestep of each ve linearly in log(ve).

    The table is in float32, as in diffusers: some samplers round the timestep, and the last bits decide how.
    """
    return np.interp(np.log(ve), np.log(table.astype(np.float32)), np.arange(len(table)))


def _with_last(ve: np.ndarray, last: float, task: Task) -> np.ndarray:
    """Appends the ve that sampling ends at: `last` for final_sigmas_type "sigma_min", otherwise 0."""
    kind = task.options.get("final_sigmas_type", "zero")
    if kind not in ("zero", "sigma_min"):
        raise ConfigError(f"final_sigmas_type {kind!r} is not one of zero, sigma_min")
    if (np.diff(ve) >= 0).any():
        raise ConfigError(f"{task.steps} steps put two noise levels in one place; use fewer")
    return np.append(ve, last if kind == "sigma_min" else 0).astype(np.float32).astype(np.float64)


def _scales(ve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns alpha and sigma for ve = sigma / alpha."""
    alpha = 1 / np.sqrt(1 + ve**2)
    return alpha, ve * alpha


def _k_diffusion_grid(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Returns timesteps [steps] and ve [steps + 1] of the samplers that interpolate ve at fractional timesteps.

    The last ve is where the last step ends.
    """
    table = _ve_table(task)
    timesteps = _spaced(task, task.steps, len(table))
    kind = task.options.get("interpolation_type", "linear")
    if kind == "linear":
        ve = np.interp(timesteps, np.arange(len(table)), table)
    elif kind == "log_linear":
        ve = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), task.steps + 1))
    else:
        raise ConfigError(f"interpolation_type {kind!r} is not one of linear, log_linear")
    if task.options["use_karras_sigmas"]:
        ve = _karras(ve[-1], ve[0], task.steps)
        timesteps = _timestep_of(ve, table)
    return timesteps, _with_last(ve, table[0], task)


def _ddim(task: Task) -> Iterator[Entry]:
    """DDIM: Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12 without noise (sigma_t = 0 there).

        eps = (x - alpha * denoised) / sigma
        x = alpha_next * denoised + sigma_next * eps

    The first line uses `denoised` before clipping or thresholding, the second line after it.
    """
    for t in _spaced(task, task.steps, len(task.alphas_cumprod)).round()[task.first :]:
        alpha, sigma = task.at(t)
        alpha_next, sigma_next = task.at(t - task.stride)
        eps = (_X - alpha * _RAW) / sigma
        yield (t, alpha, sigma), [alpha_next * _X0 + sigma_next * eps]


def _pndm(task: Task) -> Iterator[Entry]:
    """PNDM: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", algorithm 2.

    Let e be the model output (eps or v) at timestep t, e1 the output one step before, and so on:

        slope = (55 * e - 59 * e1 + 37 * e2 - 9 * e3) / 24
        x = transfer(x, slope, t, t_next)

    Three steps of Runge-Kutta come first, four evaluations each, with `half` the timestep in the middle:

        e_a = e(x, t);              x_a = transfer(x, e_a, t, half)
        e_b = e(x_a, half);         x_b = transfer(x, e_b, t, half)
        e_c = e(x_b, half);         x_c = transfer(x, e_c, t, t_next)
        e_d = e(x_c, t_next);       x = transfer(x, (e_a + 2 * e_b + 2 * e_c + e_d) / 6, t, t_next)

    With skip_prk_steps (which is PLMS) or below four steps they are left out. The first step is then taken twice, the
    second time with (e_a + e(x, t_next)) / 2 as its slope, and the next two steps use the slopes of fewer outputs in
    `_ADAMS_BASHFORTH`. As in diffusers, a strength below 1 only cuts evaluations off the beginning of the list, and
    the first one left counts as the first of a run.
    """
    timesteps = _spaced(task, task.steps, len(task.alphas_cumprod)).round()
    half = task.stride // 2
    runge_kutta = np.array([])
    if task.options["skip_prk_steps"] or task.steps < 4:
        timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    else:
        runge_kutta = np.add.outer(timesteps[:4], [half, 0]).ravel()[1:].repeat(2)[1:-1]
        timesteps = np.concatenate([runge_kutta, timesteps[3:]])

    of_v = task.prediction_type == "v_prediction"
    for k, t in enumerate(timesteps[task.first :]):
        alpha, sigma = task.at(t)
        output = ((alpha * _X - _X0) if of_v else (_X - alpha * _X0)) / sigma
        outputs, anchor, total = [output, *_H[:3]], _X, 0 * _X
        if k < len(runge_kutta):
            origin, target = runge_kutta[k // 4 * 4], t - (half if k % 2 == 0 else 0)
            if k % 4 == 0:
                total = output / 6
            else:
                outputs, anchor, total = _H[:3], _H[3], _H[4] + output / 3
            slope = _H[4] + output / 6 if k % 4 == 3 else output
        elif k == 1:
            origin, target = t + task.stride, t
            outputs, anchor = _H[:3], _H[3]
            slope = (output + _H[0]) / 2
        else:
            origin, target = t, t - task.stride
            known = 4 if len(runge_kutta) else max(1, min(k, 4))
            slope = np.dot(_ADAMS_BASHFORTH[known], outputs[:known])
        moved = _transfer(anchor, slope, task.at(origin), task.at(target), of_v)
        yield (t, alpha, sigma), [moved, *outputs[:3], anchor, total]


def _transfer(latents: Row, output: Row, origin: tuple[float, float], target: tuple[float, float], of_v: bool) -> Row:
    """Moves latents from one (alpha, sigma) to another along a model output, eps or v (PNDM, equation 11).

        eps = alpha * output + sigma * x  if of_v else  output
        x = alpha_next * (x / alpha + (ve_next - ve) * eps)

    of_v: whether the output is v instead of eps.
    """
    alpha, sigma = origin
    alpha_next, sigma_next = target
    eps = alpha * output + sigma * latents if of_v else output
    return alpha_next / alpha * latents + (sigma_next - alpha_next * sigma / alpha) * eps


_ADAMS_BASHFORTH = {
    1: np.array([1]),
    2: np.array([3, -1]) / 2,
    3: np.array([23, -16, 5]) / 12,
    4: np.array([55, -59, 37, -9]) / 24,
}


def _euler(task: Task) -> Iterator[Entry]:
    """Euler's method in ve: Karras et al. 2022, algorithm 1 without its correction; k-diffusion's `sample_euler`.

        eps = (x - alpha * denoised) / sigma
        x = alpha_next * (x / alpha + (ve_next - ve) * eps)

    As in diffusers, the last step ends in the variance-exploding scaling: alpha_next is 1 there.
    """
    timesteps, ve = _k_diffusion_grid(task)
    alpha, sigma = _scales(ve)
    for i in range(task.first, task.steps):
        eps = (_X - alpha[i] * _X0) / sigma[i]
        landing = alpha[i + 1] if i + 1 < task.steps else 1
        yield (timesteps[i], alpha[i], sigma[i]), [landing * (_X0 + ve[i + 1] * eps)]


def _euler_ancestral(task: Task) -> Iterator[Entry]:
    """Ancestral sampling: k-diffusion's `sample_euler_ancestral` with eta = 1.

    An Euler step leads to a level `down` below the next one, and fresh noise leads from there up to the next one:

        up = ve_next * sqrt(1 - (ve_next / ve)^2)
        down = sqrt(ve_next^2 - up^2) = ve_next^2 / ve
        eps = (x - alpha * denoised) / sigma
        x = alpha_next * (x / alpha + (down - ve) * eps + up * noise)
    """
    timesteps, ve = _k_diffusion_grid(task)
    alpha, sigma = _scales(ve)
    for i in range(task.first, task.steps):
        up = ve[i + 1] * np.sqrt(1 - (ve[i + 1] / ve[i]) ** 2)
        down = ve[i + 1] ** 2 / ve[i]
        eps = (_X - alpha[i] * _X0) / sigma[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * (_X0 + down * eps + up * _NOISE)]


def _heun(task: Task) -> Iterator[Entry]:
    """Heun's method in ve: Karras et al. 2022, algorithm 1 (without churn); k-diffusion's `sample_heun`.

        eps = (x - alpha * denoised) / sigma
        x_euler = alpha_next * (x / alpha + (ve_next - ve) * eps)
        eps_next = (x_euler - alpha_next * denoised(x_euler)) / sigma_next
        x = alpha_next * (x / alpha + (ve_next - ve) * (eps + eps_next) / 2)

    The last step, to ve_next = 0, is an Euler step.
    """
    timesteps, ve = _k_diffusion_grid(task)
    alpha, sigma = _scales(ve)
    for i in range(task.first, task.steps):
        width = ve[i + 1] - ve[i]
        begin, eps = _X / alpha[i], (_X - alpha[i] * _X0) / sigma[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * (begin + width * eps), begin, eps]
        if (end := i + 1) < task.steps:
            begin, eps = _H[0], (_H[1] + (_X - alpha[end] * _X0) / sigma[end]) / 2
            yield (timesteps[end], alpha[end], sigma[end]), [alpha[end] * (begin + width * eps)]


def _lms(task: Task) -> Iterator[Entry]:
    """Linear multistep of order 4 (Adams-Bashforth with uneven steps) in ve; k-diffusion's `sample_lms`.

    Let eps_k and ve_k belong to the step k steps ago, so that eps_0 = (x - alpha * denoised) / sigma:

        weight_k = integral from ve to ve_next of prod over j != k of (u - ve_j) / (ve_k - ve_j) du
        x = alpha_next * (x / alpha + sum over k of weight_k * eps_k)

    k runs from 0 to 3, or to the first step of the whole run. As in diffusers, a strength below 1 does not change the
    weights, and eps_k is 0 for a step that did not run.
    """
    timesteps, ve = _k_diffusion_grid(task)
    alpha, sigma = _scales(ve)
    nodes, node_weights = np.polynomial.legendre.leggauss(2)  # integrates polynomials of degree 3 exactly
    for i in range(task.first, task.steps):
        eps = [(_X - alpha[i] * _X0) / sigma[i], *_H[:3]]
        width, past = ve[i + 1] - ve[i], ve[max(i - 3, 0) : i + 1][::-1]
        points = ve[i] + width * (nodes + 1) / 2
        moved = _X / alpha[i]
        for k, known in enumerate(past):
            others = np.delete(past, k)
            basis = np.prod((points[:, None] - others) / (known - others), axis=1)
            moved = moved + width / 2 * np.dot(node_weights, basis) * eps[k]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * moved, *eps[:3]]


class _SolverGrid(NamedTuple):
    """The noise levels of an exponential solver."""

    timesteps: np.ndarray  # [steps]
    alpha: np.ndarray  # [steps + 1], as are the two below
    sigma: np.ndarray
    half_log_snr: np.ndarray  # log(alpha / sigma), the papers' lambda


def _solver_grid(task: Task, *, lowest: float = -np.inf, floor: bool = False, karras_last: bool = False) -> _SolverGrid:
    """Returns the noise levels of the exponential solvers, which leave out the last of steps + 1 spaced timesteps.

    lowest: timesteps whose log(alpha / sigma) is smaller are left out. floor: Karras timesteps are rounded down instead
    of to the nearest. karras_last: final_sigmas_type "sigma_min" means the smallest ve of Karras et al.'s spacing
    instead of the smallest ve of training.
    """
    for option, choices in (("solver_order", (1, 2, 3)), ("solver_type", ("midpoint", "heun", "bh1", "bh2", "logrho"))):
        if (value := task.options[option]) not in choices:
            raise ConfigError(f"{option} {value!r} is not one of {', '.join(map(str, choices))}")
    table = _ve_table(task)
    last = len(table) - int(np.searchsorted(-np.log(table)[::-1], lowest))
    timesteps = _spaced(task, task.steps + 1, last).round()
    ve, lowest_ve = np.interp(timesteps, np.arange(len(table)), table), table[0]
    if task.options["use_karras_sigmas"]:
        ve = _karras(table[0], table[-1], task.steps)
        timesteps = _timestep_of(ve, table)
        timesteps = np.floor(timesteps) if floor else timesteps.round()
        lowest_ve = ve[-1] if karras_last else lowest_ve
    alpha, sigma = _scales(_with_last(ve, lowest_ve, task))
    return _SolverGrid(timesteps, alpha, sigma, np.log(alpha) - np.log(sigma))


def _dpmpp(task: Task, *, stochastic: bool) -> Iterator[Entry]:
    """DPM-Solver++(2M): Lu et al. 2022, "DPM-Solver++", algorithm 2; k-diffusion's `sample_dpmpp_2m`.

    Let lam = log(alpha / sigma) and h = lam_next - lam, and let lam_1 and denoised_1 belong to the step before:

        slope = (denoised - denoised_1) * h / (lam - lam_1)
        x = sigma_next / sigma * x + alpha_next * (1 - exp(-h)) * (denoised + slope / 2)

    stochastic: the SDE form, k-diffusion's `sample_dpmpp_2m_sde` with eta = 1:

        x = sigma_next / sigma * exp(-h) * x + alpha_next * (1 - exp(-2 * h)) * (denoised + slope / 2)
            + sigma_next * sqrt(1 - exp(-2 * h)) * noise

    These are for solver_order 2 and solver_type "midpoint", which every other type but "heun" means too. "heun" gives
    the slope the factor 1 - (1 - exp(-h)) / h instead of (1 - exp(-h)) / 2, with 2 * h for h in the SDE form. Order 1
    leaves out the slope. Order 3 adds the second difference of `denoised`.
    """
    options = task.options
    squared_cosine = options["beta_schedule"] == "squaredcos_cap_v2"
    grid = _solver_grid(task, lowest=float(options["lambda_min_clipped"]), floor=squared_cosine)
    alpha, sigma, lam = grid.alpha, grid.sigma, grid.half_log_snr
    steps = len(grid.timesteps)  # trailing timesteps with lambda_min_clipped give fewer than task.steps
    few = options["lower_order_final"] and steps < 15
    for i in range(task.first, steps):
        order = min(options["solver_order"], i - task.first + 1)
        if i == steps - 1 and (options["euler_at_final"] or few or options["final_sigmas_type"] == "zero"):
            order = 1
        elif i == steps - 2 and few:
            order = min(order, 2)
        h = lam[i + 1] - lam[i]
        reach = 2 * h if stochastic else h
        shrink = np.exp(-h) if stochastic else 1
        moved = sigma[i + 1] / sigma[i] * shrink * _X - alpha[i + 1] * np.expm1(-reach) * _X0
        if stochastic:
            moved = moved + sigma[i + 1] * np.sqrt(-np.expm1(-2 * h)) * _NOISE
        if order > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            slope = (_X0 - _H[0]) / r0
            linear = alpha[i + 1] * (np.expm1(-reach) / reach + 1)
            if order == 3:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                bend = (slope - (_H[0] - _H[1]) / r1) / (r0 + r1)
                half = -0.5 if stochastic else 0.5  # the signs of diffusers
                square = alpha[i + 1] * (half - (np.expm1(-reach) + reach) / reach**2)
                moved = moved + linear * (slope + r0 * bend) + square * bend
            elif options["solver_type"] == "heun":
                moved = moved + linear * slope
            else:
                moved = moved - alpha[i + 1] * np.expm1(-reach) / 2 * slope
        yield (grid.timesteps[i], alpha[i], sigma[i]), [moved, _X0, _H[0]]


def _dpmpp_2m(task: Task) -> Iterator[Entry]:
    return _dpmpp(task, stochastic=False)


def _dpmpp_2m_sde(task: Task) -> Iterator[Entry]:
    return _dpmpp(task, stochastic=True)


def _unipc(task: Task) -> Iterator[Entry]:
    """UniPC: Zhao et al. 2023, "UniPC", algorithms 1 (corrector UniC) and 2 (predictor UniP) for a model of x0.

    Each evaluation is used twice: to repeat the update that led to the present level, now with the denoised latents
    there (the corrector), and to go on to the next level (the predictor). Both updates are `_unipc_update`.
    Every solver_type but "bh1" means "bh2".
    """
    options = task.options
    grid = _solver_grid(task, karras_last=True)
    order = 0
    for i in range(task.first, task.steps):
        latents = _X
        if i > task.first and i - 1 not in options["disable_corrector"]:
            latents = _unipc_update(grid, i - 1, order, options["solver_type"], _H[3], _H[:3], arrived=_X0)
        order = min(options["solver_order"], i - task.first + 1)
        if options["lower_order_final"]:
            order = min(order, task.steps - i)
        if grid.sigma[i + 1] == 0:
            order = 1
        seen = [_X0, *_H[:2]]
        moved = _unipc_update(grid, i, order, options["solver_type"], latents, seen)
        yield (grid.timesteps[i], grid.alpha[i], grid.sigma[i]), [moved, *seen, latents]


def _unipc_update(
    grid: _SolverGrid, i: int, order: int, kind: str, latents: Row, seen: list[Row], arrived: Row | None = None
) -> Row:
    """Moves latents from level i to i + 1 (UniPC, section 3).

    Let m_k and lam_k be the denoised latents and log(alpha / sigma) at level i - k, and h = lam_next - lam_0:

        r_k = (lam_k - lam_0) / h
        slope_k = (m_k - m_0) / r_k
        x = sigma_next / sigma * x + alpha_next * (1 - exp(-h)) * m_0 + alpha_next * B * sum over k of a_k * slope_k

    B is h for bh1 and 1 - exp(-h) for bh2. Two a_k or more solve the paper's linear system, so the update is exact
    where the denoised latents are a polynomial in lam. A single a_1 is 1/2.
    seen: m_0, m_1, ... arrived: the denoised latents at level i + 1, which the corrector uses as one more point with
    r = 1; without them this is the predictor.
    """
    lam = grid.half_log_snr
    h = lam[i + 1] - lam[i]
    ratios = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
    slopes = [(seen[k] - seen[0]) / ratio for k, ratio in enumerate(ratios, 1)]
    if arrived is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, arrived - seen[0]]
    scale = -h if kind == "bh1" else np.expm1(-h)
    if len(ratios) == 1:
        weights = [0.5]
    else:
        phi, factorial, sides = np.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(ratios) + 1):
            sides.append(phi * factorial / scale)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        weights = np.linalg.solve(np.vander(ratios, increasing=True).T, sides) if ratios else []
    moved = grid.sigma[i + 1] / grid.sigma[i] * latents - grid.alpha[i + 1] * np.expm1(-h) * seen[0]
    for weight, slope in zip(weights, slopes, strict=True):
        moved = moved - grid.alpha[i + 1] * scale * weight * slope
    return moved


def _lcm(task: Task) -> Iterator[Entry]:
    """Multistep sampling of consistency models: Luo et al. 2023, "Latent Consistency Models", algorithm 3.

        s = timestep_scaling * t
        c_skip = 0.25 / (s^2 + 0.25)
        c_out = s / sqrt(s^2 + 0.25)
        x0 = c_skip * x + c_out * denoised
        x = alpha_next * x0 + sigma_next * noise

    The last step returns x0.
    """
    original, count = task.options["original_inference_steps"], len(task.alphas_cumprod)
    if task.steps > original:
        raise ConfigError(f"steps {task.steps} must be at most {original} (original_inference_steps) for 'lcm'")
    trained = (np.arange(1, original + 1) * (count // original) - 1)[::-1]
    timesteps = trained[np.linspace(0, original, task.steps, endpoint=False).astype(int)]
    for i in range(task.first, task.steps):
        alpha, sigma = task.at(timesteps[i])
        time = timesteps[i] * task.options["timestep_scaling"]
        skip, out = 0.25 / (time**2 + 0.25), time / np.sqrt(time**2 + 0.25)
        moved = out * _X0 + skip * _X
        if i + 1 < task.steps:
            alpha_next, sigma_next = task.at(timesteps[i + 1])
            moved = alpha_next * moved + sigma_next * _NOISE
        yield (timesteps[i], alpha, sigma), [moved]


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
        _ddim,
        {
            **(_LEADING | _ZERO_SNR | _THRESHOLD),
            "set_alpha_to_one": True,
            "clip_sample": True,
            "clip_sample_range": 1.0,
        },
    ),
    "pndm": Sampler(_pndm, {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False}),
    "lms": Sampler(_lms, {**_LINSPACE, **_KARRAS}, scaled_start=True),
    "heun": Sampler(_heun, {**_LINSPACE, **_KARRAS, "clip_sample": False, "clip_sample_range": 1.0}, scaled_start=True),
    "euler": Sampler(
        _euler,
        {**(_LINSPACE | _KARRAS | _ZERO_SNR), "interpolation_type": "linear", "final_sigmas_type": "zero"},
        scaled_start=True,
    ),
    "euler_a": Sampler(_euler_ancestral, {**_LINSPACE, **_ZERO_SNR}, scaled_start=True),
    "dpmpp_2m": Sampler(_dpmpp_2m, _DPMPP),
    "dpmpp_2m_sde": Sampler(_dpmpp_2m_sde, _DPMPP),
    "unipc": Sampler(
        _unipc,
        {**(_LINSPACE | _KARRAS | _ZERO_SNR | _THRESHOLD | _SOLVER), "solver_type": "bh2", "disable_corrector": []},
    ),
    "lcm": Sampler(
        _lcm,
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
