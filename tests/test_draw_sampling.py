"""What sampling promises of every sampler: noise levels, seeds, batches, one compiled program, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pictures import OTHERS, STOCHASTIC
from schedules import CONFIGS, IMAGE, NOISE, keys_of

from sdjax.diffusion import NoiseSchedule
from sdjax.draw import sampling
from sdjax.draw.samplers import SAMPLERS
from sdjax.errors import ConfigError


def simple_denoise(x, level):
    return jnp.tanh(x + level.timestep / 1000)


@jax.jit
def simple_run(table, state, keys):
    return sampling.sample(simple_denoise, table, state, keys)


@jax.jit
def simple_step(table, state, keys, i):
    return sampling.step(simple_denoise, state, i, table, keys)


def test_noised_runs_from_the_first_level_to_the_image_itself():
    table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS["sdxl"]), "heun", 6, strength=0.5)
    image, noise = jnp.asarray(IMAGE), jnp.asarray(NOISE)
    np.testing.assert_array_equal(sampling.noised(table, table.length, image, noise), image)
    np.testing.assert_array_equal(
        sampling.noised(table, 0, image, noise), sampling.initial_from_image(table, image, noise).latents
    )
    sigmas = np.asarray(table.levels.sigma)[: int(table.length)]
    assert sigmas[0] > sigmas[1] == sigmas[2] > sigmas[3] == sigmas[4] > 0


@pytest.mark.parametrize(("sampler", "before"), [("ddim", 6), ("euler", 6), ("heun", 12), ("pndm", 7)])
def test_a_refiner_takes_over_at_the_step_below_the_timestep(sampler, before):
    """A method without history goes on as if one model drew all steps; another begins anew."""
    schedule = NoiseSchedule.from_config(CONFIGS["sdxl"])
    whole = sampling.tabulate(schedule, sampler, 10)
    table = sampling.switched(
        whole, 400, lambda steps: sampling.tabulate(schedule, sampler, 10, strength=(steps + 0.5) / 10)
    )
    timesteps = np.asarray(table.levels.timestep)
    switch, length = int(table.switch), int(table.length)
    assert switch == before and (timesteps[: switch - 1] >= 400).all() and (timesteps[switch:length] < 400).all()
    if sampler == "pndm":
        assert not table.mix[switch, 0, 1 : 1 + sampling.HISTORY].any()
        assert whole.mix[switch, 0, 1 : 1 + sampling.HISTORY].any()
    else:
        jax.tree.map(np.testing.assert_array_equal, table._replace(switch=whole.switch), whole)
    alone = sampling.switched(whole, 0, lambda steps: pytest.fail("no step is below 0"))
    assert alone is whole and whole.switch == whole.length


def test_samplers_steps_strengths_and_spacings_share_one_program():
    schedule = NoiseSchedule.from_config(CONFIGS["sd1"])
    noise, keys = jnp.asarray(NOISE), keys_of(2)
    simple_run.clear_cache()
    results = []
    for sampler, method in SAMPLERS.items():
        for steps, strength, spacing in ((3, 1.0, None), (8, 0.5, None), *((4, 1.0, name) for name in method.spacings)):
            table = sampling.tabulate(schedule, sampler, steps, strength=strength, spacing=spacing)
            results.append(np.asarray(simple_run(table, sampling.initial(table, noise), keys)))
    assert simple_run._cache_size() == 1
    # "leading" is what some samplers do anyway, and for 4 of 1000 timesteps "simple" is the same as "trailing".
    assert len({result.tobytes() for result in results}) > 0.7 * len(results)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "unipc", "pndm"])
def test_a_python_loop_of_steps_equals_sample(sampler):
    schedule = NoiseSchedule.from_config(CONFIGS["emoji"])
    table = sampling.tabulate(schedule, sampler, 6)
    state, keys = sampling.initial(table, jnp.asarray(NOISE)), keys_of(2)
    whole = simple_run(table, state, keys)
    for i in range(int(table.length)):
        state = simple_step(table, state, keys, i)
    np.testing.assert_allclose(state.latents, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler):
    table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS["sd1"]), sampler, 4)
    keys, noise = keys_of(3), jnp.asarray(NOISE)

    def draw(noise, keys):
        return np.asarray(simple_run(table, sampling.initial(table, noise), keys))

    together = draw(noise, keys[:2])
    np.testing.assert_allclose(draw(noise[1:2], keys[1:2])[0], together[1], rtol=1e-6, atol=1e-6)
    reseeded = draw(noise, keys[1:])
    assert np.array_equal(reseeded, together) == (sampler not in STOCHASTIC + OTHERS or sampler == "restart")


@jax.jit
def thresholded_run(table, state, keys):
    return sampling.sample(lambda x, level: 2 * x, table, state, keys)


def test_dynamic_thresholding_is_image_by_image():
    config = CONFIGS["sd1"] | {"thresholding": True, "sample_max_value": 3.0}
    table = sampling.tabulate(NoiseSchedule.from_config(config), "dpmpp_2m", 2)
    noise = jnp.asarray(NOISE)

    def draw(scale):
        state = sampling.initial(table, noise * jnp.asarray([1.0, scale])[:, None, None, None])
        return np.asarray(thresholded_run(table, state, keys_of(2)))

    plain, loud = draw(1.0), draw(100.0)
    np.testing.assert_allclose(loud[0], plain[0], rtol=1e-6)
    assert np.abs(loud[1]).max() < 2 < np.abs(100 * plain[1]).max()


def test_half_precision_denoisers_leave_the_state_in_float32():
    table = sampling.tabulate(NoiseSchedule.from_config(CONFIGS["sd1"]), "dpmpp_2m", 3)
    state = sampling.initial(table, jnp.asarray(NOISE, jnp.bfloat16))
    result = jax.eval_shape(lambda: sampling.sample(lambda x, level: x.astype(jnp.bfloat16), table, state, keys_of(2)))
    assert state.latents.dtype == result.dtype == jnp.float32


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_sampling_lowers_for_every_platform(platform):
    table = sampling.tabulate(NoiseSchedule.from_config({}), "euler_a", 3)
    drawn = jax.jit(lambda table, state, keys: sampling.sample(lambda x, level: x / 2, table, state, keys))
    traced = drawn.trace(table, sampling.initial(table, jnp.asarray(NOISE)), keys_of(2))
    assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("sampler", "how", "config", "names"),
    [
        ("eular", {}, {}, ["'eular'", "ddim, ddpm, pndm, lms, heun, euler"]),
        ("ddim", {"steps": 0}, {}, ["steps 0", "1 and 1000"]),
        ("ddim", {"steps": 1001}, {}, ["1001"]),
        ("ddim", {"steps": 30, "max_steps": 20}, {}, ["30", "1 and 20"]),
        ("lcm", {"steps": 51}, {}, ["51", "at most 50"]),
        ("unipc", {"steps": 1000}, {}, ["1000 steps", "use fewer"]),
        ("ddim", {"strength": 0.0}, {}, ["strength 0.0"]),
        ("ddim", {"strength": 1.1}, {}, ["strength 1.1"]),
        ("ddim", {"strength": 0.05}, {}, ["strength 0.05", "10 steps", "0.1"]),
        ("ddim", {"spacing": "karras"}, {}, ["'ddim'", "'karras'", "leading, linspace, trailing, sgm_uniform, simple"]),
        ("lcm", {"spacing": "trailing"}, {}, ["'lcm'", "'trailing'", "one of its own"]),
        ("euler", {"spacing": "odd"}, {}, ["'odd'", "simple, karras, exponential, beta"]),
        ("euler", {}, {"use_flow_sigmas": True}, ["use_flow_sigmas", "only False"]),
        ("euler", {}, {"variance_type": "learned"}, ["variance_type", "None, 'fixed_small'"]),
        ("ddpm", {}, {"variance_type": "learned"}, ["'learned'", "fixed_small, fixed_small_log, fixed_large"]),
        ("unipc", {}, {"predict_x0": False}, ["predict_x0"]),
        ("unipc", {}, {"solver_order": 4}, ["solver_order 4", "1, 2, 3"]),
        ("dpmpp_2m", {}, {"solver_type": "bh3"}, ["'bh3'", "midpoint, heun"]),
        ("euler", {}, {"interpolation_type": "cubic"}, ["'cubic'", "log_linear"]),
        ("euler", {}, {"final_sigmas_type": "one"}, ["'one'", "sigma_min"]),
        ("ddim", {}, {"timestep_spacing": "odd"}, ["'odd'", "linspace, leading, trailing"]),
    ],
)
def test_what_cannot_be_had_is_named(sampler, how, config, names):
    schedule = NoiseSchedule.from_config(CONFIGS["sd1"] | config)
    with pytest.raises(ConfigError) as raised:
        sampling.tabulate(schedule, sampler, how.pop("steps", 10), **how)
    for name in names:
        assert name in str(raised.value)
