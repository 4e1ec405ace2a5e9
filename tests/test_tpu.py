"""The programs of a small model compile for TPU v5e, on one chip and on four, with the compiler of a TPU.

A kernel written in Pallas, such as that of attention from 512 tokens on, cannot be divided by the compiler.
"""

import json
import shutil

import jax
import micro
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sdjax.data.images import Size
from sdjax.draw.programs import drawing, drawing_with
from sdjax.outline import Outline
from sdjax.runtime import chips, compiled
from sdjax.train import programs

pytestmark = pytest.mark.compiler
SECONDS = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture(autouse=True)
def mixed_types():
    """Allows JAX's attention to mix number types, as it does outside of tests."""
    with jax.numpy_dtype_promotion("standard"):
        yield


LORA = {"train": ["lora"]}
STAGES = {
    "words": {**micro.WORDS, "clip_ti_decay": True},
    "both": {
        "train": ["lora", "textual_inversion"],
        "placeholder_tokens": ["<sky>"],
        "lora_parts": ["unet", "text_encoder"],
    },
    "whole": {"train": ["unet"], "ema_decay": 0.9},
    "autoencoder": {"train": ["vae"]},
}


@pytest.fixture(scope="module")
def attentive(micro_models, tmp_path_factory):
    """A model whose largest feature maps have 1024 tokens with self-attention, for pictures of 64 x 64 pixels."""
    folder = tmp_path_factory.mktemp("attentive") / "model"
    shutil.copytree(micro_models(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    config |= {"sample_size": 32, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    return folder


def training(target, model, images, output, **changes):
    """Returns the compiled training step of a run on all devices of the target."""
    mesh = {"parallel": {"mesh": {"data": -1}}, "validation": {}, "dtype": "bfloat16"}
    config = micro.settings(model, images, output, **{**mesh, **changes})
    found = [p for p in programs.training(config, target.devices) if p.name.endswith(": step")]
    (planned,) = compiled.compile_for(target, found)
    assert planned.program.devices == len(target.devices)
    assert planned.figures is not None
    return planned.figures


@pytest.mark.parametrize("name", ["v5e", "v5e:2x2"])
@pytest.mark.parametrize("stage", STAGES)
def test_training_compiles(micro_models, micro_images, tmp_path, stage, name):
    target = chips.described(name)
    figures = training(target, micro_models(), micro_images, tmp_path / "run", stages=[STAGES[stage]])
    assert figures.cycles and figures.flops > 1e5
    assert ("all-reduce" in figures.between) == (len(target.devices) > 1)


@pytest.mark.parametrize("kind", ["inpainting", "copies", "pmap", "fsdp"])
def test_ways_of_training_compile_for_four_chips(micro_models, micro_images, tmp_path, kind):
    data = {"path": str(micro_images), "resolution": 16, "batch_size": 4}
    changes = {
        "inpainting": {"data": {**data, "inpaint_masks": 2}},
        "copies": {"copies": [{"name": "a"}, {"name": "b", "seed": 1}]},
        "pmap": {"parallel": {"mode": "pmap"}},
        "fsdp": {"parallel": {"mesh": {"data": 1, "fsdp": -1}}},
    }[kind]
    model = micro_models(inpainting=kind == "inpainting")
    training(chips.described("v5e:2x2"), model, micro_images, tmp_path / "run", stages=[LORA], **changes)


@pytest.mark.parametrize(
    ("mesh", "most"),
    [({"data": -1}, 2_000), ({"data": 1, "fsdp": -1}, 20_000_000), ({"data": -1, "tensor": 2}, 5_000_000)],
    ids=["data", "fsdp", "tensor"],
)
def test_the_attention_kernel_runs_on_each_of_four_chips(attentive, micro_images, tmp_path, mesh, most):
    """Between the chips go the gradients of the adapter, or the weights of each layer, or feature maps."""
    data = {"path": str(micro_images), "resolution": 64, "batch_size": 4}
    run = {"data": data, "stages": [LORA], "parallel": {"mesh": mesh}}
    figures = training(chips.described("v5e:2x2"), attentive, micro_images, tmp_path / "run", **run)
    assert figures.kernels >= 2  # the result, and the gradients
    print(f"{mesh}: {figures.between} bytes between chips")
    assert 0 < sum(figures.between.values()) < most


@pytest.mark.parametrize("kind", [{}, {"sdxl": True}, {"inpainting": True}], ids=["sd", "sdxl", "inpainting"])
def test_drawing_compiles(micro_models, kind):
    target = chips.described("v5e")
    outline = Outline.load(micro_models(**kind), "bfloat16", platform="tpu", weights=False)
    planned = compiled.compile_for(target, drawing(outline, Size(16, 16), count=2, steps=4))
    assert [each.program.name for each in planned] == ["encode text", "sampler step", "decode"]
    assert all(compiled.fits(each, target) for each in planned)


def test_drawing_on_four_chips_compiles(micro_models):
    """With pictures large enough for the attention kernel, which each chip runs for its pictures."""
    target = chips.described("v5e:2x2")
    size = 128
    planned = compiled.compile_for(
        target, drawing_with(str(micro_models()), "bfloat16", target.devices, side=size, count=4, steps=4)
    )
    step = planned[1]
    assert step.program.devices == 4 and step.figures.kernels > 0
    assert planned[2].program.runs == 1  # each chip decodes one picture


def test_a_program_that_is_too_large_does_not_fit():
    target = chips.described("v5e")
    shape = jax.ShapeDtypeStruct((1 << 33,), np.float32)
    program = compiled.Program("large", lambda place: jax.jit(lambda x: x + 1).lower(*place(shape)), 1)
    (planned,) = compiled.compile_for(target, [program])
    assert not compiled.fits(planned, target)
    assert planned.memory > 2 * 30e9


def test_programs_for_a_described_chip_are_not_kept(tmp_path):
    """JAX can write them to its compilation cache, but cannot read them again."""
    target, shape = chips.described("v5e"), jax.ShapeDtypeStruct((8, 128), np.float32)
    program = compiled.Program("small", lambda place: jax.jit(lambda x: x + 1).lower(*place(shape)), 1)
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", SECONDS)}
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        jax.config.update(SECONDS, 0)
        compiled.compile_for(target, [program])
        assert not list(tmp_path.iterdir())
        jax.jit(lambda x: x + 2)(np.zeros(8))
        assert list(tmp_path.iterdir())  # other programs are kept, as before
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()
