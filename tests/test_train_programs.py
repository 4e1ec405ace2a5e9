"""The programs that a run is planned with are those it runs: the same shapes, and what to change if they do not fit."""

import dataclasses

import jax
import micro
import numpy as np
import pytest
from PIL import Image

from sdjax.data.dataset import make_batch
from sdjax.runtime import chips, compiled
from sdjax.train import programs, stages
from sdjax.train.encoding import encode
from sdjax.train.results import NOTHING

pytestmark = pytest.mark.usefixtures("quick_compilation")

LORA = {"train": ["lora"]}


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), str(leaf.dtype)), tree)


@pytest.fixture
def images(tmp_path):
    return micro.make_images(tmp_path / "images", 6)


@pytest.mark.parametrize(
    ("kind", "stage", "data", "dtype"),
    [
        ({}, LORA, {}, "float32"),
        ({"sdxl": True}, {**LORA, "lora_rank": 1}, {"random_crops": 2}, "bfloat16"),
        ({"inpainting": True}, LORA, {"inpaint_masks": 2, "flip": True}, "bfloat16"),
        ({}, LORA, {"inpaint_masks": 2}, "float16"),
        (
            {"sdxl": True},
            {**LORA, "lora_parts": ["unet", "text_encoder"], "use_dora": True},
            {"accumulation": 2},
            "float32",
        ),
        ({}, {**LORA, "consistency_steps": 10}, {}, "bfloat16"),
        ({"sdxl": True}, {**LORA, "consistency_steps": 10}, {}, "float32"),
        ({}, {**micro.WORDS, "clip_ti_decay": True}, {}, "bfloat16"),
        ({}, {**LORA, "masked_loss": True, "prior_prompt": "a circle", "prior_count": 2}, {}, "float32"),
        ({}, {"train": ["unet"], "ema_decay": 0.9}, {"flip": True}, "bfloat16"),
        ({}, {"train": ["vae"]}, {"flip": True}, "float32"),
    ],
    ids=[
        "lora",
        "sdxl",
        "inpainting",
        "holes",
        "text",
        "distilled",
        "distilled sdxl",
        "words",
        "masks",
        "whole",
        "vae",
    ],
)
def test_the_shapes_are_those_of_the_run(micro_models, images, tmp_path, kind, stage, data, dtype):
    for path in images.glob("*.png"):  # masked_loss takes the alpha channel
        Image.open(path).convert("RGBA").save(path)
    table = {"path": str(images), "resolution": 16, "batch_size": 2, "validation_count": 2, **data}
    model = micro_models(**kind)
    run = stages.plan_run(micro.settings(model, images, tmp_path / "run", stages=[stage], data=table, dtype=dtype))
    (plan,) = run.stages
    dataset, _ = encode(run, plan, NOTHING)
    batch = make_batch(dataset, plan.order(dataset.repeats, 0), 0)
    assert shapes_of(programs.batch_shapes(plan, programs.largest(plan))) == shapes_of(batch)
    state, frozen = stages.prepare(run, plan, NOTHING)
    assert shapes_of(plan.state) == shapes_of(state)
    assert shapes_of(plan.frozen) == shapes_of(frozen)


def test_the_step_is_the_program_that_runs(settings):
    config = settings(stages=[LORA], parallel={"mesh": {"data": 2}})
    run = stages.plan_run(config)
    (plan,) = run.stages
    dataset, _ = encode(run, plan, NOTHING)
    state, frozen = stages.prepare(run, plan, NOTHING)
    batch = make_batch(dataset, plan.order(dataset.repeats, 0), 0)
    placed = plan.parallel.place_state(state), plan.parallel.place_frozen(frozen), plan.parallel.place_batch(batch)
    lowered = plan.parallel.step.lower(*placed, plan.keys(0)[1])
    (planned,) = compiled.compile_for(chips.present(), [programs.step(config, [plan], jax.devices())])
    assert planned.program.devices == 2
    figures = compiled.figures_of(lowered.compile(), lowered, 0.0)
    assert planned.figures is not None
    assert planned.figures._replace(compile_seconds=0.0) == figures
    assert figures.flops > 1e5 and 0 < figures.between["all-reduce"] < 20_000
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert weights < figures.memory < 20 * weights


