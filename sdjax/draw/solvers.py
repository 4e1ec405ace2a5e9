"""The update rule of each sampler, as one small matrix for each evaluation of the denoiser.

A solver below runs once, on the host in float64. It computes with rows instead of latents: a row holds the coefficients
of a linear combination of the arrays that an evaluation has at hand, so `X / 2` means "half the latents".

Each docstring gives the update as a formula. In it `x` are the latents, `denoised` is the denoiser's estimate of the
latents without noise (clipped or thresholded if the scheduler config asks for it), `noise` is fresh unit noise, and
`_next` marks a value at the next noise level. Latents are kept in the variance-preserving scaling
`x = alpha * x0 + sigma * eps`. k-diffusion keeps them in the variance-exploding scaling `x / alpha = x0 + ve * eps`:
k-diffusion's `x` is `x / alpha` here, its `sigma` is `ve = sigma / alpha`, and its `d = (x - denoised) / sigma` is
`eps`. The coefficients convert between the scalings, so float32 is exact enough even where the last training timestep
is pure noise (zero terminal SNR, alpha = 0).
"""

from collections.abc import Iterator

import numpy as np

from sdjax.draw.levels import (
    SolverGrid,
    Task,
    ancestral_step,
    k_diffusion_grid,
    scales,
    solver_grid,
    spaced,
    timestep_of,
    ve_table,
)

HISTORY = 5  # arrays remembered from one evaluation to the next; pndm needs the most

Row = np.ndarray  # [4 + HISTORY], the coefficients of latents, history, denoised latents (raw and limited) and noise
Entry = tuple[tuple[float, float, float], list[Row]]  # (timestep, alpha, sigma), [new latents, *new history]

X, *H, RAW, X0, NOISE = np.eye(4 + HISTORY)  # RAW: denoised as the model says; X0: denoised, then limited


def ddim(task: Task) -> Iterator[Entry]:
    """DDIM: Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12 without noise (sigma_t = 0 there).

        eps = (x - alpha * denoised) / sigma
        x = alpha_next * denoised + sigma_next * eps

    The first line uses `denoised` before clipping or thresholding, the second line after it.
    """
    for t in spaced(task, task.steps, len(task.alphas_cumprod)).round()[task.first :]:
        alpha, sigma = task.at(t)
        alpha_next, sigma_next = task.at(t - task.stride)
        eps = (X - alpha * RAW) / sigma
        yield (t, alpha, sigma), [alpha_next * X0 + sigma_next * eps]


