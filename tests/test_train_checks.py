"""Settings that do not fit the images or the model are refused before any weight is read."""

import dataclasses
import os
import re
import shutil
from contextlib import nullcontext

import pytest
from micro import WORDS

from sdjax.errors import ConfigError, DataError
from sdjax.train.loop import train
from sdjax.train.stages import plan_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"resolution": 1024}}, "1024.*16 pixels"),
        ({"parallel": {"mesh": {"data": 1, "tensor": 4}}}, r"tensor = 4 .* \(2 heads\); choices: 2$"),
        ({"clip_skip": 3}, r"clip_skip = 3.*1 .*2"),
        ({"stages": [{"lora_parts": ["text_encoder_2"]}]}, "no text_encoder_2; it has unet, text_encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, no_weights, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(**changes))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**WORDS, "placeholder_tokens": ["<a>", "{A}"]}, r"\{A\} and <a> would both be exported as a.safetensors"),
        ({**WORDS, "placeholder_tokens": ["<a>", f"<{'b' * 200}>"]}, "<bbb.* is too long for the name of a file"),
        ({**WORDS, "placeholder_tokens": ["<a>", "<lora>"]}, "<lora> and the LoRA would both be exported as lora.saf"),
        ({"train": ["text_encoder_2"]}, "no text_encoder_2"),
        ({"train": ["lora"], "lora_parts": ["text_encoder_2"]}, "no text_encoder_2"),
    ],
)
def test_a_stage_that_does_not_fit_the_model_is_refused(settings, no_weights, stage, message):
    with pytest.raises(ConfigError, match=message):
        plan_run(settings(stages=[stage]))


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
