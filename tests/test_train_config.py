"""The declarations of the settings, and every way in which a value can break a rule."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.settings import choices
from sdjax.train import config
from sdjax.train.config import Data, DataOverride, Stage
from sdjax.train.config_file import from_table


def minimal(**changes):
    """A table of two stages."""
    stage = {"train": ["lora"], "steps": 300, "learning_rate": 1e-3}
    stages = [{"name": "style", **stage}, {"name": "character", **stage}]
    return {"model": "tiny", "output": "runs/style", "data": {"path": "images"}, "stages": stages, **changes}


def with_stage(**changes):
    """The table with changes to its first stage."""
    table = minimal()
    table["stages"][0] |= changes
    return table


def with_words(**changes):
    """The table with a first stage that trains a new word."""
    return with_stage(**{"train": ["textual_inversion"], "placeholder_tokens": ["<plana>"]} | changes)


def test_a_stage_may_override_every_data_field_and_no_other():
    assert [f.name for f in dataclasses.fields(DataOverride)] == [f.name for f in dataclasses.fields(Data)]


def test_the_names_of_lora_targets_are_those_of_lora():
    assert set(choices(config.LoraTargets)) == set(lora.TARGETS)


def test_every_field_is_documented():
    records = (config.Base, config.BaseLora, config.Validation, config.Export, config.Checkpoint, config.Mesh)
    for record in (Data, Stage, *records):
        body = inspect.getsource(record)
        for f in dataclasses.fields(record):
            if not dataclasses.is_dataclass(f.type):
                assert body.split(f"    {f.name}: ", 1)[1].split('"""')[1].strip(), f.name


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (minimal(modle="x"), r"unknown key modle: did you mean model\?"),
        (minimal(zzz=1), "unknown key zzz: choices: model, output"),
        (minimal(data={"path": "x", "batchsize": 2}), r"unknown key data.batchsize: did you mean data.batch_size\?"),
        (with_stage(lr=1), r"unknown key stages.0.lr: choices"),
        (with_stage(data={"pth": "x"}), r"unknown key stages.0.data.pth: did you mean stages.0.data.path\?"),
        (minimal(data={}), "missing: data.path"),
        ({}, "missing: model, output, data, stages"),
        (minimal(stages=[]), "at least one"),
        (minimal(model=3), "model = 3: expected text"),
        (minimal(model=""), "model = '': expected not empty"),
        (minimal(remat=1), "remat = 1: expected true or false"),
        (minimal(seed=True), "seed = True: expected a whole number"),
        (minimal(seed=1.5), "seed = 1.5: expected a whole number"),
        (minimal(seed=-1), "seed = -1: expected at least 0"),
        (minimal(dtype="int8"), "dtype = 'int8': expected one of float32, bfloat16, float16"),
        (minimal(dtype=["float32"]), "dtype = .*expected one of"),
        (minimal(data="images"), "data = 'images': expected a table"),
        (
            minimal(data={"path": "x", "resolution": 60}),
            "data.resolution = 60: expected at least 8 and at most 4096, a multiple of 8",
        ),
        (minimal(data={"path": "x", "resolution": 0}), "data.resolution = 0: expected at least 8"),
        (minimal(data={"path": "x", "caption_dropout": 1.5}), "at least 0 and at most 1"),
        (minimal(data={"path": "x", "background": "whitish"}), "a CSS colour name"),
        (minimal(data={"path": "x", "validation_count": 1, "validation_path": "y"}), "choose one"),
        (with_stage(steps=0), "stages.0.steps = 0: expected at least 1"),
        (with_stage(steps=10.0), "stages.0.steps = 10.0: expected a whole number"),
        (with_stage(learning_rate="1e-4"), "stages.0.learning_rate = '1e-4': expected a number"),
        (with_stage(learning_rate=float("nan")), "expected a number"),
        (with_stage(learning_rate=0), "expected above 0"),
        (with_stage(learning_rate={"unet": "x"}), "stages.0.learning_rate.unet = 'x'"),
        (with_stage(learning_rate={"text_encoder": 1e-4}), "has text_encoder, but .* trains unet"),
        (with_stage(train=["lokr"]), "stages.0.train.0 = 'lokr': expected one of lora, textual_inversion, unet"),
        (with_stage(train=["lora", "unet"]), "unet is trained as a whole and by LoRA"),
        (with_stage(train=["vae", "unet"], lora_parts=["text_encoder"]), "vae is trained alone"),
        (with_stage(train=["vae"], vae_loss={"l3": 1}), "has 'l3': choices are l1, l2"),
        (with_stage(train=["textual_inversion"]), "need each other"),
        (with_stage(placeholder_tokens=["<a>"]), "need each other"),
        (with_words(placeholder_tokens=["<a b>"]), "different words without spaces"),
        (with_words(placeholder_tokens=["<a>", "<a>"]), "different words"),
        (with_words(vectors_per_token=[1, 2]), "one number, or 1"),
        (with_words(vectors_per_token=0), "at least 1"),
        (with_words(init_tokens=["a", "b"]), "one for each of 1"),
        (with_words(template=["a photo"]), "with {} where the new words go"),
        (with_stage(template="style"), "template needs placeholder_tokens"),
        (with_words(learning_rate={"unet": 1e-3}), "has unet, but the stage trains textual_inversion"),
        (with_stage(train=[]), "at least one"),
        (with_stage(train={}), "stages.0.train = {}: expected a list"),
        (with_stage(lora_targets="atention"), "expected one of attention, attention"),
        (with_stage(lora_targets="conv"), "stages.0.lora_targets = 'conv': expected 'all', which has the layers"),
        (with_stage(lora_targets=["to_(q"]), "not a regular expression"),
        (with_stage(lora_ranks={"*": 4}), "not a regular expression"),
        (with_stage(betas=[0.9]), "stages.0.betas = .*expected a list of 2"),
        (with_stage(betas=[0.9, 1.0]), "stages.0.betas.1 = 1.0"),
        (with_stage(min_snr_gamma=5, debiased=True), "choose one"),
        (with_stage(consistency_steps=50, train=["unet"]), "its teacher is the model without the adapter"),
        (with_stage(consistency_steps=50, lora_parts=["unet", "text_encoder"]), "needs train = .*lora_parts = .'unet'"),
        (with_words(consistency_steps=50), "stages.0.consistency_steps needs train = .'lora'"),
        (with_stage(consistency_steps=50, prior_prompt="a dog"), "prior_prompt has no meaning in consistency"),
        (with_stage(consistency_steps=50, min_snr_gamma=5), "stages.0: min_snr_gamma has no meaning"),
        (with_stage(consistency_steps=50, debiased=True), "debiased has no meaning"),
        (with_stage(consistency_steps=50, input_perturbation=0.1), "input_perturbation has no meaning"),
        (with_stage(consistency_guidance=[8, 4]), "consistency_guidance = .8.0, 4.0.: expected the first not above"),
        (with_stage(consistency_steps=-1), "at least 0"),
        (with_stage(optimizer="schedule_free", ema_decay=0.9), "averages by itself"),
        (with_stage(warmup_steps=301), "more than"),
        (with_stage(schedule="constant_with_warmup"), "needs stages.0.warmup_steps"),
        (with_stage(timestep_range=[0.5, 0.5]), "the first below the second"),
        (with_stage(name="character"), "taken by an earlier stage"),
        (with_stage(name="../x"), "a short name of letters"),
        (with_stage(name=".."), "a short name of letters"),
        (minimal(parallel={"mode": "pmap", "mesh": {"fsdp": 2}}), "'pmap' has a data axis only"),
        (minimal(parallel={"mode": "pmap", "mesh": {"tensor": 2}}), "'pmap' has a data axis only.* tensor = 2"),
        (minimal(parallel={"mesh": {"fsdp": -1, "tensor": -1, "data": 1}}), "only one of data, fsdp and tensor"),
        (minimal(parallel={"mesh": {"tensor": 0}}), "an axis is 0"),
        (minimal(parallel={"mesh": {"data": -1, "fsdp": -1}}), "only one of"),
        (minimal(parallel={"mesh": {"data": 0}}), "an axis is 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(table, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_table(table)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.exit_code == 2


def test_reading_a_configuration_loads_nothing_heavy():
    code = "import sys, sdjax.train.config; print(sorted({'jax', 'tyro', 'flax', 'orbax', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
