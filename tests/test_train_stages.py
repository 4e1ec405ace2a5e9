"""Settings that do not fit the model, the images or each other are refused before any weight is read."""

import dataclasses
import json
import os
import re
import shutil
from contextlib import nullcontext

import pytest
from micro import WORDS

from sdjax.errors import ConfigError, DataError
from sdjax.outline import Outline
from sdjax.train import stages
from sdjax.train.loop import train
from sdjax.train.stages import plan_run, plan_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

BAD = [
    ({"data": {"path": "/nowhere"}}, DataError, "/nowhere"),
    ({"data": {"validation_count": 12}}, DataError, "nothing left to train on"),
    ({"data": {"validation_count": 0, "validation_path": "/nowhere"}}, DataError, "validation_path.*nowhere"),
    ({"data": {"resolution": 1024}}, ConfigError, "1024.*16 pixels"),
    ({"data": {"batch_size": 3}, "parallel": {"mesh": {"data": 8}}}, ConfigError, "3 images.*8 devices"),
    ({"parallel": {"mesh": {"data": 1, "tensor": 4}}}, ConfigError, r"tensor = 4 .* \(2 heads\); choices: 2$"),
    ({"clip_skip": 3}, ConfigError, r"clip_skip = 3.*1 .*2"),
    ({"stages": [{"lora_targets": ["no_such_layer"]}]}, ConfigError, r"stages\.0: unet: .*matches no layer"),
    ({"stages": [{"lora_ranks": {".": 0}}]}, ConfigError, "no layer with an adapter"),
    ({"stages": [{"lora_parts": ["text_encoder_2"]}]}, ConfigError, "no text_encoder_2; it has unet, text_encoder"),
    ({"stages": [{"name": n, "use_dora": True} for n in "ab"]}, ConfigError, r"stages\.1: .*DoRA"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), BAD, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_settings_are_refused(settings, no_weights, changes, error, message):
    with pytest.raises(error, match=message):
        train(settings(**changes))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**WORDS, "placeholder_tokens": ["heart"], "vectors_per_token": 1}, "'heart' is a word of the vocabulary"),
        ({**WORDS, "init_tokens": ["nothing.safetensors", "red"]}, "nothing.safetensors"),
        ({**WORDS, "placeholder_tokens": ["<a>", "{A}"]}, r"\{A\} and <a> would both be exported as a.safetensors"),
        ({**WORDS, "placeholder_tokens": ["<a>", f"<{'b' * 200}>"]}, "<bbb.* is too long for the name of a file"),
        ({"name": "s" * 200}, r"stages\.0\.name = .*a short name"),
        ({**WORDS, "placeholder_tokens": ["<a>", "<lora>"]}, "<lora> and the LoRA would both be exported as lora.saf"),
        ({"train": ["text_encoder_2"]}, "no text_encoder_2"),
        ({"train": ["lora"], "lora_parts": ["text_encoder_2"]}, "no text_encoder_2"),
    ],
)
def test_a_stage_that_does_not_fit_the_model_is_refused(settings, no_weights, stage, message):
    with pytest.raises(Exception, match=message) as error:
        plan_run(settings(stages=[stage]))
    assert isinstance(error.value, ConfigError) or error.value.exit_code == 3


@pytest.mark.parametrize(
    ("inpainting", "data", "error", "message"),
    [
        (True, {"inpaint_masks": 0}, ConfigError, r"give data.inpaint_masks .*inpaint_mask_path"),
        (False, {"inpaint_mask_path": "masks"}, ConfigError, "choose one"),
        (False, {"inpaint_masks": 0, "inpaint_mask_path": "nowhere"}, DataError, "inpaint_mask_path = 'nowhere'"),
        (False, {"inpaint_full": 1.5}, ConfigError, "inpaint_full"),
    ],
)
def test_masks_that_do_not_fit_are_refused(settings, micro_models, no_weights, inpainting, data, error, message):
    with pytest.raises(error, match=message):
        config = settings(data={"inpaint_masks": 3, **data})
        plan_run(dataclasses.replace(config, model=str(micro_models(inpainting=inpainting))))


def test_copies_that_stand_on_loras_of_their_own_are_refused(settings):
    words = {"name": "words", "train": ["textual_inversion"], "placeholder_tokens": ["<thing>"]}
    copies = lambda **second: [{"name": "first"}, {"name": "second", **second}]
    with pytest.raises(ConfigError, match="share one base model"):
        plan_runs(settings(stages=[{"name": "style"}, words], copies=copies(seed=1)))
    one_lora = plan_runs(settings(stages=[{"name": "style"}, words], copies=copies(placeholder_tokens=["<other>"])))
    assert [plan.shared for plan in one_lora[1].stages] == [True, False]


def test_truncated_weights_are_refused(settings, micro_models, no_weights, tmp_path):
    model = shutil.copytree(micro_models(), tmp_path / "cut")
    weights = next((model / "unet").glob("*.safetensors"))
    os.truncate(weights, weights.stat().st_size - 100)
    with pytest.raises(DataError, match="truncated"):
        train(dataclasses.replace(settings(), model=str(model)))


def test_an_output_among_the_pictures_is_refused(settings, micro_images, tmp_path):
    """Its samples would become training pictures of the resumed run. With metadata.jsonl only listed ones count."""
    shutil.copytree(micro_images, tmp_path / "all")
    config = dataclasses.replace(settings(data={"path": str(tmp_path / "all")}), output=str(tmp_path / "all/run"))
    assert plan_run(config)
    (tmp_path / "all/metadata.jsonl").unlink()
    stage = dataclasses.replace(config.stages[0], prior_prompt="x", prior_path=str(tmp_path))
    data = dataclasses.replace(config.data, caption="circle")
    with pytest.raises(ConfigError, match=r"output = .* lies in data\.path"):
        plan_run(dataclasses.replace(config, data=data))
    data = dataclasses.replace(data, path=str(micro_images))
    with pytest.raises(ConfigError, match=r"output = .* lies in prior_path"):
        plan_run(dataclasses.replace(config, data=data, stages=(stage,)))


def test_a_caption_of_many_windows_is_named(settings, micro_images, tmp_path, caplog, no_weights):
    shutil.copytree(micro_images, tmp_path / "all")
    lines = (tmp_path / "all/metadata.jsonl").read_text()
    for words, error in ((80, False), (10_000, True)):
        (tmp_path / "all/metadata.jsonl").write_text(lines.replace("green circle", "green " * words, 1))
        config = settings(data={"path": str(tmp_path / "all")})
        with pytest.raises(DataError, match=r"caption of 01\.png .* takes \d{3} windows") if error else nullcontext():
            plan_run(config)
    assert re.search(r"caption of 01\.png .* takes 6 windows .* every caption is encoded with 6", caplog.text)


def test_the_fingerprint_is_of_all_that_the_computation_takes_from_the_model(micro_models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(micro_models(), model)

    def write(name, **changes):
        (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | changes))

    def flip():  # a bit between the places that were once sampled
        file = model / "vae/diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)

    def fingerprint():
        return stages._fingerprint(Outline.load(model))

    known = [fingerprint()]
    write("unet/config.json", _name_or_path="elsewhere")
    assert fingerprint() == known[0]
    for change in (
        lambda: write("scheduler/scheduler_config.json", beta_end=0.013),
        lambda: write("unet/config.json", act_fn="gelu"),
        lambda: write("tokenizer/tokenizer_config.json", pad_token="!"),
        flip,
    ):
        change()
        known.append(fingerprint())
    assert len(set(known)) == 5
