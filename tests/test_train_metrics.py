"""What metrics.jsonl holds, and that a loss that is not finite stops a run."""

import json
from pathlib import Path

import jax
import micro
import numpy as np
import pytest
from PIL import Image

from sdjax import trees
from sdjax.errors import TrainingStopped
from sdjax.train import checkpoint, stages
from sdjax.train.curves import loss_curves
from sdjax.train.loop import train
from sdjax.train.metrics import Metrics
from sdjax.train.results import NOTHING

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_there_is_a_line_for_each_step_and_each_validation(finished):
    output, _ = finished
    steps = micro.metric_lines(output)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(
        set(line) == {"stage", "step", "loss", "learning_rate", "grad_norm", "examples_per_second"} for line in steps
    )
    assert all(line["learning_rate"] == pytest.approx(5e-3) and line["stage"] == "style" for line in steps)
    assert [line["step"] for line in micro.metric_lines(output, "held_out_loss")] == [0, 3, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(settings):
    config = settings(stages=[{"learning_rate": 1e30, "clip_norm": 0.0}], checkpoint={"every": 1}, validation={})
    with pytest.raises(TrainingStopped, match="learning_rate"):
        train(config)
    folder = f"{config.output}/checkpoints"
    assert checkpoint.steps(folder)
    for line in Path(config.output, "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_step_whose_result_overflows_is_not_taken(settings, on_nan):
    """The loss and the gradient are finite; only the weights would not be."""
    stage = {"learning_rate": 3e38, "weight_decay": 100.0, "steps": 2}
    config = settings(stages=[stage], checkpoint={"every": 1}, validation={}, on_nan=on_nan)
    if on_nan == "stop":
        with pytest.raises(TrainingStopped, match=r"step 1: loss \d"):
            train(config)
        assert not checkpoint.steps(f"{config.output}/checkpoints")
        return
    assert train(config) == 0
    expected = stages.plan_run(config).stages[0].state
    state = checkpoint.restore(f"{config.output}/checkpoints", lambda _: {"earlier": NOTHING, "state": expected}).state
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["state"].trainable))
    assert not any(np.any(layer["up"]) for _, layer in trees.layers(state["state"].trainable["unet"], "up"))


def test_a_held_out_loss_that_is_not_finite_is_null(settings, tmp_path):
    run = stages.plan_run(settings())
    metrics = Metrics(tmp_path / "metrics.jsonl", run, stage=0, step=0)
    with metrics.of_stage(run.stages[0], 0, shown=False):
        metrics.held_out(0, float("nan"))
    assert micro.metric_lines(tmp_path, "held_out_loss") == [{"stage": "style", "step": 0, "held_out_loss": None}]


def test_a_run_leaves_the_curves_of_its_losses(finished, tmp_path):
    output, _ = finished
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    expected = loss_curves(lines)
    assert expected is not None and (np.asarray(Image.open(output / "loss.png")) == np.asarray(expected)).all()


def test_there_are_no_curves_before_the_first_step(settings, tmp_path):
    run = stages.plan_run(settings())
    metrics = Metrics(tmp_path / "metrics.jsonl", run, stage=0, step=0)
    with metrics.of_stage(run.stages[0], 0, shown=False):
        assert metrics.draw_losses() is None
        metrics.held_out(0, 1.0)
        assert metrics.draw_losses() is None
    assert not (tmp_path / "loss.png").exists()
