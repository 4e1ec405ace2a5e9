"""The plan of a run: what cannot be planned is refused before any weight is read."""

import json
import shutil

import pytest
from micro import WORDS

from sdjax.errors import ConfigError
from sdjax.outline import Outline
from sdjax.train import stages
from sdjax.train.loop import train
from sdjax.train.stages import plan_run, plan_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

BAD = [
    ({"data": {"batch_size": 3}, "parallel": {"mesh": {"data": 8}}}, "3 images.*8 devices"),
    ({"stages": [{"lora_targets": ["no_such_layer"]}]}, r"stages\.0: unet: .*matches no layer"),
    ({"stages": [{"lora_ranks": {".": 0}}]}, "no layer with an adapter"),
    ({"stages": [{"name": n, "use_dora": True} for n in "ab"]}, r"stages\.1: .*DoRA"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_settings_are_refused(settings, no_weights, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(settings(**changes))


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**WORDS, "placeholder_tokens": ["heart"], "vectors_per_token": 1}, "'heart' is a word of the vocabulary"),
        ({**WORDS, "init_tokens": ["nothing.safetensors", "red"]}, "nothing.safetensors"),
        ({"name": "s" * 200}, r"stages\.0\.name = .*a short name"),
    ],
)
def test_a_stage_that_cannot_be_planned_is_refused(settings, no_weights, stage, message):
    with pytest.raises(Exception, match=message) as error:
        plan_run(settings(stages=[stage]))
    assert isinstance(error.value, ConfigError) or error.value.exit_code == 3


def test_copies_that_stand_on_loras_of_their_own_are_refused(settings):
    words = {"name": "words", "train": ["textual_inversion"], "placeholder_tokens": ["<thing>"]}
    copies = lambda **second: [{"name": "first"}, {"name": "second", **second}]
    with pytest.raises(ConfigError, match="share one base model"):
        plan_runs(settings(stages=[{"name": "style"}, words], copies=copies(seed=1)))
    one_lora = plan_runs(settings(stages=[{"name": "style"}, words], copies=copies(placeholder_tokens=["<other>"])))
    assert [plan.shared for plan in one_lora[1].stages] == [True, False]


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