def pndm(task: Task) -> Iterator[Entry]:
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
    timesteps = spaced(task, task.steps, len(task.alphas_cumprod)).round()
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
        output = ((alpha * X - X0) if of_v else (X - alpha * X0)) / sigma
        outputs, anchor, total = [output, *H[:3]], X, 0 * X
        if k < len(runge_kutta):
            origin, target = runge_kutta[k // 4 * 4], t - (half if k % 2 == 0 else 0)
            if k % 4 == 0:
                total = output / 6
            else:
                outputs, anchor, total = H[:3], H[3], H[4] + output / 3
            slope = H[4] + output / 6 if k % 4 == 3 else output
        elif k == 1:
            origin, target = t + task.stride, t
            outputs, anchor = H[:3], H[3]
            slope = (output + H[0]) / 2
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


def euler(task: Task) -> Iterator[Entry]:
    """Euler's method in ve: Karras et al. 2022, algorithm 1 without its correction; k-diffusion's `sample_euler`.

        eps = (x - alpha * denoised) / sigma
        x = alpha_next * (x / alpha + (ve_next - ve) * eps)

    As in diffusers, the last step ends in the variance-exploding scaling: alpha_next is 1 there.
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    for i in range(task.first, task.steps):
        eps = (X - alpha[i] * X0) / sigma[i]
        landing = alpha[i + 1] if i + 1 < task.steps else 1
        yield (timesteps[i], alpha[i], sigma[i]), [landing * (X0 + ve[i + 1] * eps)]


def heun(task: Task) -> Iterator[Entry]:
    """Heun's method in ve: Karras et al. 2022, algorithm 1 (without churn); k-diffusion's `sample_heun`.

        eps = (x - alpha * denoised) / sigma
        x_euler = alpha_next * (x / alpha + (ve_next - ve) * eps)
        eps_next = (x_euler - alpha_next * denoised(x_euler)) / sigma_next
        x = alpha_next * (x / alpha + (ve_next - ve) * (eps + eps_next) / 2)

    The last step, to ve_next = 0, is an Euler step.
    """
    timesteps, ve = k_diffusion_grid(task)
    for i in range(task.first, task.steps):
        yield from heun_step(timesteps[i : i + 2], ve[i : i + 2], ve[i + 1])


def heun_step(timesteps: np.ndarray, ve: np.ndarray, lift: float) -> Iterator[Entry]:
    """Takes one step of `heun` between two levels, and adds noise up to the level `lift`."""
    (alpha, alpha_next), (sigma, sigma_next) = scales(ve)
    noise, (alpha_lift, _) = np.sqrt(lift**2 - ve[1] ** 2) * NOISE, scales(lift)
    width = ve[1] - ve[0]
    begin, eps = X / alpha, (X - alpha * X0) / sigma
    if sigma_next == 0:
        yield (timesteps[0], alpha, sigma), [alpha_lift * (begin + width * eps + noise)]
        return
    yield (timesteps[0], alpha, sigma), [alpha_next * (begin + width * eps), begin, eps]
    eps = (H[1] + (X - alpha_next * X0) / sigma_next) / 2
    yield (timesteps[1], alpha_next, sigma_next), [alpha_lift * (H[0] + width * eps + noise)]


def _dpm2(task: Task, *, ancestral: bool) -> Iterator[Entry]:
    """The midpoint method in ve, with the middle in log(ve): k-diffusion's `sample_dpm_2` without churn.

        middle = sqrt(ve * ve_next)
        eps = (x - alpha * denoised) / sigma
        x_middle = alpha_middle * (x / alpha + (middle - ve) * eps)
        eps_middle = (x_middle - alpha_middle * denoised(x_middle)) / sigma_middle
        x = alpha_next * (x / alpha + (ve_next - ve) * eps_middle)

    The last step, to ve_next = 0, is an Euler step. As in diffusers, Karras timesteps are rounded.

    ancestral: k-diffusion's `sample_dpm_2_ancestral` with eta = 1. The step leads to `down` of `levels.ancestral_step`
    instead of ve_next, and alpha_next * up * noise is added to x.
    """
    timesteps, ve = k_diffusion_grid(task)
    if task.curve == "karras":
        timesteps = timesteps.round()
    (alpha, sigma), table = scales(ve), ve_table(task)
    for i in range(task.first, task.steps):
        target, up = ancestral_step(ve[i], ve[i + 1]) if ancestral else (ve[i + 1], 0.0)
        middle = np.sqrt(ve[i] * target)
        alpha_middle, sigma_middle = scales(middle)
        begin, eps = X / alpha[i], (X - alpha[i] * X0) / sigma[i]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha_middle * (begin + (middle - ve[i]) * eps), begin]
        if target > 0:
            moved = H[0] + (target - ve[i]) * (X - alpha_middle * X0) / sigma_middle + up * NOISE
            yield (timestep_of(middle, table), alpha_middle, sigma_middle), [alpha[i + 1] * moved]


def dpm2(task: Task) -> Iterator[Entry]:
    return _dpm2(task, ancestral=False)


def dpm2_ancestral(task: Task) -> Iterator[Entry]:
    return _dpm2(task, ancestral=True)


def lms(task: Task) -> Iterator[Entry]:
    """Linear multistep of order 4 (Adams-Bashforth with uneven steps) in ve; k-diffusion's `sample_lms`.

    Let eps_k and ve_k belong to the step k steps ago, so that eps_0 = (x - alpha * denoised) / sigma:

        weight_k = integral from ve to ve_next of prod over j != k of (u - ve_j) / (ve_k - ve_j) du
        x = alpha_next * (x / alpha + sum over k of weight_k * eps_k)

    k runs from 0 to 3, or to the first step of the whole run. As in diffusers, a strength below 1 does not change the
    weights, and eps_k is 0 for a step that did not run.
    """
    timesteps, ve = k_diffusion_grid(task)
    alpha, sigma = scales(ve)
    nodes, node_weights = np.polynomial.legendre.leggauss(2)  # integrates polynomials of degree 3 exactly
    for i in range(task.first, task.steps):
        eps = [(X - alpha[i] * X0) / sigma[i], *H[:3]]
        width, past = ve[i + 1] - ve[i], ve[max(i - 3, 0) : i + 1][::-1]
        points = ve[i] + width * (nodes + 1) / 2
        moved = X / alpha[i]
        for k, known in enumerate(past):
            others = np.delete(past, k)
            basis = np.prod((points[:, None] - others) / (known - others), axis=1)
            moved = moved + width / 2 * np.dot(node_weights, basis) * eps[k]
        yield (timesteps[i], alpha[i], sigma[i]), [alpha[i + 1] * moved, *eps[:3]]


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
    grid = solver_grid(task, lowest=float(options["lambda_min_clipped"]), floor=squared_cosine)
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
        moved = sigma[i + 1] / sigma[i] * shrink * X - alpha[i + 1] * np.expm1(-reach) * X0
        if stochastic:
            moved = moved + sigma[i + 1] * np.sqrt(-np.expm1(-2 * h)) * NOISE
        if order > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            slope = (X0 - H[0]) / r0
            linear = alpha[i + 1] * (np.expm1(-reach) / reach + 1)
            if order == 3:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                bend = (slope - (H[0] - H[1]) / r1) / (r0 + r1)
                half = -0.5 if stochastic else 0.5  # the signs of diffusers
                square = alpha[i + 1] * (half - (np.expm1(-reach) + reach) / reach**2)
                moved = moved + linear * (slope + r0 * bend) + square * bend
            elif options["solver_type"] == "heun":
                moved = moved + linear * slope
            else:
                moved = moved - alpha[i + 1] * np.expm1(-reach) / 2 * slope
        yield (grid.timesteps[i], alpha[i], sigma[i]), [moved, X0, H[0]]


def dpmpp_2m(task: Task) -> Iterator[Entry]:
    return _dpmpp(task, stochastic=False)


def dpmpp_2m_sde(task: Task) -> Iterator[Entry]:
    return _dpmpp(task, stochastic=True)


def unipc(task: Task) -> Iterator[Entry]:
    """UniPC: Zhao et al. 2023, "UniPC", algorithms 1 (corrector UniC) and 2 (predictor UniP) for a model of x0.

    Each evaluation is used twice: to repeat the update that led to the present level, now with the denoised latents
    there (the corrector), and to go on to the next level (the predictor). Both updates are `_unipc_update`.
    Every solver_type but "bh1" means "bh2".
    """
    options = task.options
    grid = solver_grid(task, curve_last=True)
    order = 0
    for i in range(task.first, task.steps):
        latents = X
        if i > task.first and i - 1 not in options["disable_corrector"]:
            latents = _unipc_update(grid, i - 1, order, options["solver_type"], H[3], H[:3], arrived=X0)
        order = min(options["solver_order"], i - task.first + 1)
        if options["lower_order_final"]:
            order = min(order, task.steps - i)
        if grid.sigma[i + 1] == 0:
            order = 1
        seen = [X0, *H[:2]]
        moved = _unipc_update(grid, i, order, options["solver_type"], latents, seen)
        yield (grid.timesteps[i], grid.alpha[i], grid.sigma[i]), [moved, *seen, latents]


def _unipc_update(
    grid: SolverGrid, i: int, order: int, kind: str, latents: Row, seen: list[Row], arrived: Row | None = None
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
