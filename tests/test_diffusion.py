"""Noise schedules, noise, targets and losses against their formulas in NumPy, and against diffusers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax import diffusion
from sdjax.diffusion import NoiseSchedule
from sdjax.draw import sampling
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
    # Both start from the same values here, because 1 - alpha of the first step cancels all but three digits of them.
    theirs.alphas_cumprod = torch.tensor(np.asarray(ours.alphas_cumprod))
    latents, noise, timesteps = normal(0), normal(1), np.array([0, 1, 250, 700, 898, 899])
    tensors = torch.tensor(np.asarray(latents)), torch.tensor(np.asarray(noise)), torch.tensor(timesteps)
    noised = diffusion.add_noise(ours, latents, noise, jnp.asarray(timesteps))
    np.testing.assert_allclose(noised, theirs.add_noise(*tensors).numpy(), atol=1e-5)
    velocity = diffusion.target(
        NoiseSchedule.from_config(config | {"prediction_type": "v_prediction"}), latents, noise, jnp.asarray(timesteps)
    )
    np.testing.assert_allclose(velocity, theirs.get_velocity(*tensors).numpy(), atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(diffusion.BETA_DEFAULTS))
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
    flat = jnp.zeros_like(cond)  # a model whose last layer begins as zeros
    np.testing.assert_array_equal(diffusion.rescale_guidance(flat, flat, 0.0), flat)


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
    # Algorithm 1 is affine in sqrt(alphas_cumprod).
    before, after = np.sqrt(plain.alphas_cumprod.astype(np.float64)), np.sqrt(rescaled.alphas_cumprod)
    np.testing.assert_allclose(after, (before - before[-1]) * before[0] / (before[0] - before[-1]), atol=2e-5)


@settings(max_examples=12, deadline=None)
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
        assert np.isfinite(denoised).all()  # nothing of the image is left
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
    expected = {"epsilon": 1 / root, "v_prediction": 1 / (root**2 + 1), "sample": root}[kind]
    np.testing.assert_allclose(diffusion.loss_weight(schedule, TIMESTEPS, debiased=True), expected, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_diffusers_scripts(kind):
    import diffusers
    import torch
    from diffusers.training_utils import compute_snr

    ratio = compute_snr(diffusers.DDPMScheduler.from_config(SD), torch.tensor(np.asarray(TIMESTEPS)))
    expected = torch.clamp(ratio, max=5.0) / (ratio + (kind == "v_prediction"))
    weights = diffusion.loss_weight(schedule_of(kind), TIMESTEPS, min_snr_gamma=5.0)
    np.testing.assert_allclose(weights, expected.numpy(), rtol=1e-4)


@pytest.mark.parametrize(("kind", "at_zero"), [("epsilon", (1, 0)), ("v_prediction", (0, 1)), ("sample", (0, 0))])
def test_weights_are_defined_at_zero_snr(kind, at_zero):
    schedule, last = schedule_of(kind, zero_snr=True), jnp.asarray([999])
    assert diffusion.loss_weight(schedule, last, min_snr_gamma=5.0) == at_zero[0]
    assert diffusion.loss_weight(schedule, last, debiased=True) == at_zero[1]
    assert diffusion.loss_weight(schedule, last) == 1


@pytest.mark.parametrize("options", [{"min_snr_gamma": 0.0}, {"min_snr_gamma": 5.0, "debiased": True}])
def test_wrong_options_of_weights_are_refused(options):
    with pytest.raises(ConfigError, match="min_snr_gamma"):
        diffusion.loss_weight(schedule_of(), TIMESTEPS, **options)


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


def test_without_options_all_timesteps_have_weight_one():
    np.testing.assert_array_equal(diffusion.loss_weight(schedule_of(), TIMESTEPS), np.ones(6, np.float32))


# Random numbers of an example.


def test_noise_without_options_is_normal_noise():
    key = jax.random.key(3)
    drawn = diffusion.noise(key, (5, 4, 3), offset=0.0, multires_iterations=0)
    np.testing.assert_array_equal(drawn, jax.random.normal(key, (5, 4, 3), jnp.float32))


def draw_many(count, function):
    return jax.jit(jax.vmap(function))(jax.random.split(jax.random.key(0), count))


def test_offset_noise_moves_whole_channels():
    drawn = np.asarray(draw_many(2000, lambda key: diffusion.noise(key, (4, 5, 3), offset=0.5)))
    assert drawn.dtype == np.float32
    # The mean of a channel has the variance of the shift and that of 20 independent numbers.
    assert drawn.mean((1, 2)).var() == pytest.approx(0.5**2 + 1 / 20, rel=0.06)
    inside = drawn - drawn.mean((1, 2), keepdims=True)
    assert inside.var() * 20 / 19 == pytest.approx(1, rel=0.03)
    assert np.corrcoef(drawn.mean((1, 2)).T)[0, 1] == pytest.approx(0, abs=0.08)


@pytest.mark.parity
@pytest.mark.parametrize(("shape", "iterations"), [((5, 7, 4), 6), ((5, 7, 4), 2)])
def test_multiresolution_noise_is_kohyas_with_octaves_of_half_the_size(shape, iterations):
    import torch

    key, discount, offset = jax.random.key(5), 0.7, 0.2
    keys = jax.random.split(key, 2 + iterations)
    normal = lambda key, shape: torch.tensor(np.asarray(jax.random.normal(key, shape))).permute(2, 0, 1)[None]
    expected = normal(keys[0], shape) + offset * normal(keys[1], (1, 1, shape[2]))
    upsample = torch.nn.Upsample(size=shape[:2], mode="bilinear")
    for i in range(iterations):
        size = [max(1, int(side / 2**i)) for side in shape[:2]]
        expected += upsample(normal(keys[2 + i], (*size, shape[2]))) * discount**i
        if 1 in size:
            break
    expected = (expected / expected.std())[0].permute(1, 2, 0).numpy()
    drawn = diffusion.noise(key, shape, offset=offset, multires_iterations=iterations, multires_discount=discount)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_octaves_end_with_a_side_of_one():
    few, many = (diffusion.noise(jax.random.key(0), (5, 7, 4), multires_iterations=n) for n in (3, 12))
    np.testing.assert_array_equal(few, many)
    assert jnp.std(few, ddof=1) == pytest.approx(1, rel=1e-5)


def test_unbiased_timesteps_are_uniform_integers():
    key = jax.random.key(7)
    assert diffusion.draw_timestep(key, 100, 900) == jax.random.randint(key, (), 100, 900)


@pytest.mark.parametrize("bias", ["earlier", "later"])
@pytest.mark.parametrize(("low", "high", "multiplier", "portion"), [(0, 10, 3.0, 0.25), (200, 208, 0.5, 0.5)])
def test_biased_timesteps_have_the_weights_of_diffusers_script(bias, low, high, multiplier, portion):
    draw = lambda key: diffusion.draw_timestep(key, low, high, bias=bias, multiplier=multiplier, portion=portion)
    drawn = np.asarray(draw_many(20000, draw))
    assert drawn.dtype == np.int32
    weights = np.ones(high - low)
    count = int(portion * (high - low))
    weights[slice(0, count) if bias == "earlier" else slice(-count, None)] *= multiplier
    expected = weights / weights.sum()
    counts = np.bincount(drawn - low, minlength=high - low)
    assert len(counts) == high - low
    np.testing.assert_allclose(counts / len(drawn), expected, atol=5 * np.sqrt(expected.max() / len(drawn)))


def test_a_bias_towards_an_empty_portion_changes_nothing():
    drawn = np.asarray(
        draw_many(5000, lambda key: diffusion.draw_timestep(key, 0, 3, bias="later", multiplier=9.0, portion=0.2))
    )
    np.testing.assert_allclose(np.bincount(drawn) / 5000, np.full(3, 1 / 3), atol=0.04)


# Distances.


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.floats(1e-3, 1e3), c=st.floats(1e-3, 1.0))
def test_distances(seed, size, c):
    output, target = size * normal(seed, (2, 3, 3, 4)), size * normal(seed + 1, (2, 3, 3, 4))
    thresholds = np.array([c, 1.0])
    got = {
        kind: np.asarray(diffusion.distance(output, target, kind, jnp.asarray(thresholds, jnp.float32)))
        for kind in ("l2", "l1", "huber")
    }
    d = np.asarray(output, np.float64) - np.asarray(target, np.float64)
    wide = np.float32(thresholds).astype(np.float64).reshape(2, 1, 1, 1)
    expected = {"l2": d**2, "l1": np.abs(d), "huber": 2 * wide * (np.sqrt(d**2 + wide**2) - wide)}
    for kind, value in got.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[kind], rtol=2e-5, atol=1e-6 * size * min(size, 1))
    assert (got["huber"] <= np.minimum(got["l2"], 2 * wide * got["l1"]) * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_distances_at_a_perfect_prediction_and_in_half_precision(kind):
    c = jnp.asarray([0.1], jnp.float32)
    target = normal(0, (1, 2, 2, 4)).astype(jnp.bfloat16)
    value, gradient = jax.value_and_grad(lambda x: diffusion.distance(x, target, kind, c).sum())(target)
    assert (value, value.dtype, gradient.dtype) == (0, jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), 0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_huber_thresholds_are_kohyas(zero_snr, c):
    schedule, t = schedule_of("v_prediction", zero_snr), np.asarray(TIMESTEPS)
    threshold = lambda kind: np.asarray(diffusion.huber_threshold(schedule, TIMESTEPS, c, kind))
    np.testing.assert_array_equal(threshold("constant"), np.full(6, c, np.float32))
    np.testing.assert_allclose(threshold("exponential"), np.exp(-(-np.log(c) / 1000) * t), rtol=1e-6)
    with np.errstate(divide="ignore"):
        alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)[t]
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    np.testing.assert_allclose(threshold("snr"), (1 - c) / (1 + sigmas) ** 2 + c, rtol=1e-5)
    assert all(threshold(kind).dtype == np.float32 for kind in ("constant", "exponential", "snr"))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: diffusion.distance(normal(0), normal(1), "l3", jnp.ones(6)), ["'l3'", "l2, l1, huber"]),
        (lambda: diffusion.huber_threshold(schedule_of(), TIMESTEPS, 0.1, "cosine"), ["'cosine'", "exponential"]),
        (lambda: diffusion.draw_timestep(jax.random.key(0), 0, 9, bias="middle"), ["'middle'", "earlier, later"]),
        (lambda: diffusion.altered(schedule_of(), prediction_type="x0"), ["'x0'", "v_prediction"]),
        (lambda: diffusion.altered(schedule_of(), zero_terminal_snr=True), ["'epsilon'", "v_prediction"]),
        (
            lambda: diffusion.altered(schedule_of("v_prediction", zero_snr=True), prediction_type="epsilon"),
            ["'epsilon'", "v_prediction"],
        ),
    ],
)
def test_errors_name_the_value_and_the_choices(call, names):
    with pytest.raises(ConfigError) as raised:
        call()
    for name in names:
        assert name in str(raised.value)


# Schedules other than the one in the model's config.


def test_without_options_the_schedule_stays():
    schedule = schedule_of()
    assert diffusion.altered(schedule) is schedule
    assert diffusion.altered(schedule, prediction_type="epsilon") is schedule


def test_another_prediction_type_keeps_the_noise_levels():
    schedule = NoiseSchedule.from_config({})
    other = diffusion.altered(schedule, prediction_type="v_prediction")
    assert other.prediction_type == "v_prediction"
    assert other.config == {**schedule.config, "prediction_type": "v_prediction"}
    np.testing.assert_array_equal(other.alphas_cumprod, schedule.alphas_cumprod)
    assert schedule.prediction_type == "epsilon"


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # from torch tensors in `np.array`
@pytest.mark.parametrize("name", sorted(diffusion.BETA_DEFAULTS))
def test_a_rescaled_schedule_is_one_that_diffusers_draws_with(name):
    import diffusers

    plain = NoiseSchedule.from_config({"_class_name": name, "prediction_type": "v_prediction"})
    ours = diffusion.altered(plain, zero_terminal_snr=True)
    theirs = getattr(diffusers, ours.config["_class_name"])
    assert (name in diffusion.RESCALING) == (
        "rescale_betas_zero_snr" in inspect.signature(vars(diffusers)[name]).parameters
    )
    scheduler = theirs.from_config(dict(ours.config))
    np.testing.assert_allclose(ours.alphas_cumprod, scheduler.alphas_cumprod.numpy(), rtol=2e-6, atol=1e-7)
    np.testing.assert_array_equal(ours.betas, plain.betas)
    assert ours.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    assert ours.config["_class_name"] == name or not scheduler.config.clip_sample


@pytest.mark.parametrize("sampler", sorted(sampling.SAMPLERS))
@pytest.mark.parametrize("steps", [1, 20])
def test_every_sampler_has_a_table_for_a_rescaled_schedule(sampler, steps):
    schedule = diffusion.altered(NoiseSchedule.from_config({}), prediction_type="v_prediction", zero_terminal_snr=True)
    table = sampling.tabulate(schedule, sampler, steps, max_steps=20)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((table.levels, table.mix)))
    assert table.levels.timestep[0] == 999