def test_accumulated_gradients_count_as_one_batch(settings):
    def step(**data):
        config = settings(stages=[LORA], data=data)
        devices = jax.devices()[:1]
        (planned,) = compiled.compile_for(
            chips.present(), [programs.step(config, stages.plan_runs(config, devices)[0].stages, devices)]
        )
        return planned.figures

    whole, halves = step(batch_size=4), step(batch_size=2, accumulation=2)
    assert whole is not None and halves is not None
    assert abs(halves.flops / whole.flops - 1) < 0.1  # the sum of the gradients comes on top
    assert 1 <= halves.moved / whole.moved < 2


def test_all_programs_of_a_run_with_copies(settings):
    copies = [{"name": "a"}, {"name": "b", "seed": 1}]
    planned = list(programs.training(settings(copies=copies), jax.devices()))
    names = ["encode images", "encode captions", "step", "held-out loss", "encode text", "sampler step", "decode"]
    assert [program.name for program in planned] == [f"style: {name}" for name in names]
    # 8 images at once, 16 captions at once; 3 validations of 2 pictures in 2 steps, and of 4 images at 4 time steps
    assert [program.runs for program in planned] == [2, 1, 6, 3 * 4, 6, 12, 6]
    one, two = (
        compiled.compile_for(chips.present(), [next(p for p in found if p.name == "style: step")])[0].figures
        for found in (programs.training(settings(), jax.devices()), planned)
    )
    assert one is not None and two is not None
    assert 1.8 < two.flops / one.flops < 2.2


@pytest.mark.parametrize("parallel", [{"mode": "pmap", "mesh": {"data": 2}}, {"mesh": {"data": 1, "tensor": 2}}])
def test_pmap_and_tensor_are_planned_too(settings, parallel):
    config = settings(parallel=parallel)
    (planned,) = compiled.compile_for(
        chips.present(), [p for p in programs.training(config, jax.devices()) if p.name == "style: step"]
    )
    assert planned.program.devices == 2
    assert planned.figures is not None and planned.figures.between["all-reduce"] > 0


def test_advice_names_what_makes_a_run_fit(settings, monkeypatch):
    config = settings(stages=[LORA], data={"batch_size": 8, "validation_count": 2})
    target = chips.present()
    (plan,) = stages.plan_run(config).stages
    needed = compiled.compile_for(target, [programs.step(config, [plan], jax.devices())])[0].memory
    changes = programs._changes(config, 1)
    assert [list(values) for values in changes] == [
        ["dtype = 'bfloat16'"],
        ["base_dtype = 'int8'"],
        ["data.batch_size = 1, data.accumulation = 8"],
        [f"remat = true, remat_policy = '{policy}'" for policy in ("attention", "blocks", "levels")],
    ]
    meshes = [
        list(programs._changes(dataclasses.replace(config, data=data), 4)[-1])
        for data in (config.data, dataclasses.replace(config.data, batch_size=1))
    ]
    assert meshes == [["parallel.mesh = { data = 1, fsdp = 4 }"], ["parallel.mesh = { data = 1, tensor = 4 }"]]
    stronger = programs._changes(dataclasses.replace(config, remat=True), 1)[-1]
    assert list(stronger) == ["remat = true, remat_policy = 'levels'"]
    monkeypatch.setattr(programs, "_changes", lambda *_: changes[:3:2])
    smaller = target._replace(memory=0.7 * needed)
    assert programs.advice(config, smaller)[-1].startswith("data.batch_size = 1, data.accumulation = 8: 0.0 GB")
    nothing_fits = lambda target, tried: [compiled.Planned(program, None, 9.0) for program in tried]
    monkeypatch.setattr(programs, "compile_for", nothing_fits)
    assert programs.advice(config, smaller) == []


def test_memory_beside_a_program_counts():
    target = chips.present()
    leaf = compiled.on_device({"x": np.zeros((250, 1000), np.float32)}, target.devices[0])
    lower = lambda place: jax.jit(lambda x: x + 1).lower(*place(np.zeros(10, np.float32)))
    alone, beside = compiled.compile_for(
        target, [compiled.Program("alone", lower, 1), compiled.Program("beside", lower, 1, resident=leaf)]
    )
    assert beside.memory - alone.memory == 1_000_000
    assert not compiled.fits(beside, target._replace(memory=900_000))
