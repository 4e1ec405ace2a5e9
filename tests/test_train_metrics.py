"""What metrics.jsonl holds, and that a loss that is not finite stops a run."""

import json
from pathlib import Path

import micro
import pytest

from sdjax.errors import TrainingStopped
from sdjax.train import checkpoint
from sdjax.train.loop import train

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
