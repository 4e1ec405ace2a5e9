"""Samplers: from noise to latents, with the results of diffusers' schedulers of the same config.

Every sampler is linear in the latents, the denoised latents, a few remembered arrays and fresh noise. So `solvers` runs
the published update rule once, on the host, with coefficients in place of arrays. The result is one small matrix for
each evaluation of the denoiser: the `Table`. The device only evaluates the denoiser and takes the linear combination,
which is the same program for every sampler. Another sampler, number of steps, strength or spacing compiles nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdjax.draw.levels import CURVES, TIMESTEP_SPACINGS, Task
from sdjax.draw.samplers import ONLY, SAMPLERS
from sdjax.draw.solvers import HISTORY
from sdjax.errors import ConfigError


class Level(NamedTuple):
    """A noise level: the timestep, which may be fractional, and the scales, with alpha^2 + sigma^2 = 1."""

    timestep: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]


Denoise = Callable[[Float[Array, "B ..."], Level], Float[Array, "B ..."]]
"""(x, level) -> x0: estimates the latents without noise, x0, from x = alpha x0 + sigma eps."""


class Table(NamedTuple):
    """All numbers of one sampling run: an entry for each evaluation of the denoiser, padded to N entries.

    levels: the noise level of each evaluation, [N]. The padding has alpha = 1 and sigma = 0.
    mix: the coefficients of each evaluation. A row gives one new array (the latents, then the history); a column
        belongs to one old array (the latents, the history, the denoised latents, these limited, and noise).
    length: the number of evaluations without the padding.
    switch: the number of evaluations before a refiner takes over; `length` without a refiner.
    start_scale: the factor of the unit noise that sampling starts from.
    clip: denoised latents are limited to [-clip, clip]; infinity for most models.
    threshold: None, or [quantile, largest] of dynamic thresholding, which then takes the place of clip.
    """

    levels: Level
    mix: Float[Array, "N rows columns"]
    length: Int[Array, ""]
    switch: Int[Array, ""]
    start_scale: Float[Array, ""]
    clip: Float[Array, ""]
    threshold: Float[Array, "2"] | None


class State(NamedTuple):
    """The state between two evaluations. After the last evaluation `latents` is the result."""

    latents: Float[Array, "B ..."]
    history: Float[Array, "HISTORY B ..."]


class Schedule(Protocol):
    """The part of a `diffusion.NoiseSchedule` that `tabulate` reads."""

    @property
    def alphas_cumprod(self) -> np.ndarray: ...
    @property
    def betas(self) -> np.ndarray: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


def tabulate(
    schedule: Schedule,
    sampler: str,
    steps: int,
    *,
    spacing: str | None = None,
    strength: float = 1.0,
    max_steps: int = 1000,
) -> Table:
    """Computes the table of a sampling run, on the host.

    steps: in 1..max_steps. Tables of one max_steps have one size, so they share one compiled program. Samplers with two
    evaluations a step evaluate the denoiser 2 steps - 1 times. pndm evaluates it steps + 1 times or, without
    skip_prk_steps, steps + 9 times.
    strength: in (0, 1]; below 1 the first steps are left out, as in diffusers' img2img.
    spacing: of the timesteps, one of `levels.TIMESTEP_SPACINGS`, or of the noise levels, one of `levels.CURVES`.
    None: as the config of the scheduler says.
    Raises ConfigError for a sampler, number of steps, strength or scheduler option that is not supported.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    most = min(max_steps, len(schedule.betas))
    if not 1 <= steps <= most:
        raise ConfigError(f"steps {steps} must lie between 1 and {most}")
    if not 0 < strength <= 1:
        raise ConfigError(f"strength {strength} must lie above 0 and at most at 1")
    if (kept := int(steps * strength)) < 1:
        raise ConfigError(
            f"strength {strength} of {steps} steps leaves none to run; use a strength of {1 / steps:.3g} or more steps"
        )
    method, options = SAMPLERS[sampler], _scheduler_options(schedule, sampler, spacing)
    if "rescale_betas_zero_snr" in options:
        alphas_cumprod = schedule.alphas_cumprod
    else:
        alphas_cumprod = np.cumprod(1 - schedule.betas, dtype=np.float64).astype(np.float32)
    task = Task(alphas_cumprod.astype(np.float64), schedule.prediction_type, options, steps, steps - kept)
    with np.errstate(divide="ignore", invalid="ignore"):  # log(alpha / sigma) is infinite where the last sigma is 0
        entries = list(method.entries(task))

    capacity = 2 * max_steps + 10
    levels = np.zeros((3, capacity))
    levels[1] = 1
    mix = np.zeros((capacity, 1 + HISTORY, 4 + HISTORY))
    for i, (level, rows) in enumerate(entries):
        levels[:, i] = level
        mix[i, : len(rows)] = rows
    scaled = method.scaled_start and options["timestep_spacing"] != "leading"
    return Table(
        levels=Level(*(jnp.asarray(row, jnp.float32) for row in levels)),
        mix=jnp.asarray(mix, jnp.float32),
        length=jnp.asarray(len(entries), jnp.int32),
        switch=jnp.asarray(len(entries), jnp.int32),
        start_scale=jnp.asarray(levels[2, 0] if scaled else 1, jnp.float32),
        clip=jnp.asarray(options["clip_sample_range"] if options.get("clip_sample") else np.inf, jnp.float32),
        threshold=jnp.asarray([options["dynamic_thresholding_ratio"], options["sample_max_value"]], jnp.float32)
        if options.get("thresholding")
        else None,
    )


