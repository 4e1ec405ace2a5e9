"""Consistency distillation: its formulas beside diffusers' schedulers and NumPy, and a run in which the loss falls.

A whole run beside a loop of PyTorch is in tests/test_train_equal.py.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import oracle
import pytest
from schedules import CONFIGS

from sdjax.diffusion import NoiseSchedule
from sdjax.errors import ConfigError
from sdjax.train import consistency, loop, stages

CONFIG = CONFIGS["emoji"]
normal = lambda seed: np.random.default_rng(seed).normal(size=(4, 3, 5, 4)).astype(np.float32)


def test_the_path_has_every_timestep_of_the_teacher_and_ends_at_zero():
    """NumPy's statement of the solver's timesteps: k - 1, 2k - 1, ..."""
    timesteps = jnp.arange(1000)
    for steps in (1, 4, 30, 50, 1000):
        skip = 1000 // steps
        expected = np.arange(1, steps + 1) * skip - 1
        start, end = map(np.asarray, consistency.path(timesteps, steps, 1000))
        np.testing.assert_array_equal(np.unique(start), expected)
        np.testing.assert_array_equal(np.unique(end), np.unique([0, *expected[:-1]]))
        kept = np.asarray(timesteps) < steps * skip
        assert (start - np.asarray(timesteps) >= 0)[kept].all() and (start - np.asarray(timesteps) < skip)[kept].all()


def test_at_zero_the_result_is_the_input_and_the_gradient_passes_only_through_the_student():
    schedule = NoiseSchedule.from_config(CONFIG)
    zero = jnp.zeros(4, jnp.int32)
    skip, out = consistency.boundary(zero)
    assert (np.asarray(skip) == 1).all() and (np.asarray(out) == 0).all()
    np.testing.assert_array_equal(consistency.result(schedule, normal(0), normal(1), zero), normal(1))

    def loss(scale, of):
        student = lambda x, t: scale * x * (t[:, None, None, None] if of == "target" else 1)
        output, target = consistency.pair(
            schedule, student, lambda x, t: (x, x), normal(0), normal(1), jnp.full(4, 500), jnp.ones(4), 50
        )
        return jnp.sum(target if of == "target" else output)

    assert float(jax.grad(loss)(0.5, "target")) == 0
    assert float(jax.grad(loss)(0.5, "output")) != 0


@pytest.mark.parity
def test_the_boundary_is_that_of_the_sampler():
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    timesteps = [0, 1, 19, 500, 999]
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(t) for t in timesteps]
    ours = np.stack(consistency.boundary(jnp.asarray(timesteps)), axis=1)
    np.testing.assert_allclose(ours, np.asarray(expected), rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_teachers_step_is_that_of_diffusers_ddim(prediction, zero_snr):
    from diffusers import DDIMScheduler

    if zero_snr and prediction == "epsilon":
        return  # no such model: see diffusion.altered
    config = CONFIG | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr}
    solver = DDIMScheduler.from_config(config)
    solver.set_timesteps(50)
    start, end = consistency.path(jnp.asarray([3, 30, 500, 999]), 50, 1000)
    conditional, unconditional, x, guidance = normal(0), normal(1), normal(2), np.float32([1, 2, 5, 8])
    ours = consistency.teacher_step(
        NoiseSchedule.from_config(config), conditional, unconditional, x, start, end, jnp.asarray(guidance)
    )
    guided = unconditional + guidance[:, None, None, None] * (conditional - unconditional)
    for i, t in enumerate(np.asarray(start).tolist()):
        expected = solver.step(oracle.channels_first(guided[i : i + 1]), t, oracle.channels_first(x[i : i + 1]))
        assert oracle.error(ours[i : i + 1], oracle.channels_last(expected.prev_sample)) <= 2e-5


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_learns_the_teachers_path(settings):
    """The loss of held-out pictures falls, whose noise, time steps and guidance are the same before and after."""
    stage = {
        "train": ["lora"], "steps": 60, "learning_rate": 5e-3, "lora_rank": 8, "lora_targets": "all",
        "consistency_steps": 50, "consistency_guidance": [1.0, 3.0],
    }  # fmt: skip
    config = settings(stages=[stage], validation={"prompts": []}, checkpoint={"every": 0})
    assert loop.train(config) == 0
    first, last = (line["held_out_loss"] for line in micro.metric_lines(Path(config.output), "held_out_loss"))
    print(f"held-out loss {first:.5f} to {last:.5f}")
    assert last < 0.7 * first


def test_a_path_longer_than_the_schedule_is_refused(micro_models, micro_images, tmp_path):
    model = shutil.copytree(micro_models(), tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 40}))
    config = micro.settings(model, micro_images, tmp_path / "run", stages=[{"consistency_steps": 50}])
    with pytest.raises(ConfigError, match=r"stages.0.consistency_steps = 50: .* has 40 time steps"):
        stages.plan_run(config)
