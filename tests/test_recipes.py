"""The recipes in configs/ run on the embedded model, two steps of each stage, with their losses and optimizers."""

import dataclasses
from pathlib import Path

import micro
import pytest

from sdjax.train import config_file
from sdjax.train.loop import train

ROOT = Path(__file__).parent.parent
LARGE = ("sd15_style_then_character", "sdxl_full")  # recipes for Stable Diffusion that run here; the others are alike
RECIPES = [
    path
    for path in sorted((ROOT / "configs").glob("*.toml"))
    if not path.stem.startswith(("sd15", "sd21", "sdxl")) or path.stem in LARGE
]
SAMPLES = str(ROOT / "sdjax" / "tiny" / "samples")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    yield from micro.quick_compilation()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(path, tmp_path, stand_in):
    recipe = config_file.load(path)
    fsdp = recipe.parallel.mesh.fsdp
    data = dataclasses.replace(recipe.data, path=SAMPLES, validation_path="", resolution=64, batch_size=max(2, fsdp))
    stages = tuple(
        dataclasses.replace(
            stage,
            steps=2,
            warmup_steps=min(stage.warmup_steps, 1),
            data=dataclasses.replace(stage.data, path=None, batch_size=None),
        )
        for stage in recipe.stages
    )
    validation = dataclasses.replace(recipe.validation, prompts=recipe.validation.prompts[:1], steps=1)
    parallel = dataclasses.replace(recipe.parallel, mesh=dataclasses.replace(recipe.parallel.mesh, data=1))
    short = dataclasses.replace(
        recipe,
        model="tiny",
        output=str(tmp_path / "run"),
        data=data,
        stages=stages,
        validation=validation,
        parallel=parallel,
        copies=tuple(dataclasses.replace(copy, path="") for copy in recipe.copies),
    )
    assert train(config_file.from_table(config_file.to_table(short))) == 0
    for member in short.members():
        for stage in stages:
            files = {path.name for path in (Path(member.output) / "export" / stage.name).iterdir()}
            assert "README.md" in files and len(files) > 1