def switched(table: Table, timestep: float, tail: Callable[[int], Table]) -> Table:
    """Returns the table whose steps below a timestep are those of another table, for a refiner.

    tail: makes the table of the last n steps, which begins without history, as in diffusers. Without a step below the
    timestep the table is returned as it is.
    """
    timesteps = np.asarray(table.levels.timestep[: int(table.length)])
    steps = len(np.unique(timesteps[timesteps < timestep]))  # or more, for a sampler of several evaluations in a step
    if not steps:
        return table
    end = tail(steps)
    while (first := float(end.levels.timestep[0])) >= timestep and steps > 1:  # pndm begins a step early
        end = tail(steps := steps - 1)
    # heun also evaluates at this timestep to end the step before, so the last evaluation at it begins the tail.
    switch = int((timesteps > first).sum())
    if (same := np.flatnonzero(timesteps == first)).size:
        switch = int(same[-1])
    levels, mix = jax.tree.map(
        lambda begin, end: jnp.concatenate([begin[:switch], end[: len(end) - switch]]),
        (table.levels, table.mix),
        (end.levels, end.mix),
    )
    return table._replace(levels=levels, mix=mix, length=switch + end.length, switch=jnp.asarray(switch, jnp.int32))


def _scheduler_options(schedule: Schedule, sampler: str, spacing: str | None) -> dict[str, Any]:
    """The options of the sampler's scheduler class, from the config of the schedule or the defaults of the class.

    A spacing takes the place of what the config says of it.
    """
    method, config = SAMPLERS[sampler], schedule.config
    if "use_karras_sigmas" in method.options:
        for option, supported in ONLY.items():
            if (value := config.get(option)) not in (None, *supported):
                choices = ", ".join(map(repr, supported))
                raise ConfigError(f"scheduler option {option} = {value!r} is not supported; only {choices} is")
    options = {key: default if config.get(key) is None else config[key] for key, default in method.options.items()}
    if spacing is None:
        return options
    if spacing not in method.spacings:
        own = ", ".join(method.spacings) or "one of its own"
        raise ConfigError(f"sampler {sampler!r} has no spacing {spacing!r}; it has {own}")
    chosen: dict[str, Any] = {f"use_{name}_sigmas": name == spacing for name in CURVES}
    if spacing in TIMESTEP_SPACINGS:
        chosen |= {"timestep_spacing": spacing, "interpolation_type": "linear"}
    return {**options, **chosen}


def initial(table: Table, noise: Float[Array, "B ..."]) -> State:
    """The state to start from with unit noise alone."""
    return _start(table.start_scale * noise.astype(jnp.float32))


def initial_from_image(table: Table, latents: Float[Array, "B ..."], noise: Float[Array, "B ..."]) -> State:
    """The state to start from with the latents of an image, noised to the first level of the table."""
    return _start(noised(table, 0, latents, noise))


def noised(
    table: Table, i: int | Int[Array, ""], latents: Float[Array, "B ..."], noise: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """Latents with noise of the level of evaluation i, in float32. At i = table.length, the end, they have none."""
    return table.levels.alpha[i] * latents.astype(jnp.float32) + table.levels.sigma[i] * noise.astype(jnp.float32)


def step(denoise: Denoise, state: State, i: int | Int[Array, ""], table: Table, keys: Key[Array, " B"]) -> State:
    """Evaluates the denoiser once, as the i-th entry of the table says, and returns the next state.

    keys: one for each image. The noise of image b is normal(fold_in(keys[b], i)), so it does not depend on the other
    images. The initial noise must come from another key, such as keys[b] itself.
    """
    latents = state.latents
    level = Level(*(values[i] for values in table.levels))
    denoised = denoise(latents, level).astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), latents.shape[1:], jnp.float32))(keys)
    terms = [latents, *state.history, denoised, _limited(denoised, table), noise]
    # Not a matrix product, whose inputs accelerators round to bfloat16 or TF32.
    columns = jnp.reshape(table.mix[i].T, (len(terms), 1 + HISTORY) + (1,) * latents.ndim)
    mixed = functools.reduce(jnp.add, (column * term for column, term in zip(columns, terms, strict=True)))
    return State(mixed[0], mixed[1:])


def sample(denoise: Denoise, table: Table, state: State, keys: Key[Array, " B"]) -> Float[Array, "B ..."]:
    """Runs the whole table in one loop on the device and returns the latents, in float32."""
    return jax.lax.fori_loop(0, table.length, lambda i, state: step(denoise, state, i, table, keys), state).latents


def _start(latents: Float[Array, "B ..."]) -> State:
    return State(latents, jnp.zeros((HISTORY, *latents.shape), jnp.float32))


def _limited(denoised: Float[Array, "B ..."], table: Table) -> Float[Array, "B ..."]:
    """Clips latents, or thresholds them dynamically, image by image (Saharia et al. 2022, section 2.3)."""
    if table.threshold is None:
        return jnp.clip(denoised, -table.clip, table.clip)
    quantile, largest = table.threshold
    bound = jnp.quantile(jnp.abs(denoised).reshape(denoised.shape[0], -1), quantile, axis=1)
    bound = jnp.clip(bound, 1.0, largest).reshape((-1,) + (1,) * (denoised.ndim - 1))
    return jnp.clip(denoised, -bound, bound) / bound
