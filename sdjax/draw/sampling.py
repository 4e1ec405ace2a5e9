"""Samplers: from noise to latents, giving what diffusers' schedulers of the same config give.

Each sampler is linear in what it has seen: the latents, the denoised latents, a few remembered arrays and fresh
noise. So a sampler is its published recurrence, run once on the host (`solvers`) on row vectors that stand for
those arrays, and what comes out is one small matrix an evaluation: the `Table`. The device does only `denoise` and that
linear combination, the same for every sampler, so that another sampler, step count, strength or spacing changes
numbers and compiles nothing.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from sdjax.draw.solvers import HISTORY, ONLY, SAMPLERS, Task
from sdjax.errors import ConfigError


class Level(NamedTuple):
    """A noise level: the timestep the model is told (may be fractional) and the scales, alpha^2 + sigma^2 = 1."""

    timestep: Float[Array, "..."]
    alpha: Float[Array, "..."]
    sigma: Float[Array, "..."]


# (x, level) -> x0: the U-Net with guidance, its output turned into denoised latents. x is alpha x0 + sigma eps.
Denoise = Callable[[Float[Array, "B ..."], Level], Float[Array, "B ..."]]


class Table(NamedTuple):
    """All numbers of one sampling run, padded to N entries, one for each evaluation of the denoiser.

    levels: where each evaluation happens, [N]; past the end alpha = 1 and sigma = 0.
    mix: what each evaluation makes of it, [N, 1 + HISTORY, 4 + HISTORY]: the new latents and history from the latents,
        the history, the denoised latents as they are and limited, and noise.
    length: evaluations that really run.
    start_scale: what unit noise is scaled by to start from.
    clip: denoised latents are limited to [-clip, clip]; infinity for most.
    threshold: None, or [quantile, largest] of dynamic thresholding, which then takes the place of clip.
    """

    levels: Level
    mix: Float[Array, "N rows columns"]
    length: Int[Array, ""]
    start_scale: Float[Array, ""]
    clip: Float[Array, ""]
    threshold: Float[Array, "2"] | None


class State(NamedTuple):
    """Where sampling stands; after the last evaluation `latents` is the result."""

    latents: Float[Array, "B ..."]
    history: Float[Array, "HISTORY B ..."]


class Schedule(Protocol):
    """What `table` reads of a `diffusion.NoiseSchedule`."""

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
    karras: bool = False,
    strength: float = 1.0,
    max_steps: int = 1000,
) -> Table:
    """Work out a sampling run on the host.

    steps: in 1..max_steps, which sets the padding: tables of one max_steps share one compiled program. heun evaluates
    2 steps - 1 times, pndm once or, without skip_prk_steps, nine times more than steps.
    strength: in (0, 1]; below 1 the first steps are left out, as in diffusers' img2img.
    karras: the noise levels of Karras et al. 2022, equation 5; also taken if the scheduler config asks for them.
    Raises ConfigError for a sampler, step count, strength or scheduler option that cannot be had.
    """
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler {sampler!r} is not one of {', '.join(SAMPLERS)}")
    method = SAMPLERS[sampler]
    spaces_karras = "use_karras_sigmas" in method.options
    if karras and not spaces_karras:
        able = ", ".join(name for name, other in SAMPLERS.items() if "use_karras_sigmas" in other.options)
        raise ConfigError(f"sampler {sampler!r} has no Karras sigmas; these have: {able}")
    count = len(schedule.betas)
    if not 1 <= steps <= min(max_steps, count):
        raise ConfigError(f"steps {steps} must lie between 1 and {min(max_steps, count)}")
    if not 0 < strength <= 1:
        raise ConfigError(f"strength {strength} must lie above 0 and at most at 1")
    if (kept := int(steps * strength)) < 1:
        raise ConfigError(
            f"strength {strength} of {steps} steps leaves none to run; use a strength of {1 / steps:.3g} or more steps"
        )
    if spaces_karras:
        for option, supported in ONLY.items():
            if (value := schedule.config.get(option)) not in (None, supported):
                raise ConfigError(f"scheduler option {option} = {value!r} is not supported; only {supported!r} is")
    options = {
        key: default if (value := schedule.config.get(key)) is None else value
        for key, default in method.options.items()
    }
    options["use_karras_sigmas"] = karras or options.get("use_karras_sigmas", False)
    if "rescale_betas_zero_snr" in options:
        alphas_cumprod = schedule.alphas_cumprod
    else:
        alphas_cumprod = np.cumprod(1 - schedule.betas, dtype=np.float64).astype(np.float32)
    task = Task(alphas_cumprod.astype(np.float64), schedule.prediction_type, options, steps, steps - kept)
    with np.errstate(divide="ignore", invalid="ignore"):  # a last sigma of 0 is infinitely far in log(alpha / sigma)
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
        start_scale=jnp.asarray(levels[2, 0] if scaled else 1, jnp.float32),
        clip=jnp.asarray(options["clip_sample_range"] if options.get("clip_sample") else np.inf, jnp.float32),
        threshold=jnp.asarray([options["dynamic_thresholding_ratio"], options["sample_max_value"]], jnp.float32)
        if options.get("thresholding")
        else None,
    )


def initial(table: Table, noise: Float[Array, "B ..."]) -> State:
    """Start from unit noise alone."""
    return _start(table.start_scale * noise.astype(jnp.float32))


def initial_from_image(table: Table, latents: Float[Array, "B ..."], noise: Float[Array, "B ..."]) -> State:
    """Start from an image's latents, noised to the table's first level."""
    return _start(noised(table, 0, latents, noise))


def noised(
    table: Table, i: int | Int[Array, ""], latents: Float[Array, "B ..."], noise: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """True latents, float32, at the level evaluation i starts from; unchanged at i = table.length, the end."""
    return table.levels.alpha[i] * latents.astype(jnp.float32) + table.levels.sigma[i] * noise.astype(jnp.float32)


def step(denoise: Denoise, state: State, i: int | Int[Array, ""], table: Table, keys: Key[Array, " B"]) -> State:
    """One evaluation of the denoiser, the i-th of the table, and what the sampler makes of it.

    keys: one for each image; image b's noise is normal(fold_in(keys[b], i)), so it does not depend on its neighbours.
    Initial noise must come from another key than those folds, such as keys[b] itself.
    """
    latents = state.latents
    level = Level(*(values[i] for values in table.levels))
    denoised = denoise(latents, level).astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), latents.shape[1:], jnp.float32))(keys)
    terms = [latents, *state.history, denoised, _limited(denoised, table), noise]
    # A sum written out, not a matrix product: accelerators round those to bfloat16 or TF32.
    columns = jnp.reshape(table.mix[i].T, (len(terms), 1 + HISTORY) + (1,) * latents.ndim)
    mixed = functools.reduce(jnp.add, (column * term for column, term in zip(columns, terms, strict=True)))
    return State(mixed[0], mixed[1:])


def sample(denoise: Denoise, table: Table, state: State, keys: Key[Array, " B"]) -> Float[Array, "B ..."]:
    """Run the whole table in one loop on the device and return the latents, float32."""
    return jax.lax.fori_loop(0, table.length, lambda i, state: step(denoise, state, i, table, keys), state).latents


def _start(latents: Float[Array, "B ..."]) -> State:
    return State(latents, jnp.zeros((HISTORY, *latents.shape), jnp.float32))


def _limited(denoised: Float[Array, "B ..."], table: Table) -> Float[Array, "B ..."]:
    """Clipped, or dynamically thresholded image by image (Saharia et al. 2022, section 2.3)."""
    if table.threshold is None:
        return jnp.clip(denoised, -table.clip, table.clip)
    quantile, largest = table.threshold
    bound = jnp.quantile(jnp.abs(denoised).reshape(denoised.shape[0], -1), quantile, axis=1)
    bound = jnp.clip(bound, 1.0, largest).reshape((-1,) + (1,) * (denoised.ndim - 1))
    return jnp.clip(denoised, -bound, bound) / bound
