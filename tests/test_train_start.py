"""Runs that start from LoRA and embedding files: what lies beneath them, and what they train further."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import micro
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import sdjax
from sdjax import lora
from sdjax.errors import ConfigError, DataError
from sdjax.formats.description import describe
from sdjax.formats.embedding_file import load_embedding, save_embedding
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.outline import Outline
from sdjax.train.config import Stage
from sdjax.train.export import _trained as trained
from sdjax.train.loop import train
from sdjax.train.stages import plan_run, plan_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

STYLE = {"name": "style", "train": ["lora"], "steps": 2, "learning_rate": 1e-2, "lora_rank": Stage.lora_rank}
WORD = {
    **{"name": "word", "train": ["textual_inversion"], "steps": 2, "learning_rate": 1e-2},
    **{"placeholder_tokens": ["<plana>"], "init_tokens": ["red circle"], "vectors_per_token": 2},
}


@pytest.fixture
def run_of(micro_models, micro_images, micro_cache, tmp_path):
    """`run_of(name, stages, **changes)` -> the configuration of a run without pictures, and its folder."""

    def make(name, stages, *, sdxl=False, **changes):
        data = {"path": str(micro_images), "resolution": 16, "batch_size": 4, "validation_count": 4}
        model = micro_models(sdxl=True) if sdxl else micro_models()
        changes = {"validation": {}, "checkpoint": {"every": 0}, "data": data | {"cache": str(micro_cache)}} | changes
        return micro.settings(model, micro_images, tmp_path / name, stages=stages, **changes), tmp_path / name

    return make


def random_lora(shapes, parts=("unet",), seed=0, **options):
    """Returns adapters whose up matrices are not 0, so that they change the model."""

    def adapter(i, part):
        tree = lora.init(jax.random.key(seed + i), shapes[part], **({"rank": 3, "alpha": 2.0} | options))
        noise = np.random.default_rng(seed + i)
        up = lambda layer: {**layer, "up": 0.3 * noise.normal(size=layer["up"].shape).astype(np.float32)}
        return lora.map_layers(up, tree)

    return {part: adapter(i, part) for i, part in enumerate(parts)}


@pytest.mark.parametrize(
    ("sdxl", "style", "file"),
    [
        (False, {}, "lora.safetensors"),
        (False, {"use_dora": True, "lora_targets": "linear"}, "pytorch_lora_weights.safetensors"),
        (True, {"lora_parts": ["unet", "text_encoder", "text_encoder_2"], "lora_alpha": 1.0}, "lora.safetensors"),
    ],
)
def test_a_word_on_a_style_file_equals_the_two_stages_in_one_run(run_of, sdxl, style, file):
    """Within float32 rounding: vectors to 2e-6 of about 0.3, losses to 1e-5. The style changes them by far more."""
    both, output = run_of("both", [STYLE | style, WORD], sdxl=sdxl)
    assert train(both) == 0
    base = {"loras": [{"path": str(output / "export" / "style" / file)}]}
    config, folder = run_of("apart", [WORD], sdxl=sdxl, base=base)
    assert train(config) == 0
    expected, end = (
        load_embedding(run / "export" / "word" / "plana.safetensors")["<plana>"] for run in (output, folder)
    )
    for model, vectors in expected.items():
        np.testing.assert_allclose(end[model], vectors, rtol=0, atol=2e-6)
    losses, held_out = (
        [[line[key] for line in micro.metric_lines(run, key)] for run in (output, folder)]
        for key in ("loss", "held_out_loss")
    )
    np.testing.assert_allclose(losses[1], losses[0][2:], rtol=1e-5)
    np.testing.assert_allclose(held_out[1], held_out[0][2:], rtol=1e-5)
    assert abs(held_out[0][0] / held_out[0][1] - 1) > 1e-3  # before and after the style


def test_training_from_a_lora_file_begins_at_its_held_out_loss(run_of, finished, micro_models, tmp_path):
    """And with its weights: the first step from kohya's and from PEFT's keys is the same within rounding."""
    end = micro.metric_lines(finished[0], "held_out_loss")[-1]["held_out_loss"]
    start = micro.metric_lines(finished[0], "held_out_loss")[0]["held_out_loss"]
    for name in ("lora", "pytorch_lora_weights"):
        file = finished[0] / "export" / "style" / f"{name}.safetensors"
        config, output = run_of(name, [STYLE | {"lora_init": str(file)}])
        assert train(config) == 0
        first = micro.metric_lines(output, "held_out_loss")[0]["held_out_loss"]
        assert abs(first - end) < 1e-6 < abs(start - end)
    shapes = Outline.load(micro_models()).shapes
    further = load_lora(tmp_path / "lora" / "export" / "style" / "lora.safetensors", shapes)
    assert jax.tree.map(np.shape, further) == jax.tree.map(np.shape, load_lora(file, shapes))
    with safe_open(tmp_path / "lora" / "export" / "style" / "lora.safetensors", "np") as saved:
        beginning = json.loads(saved.metadata()["sdjax_lora_init"])
    assert beginning["file"] == "lora.safetensors" and len(beginning["sha256"]) == 64
    card = (tmp_path / "lora" / "export" / "style" / "README.md").read_text()
    assert "| begun from | `lora.safetensors` |" in card and "rank 2, targets the 8 layers of the file" in card


def test_copies_a_dora_and_a_word_begin_from_files(run_of, micro_models, tmp_path):
    shapes = Outline.load(micro_models()).shapes
    file = tmp_path / "dora.safetensors"
    norms = lambda layer: {**layer, "magnitude": np.full(layer["up"].shape[-1], 1.5, np.float32)}
    tree = {part: lora.map_layers(norms, tree) for part, tree in random_lora(shapes, ["text_encoder"]).items()}
    save_lora(file, tree, shapes, style="peft")
    word = tmp_path / "old.safetensors"
    save_embedding(word, "<old>", {"text_encoder": np.ones((3, 16), np.float32)})
    stage = STYLE | WORD | {"name": "both", "train": ["lora", "textual_inversion"], "init_tokens": [str(word)]}
    stage |= {"lora_init": str(file), "lora_parts": ["text_encoder"], "vectors_per_token": 3, "steps": 1}
    config, output = run_of("run", [stage], copies=[{"name": "a"}, {"name": "b", "learning_rate": 1e-5}])
    assert train(config) == 0
    ends = {copy: load_lora(output / copy / "export" / "both" / "lora.safetensors", shapes) for copy in ("a", "b")}
    for copy, most in {"a": 0.1, "b": 1e-4}.items():
        gap = lambda a, b: np.abs(a - b).max()
        moved = jax.tree.map(gap, lora.map_layers(lora_delta, ends[copy]), lora.map_layers(lora_delta, tree))
        assert 0 < max(jax.tree.leaves(moved)) < most
        vectors = load_embedding(output / copy / "export" / "both" / "plana.safetensors")["<plana>"]["text_encoder"]
        assert vectors.shape == (3, 16) and 0 < np.abs(vectors - 1).max() < most


def lora_delta(layer):
    return {"down": np.asarray(lora.delta(layer)), "magnitude": np.asarray(layer["magnitude"])}


@pytest.fixture
def beneath(micro_models, tmp_path):
    """A LoRA of the U-Net and the text model, a DoRA of the U-Net, and a word; the [base] table that names them."""
    shapes = Outline.load(micro_models()).shapes
    save_lora(tmp_path / "plain.safetensors", random_lora(shapes, ["unet", "text_encoder"]), shapes)
    dora = random_lora(shapes, which="linear", seed=5)
    norms = lambda layer: {**layer, "magnitude": np.full(layer["up"].shape[-1], 1.5, np.float32)}
    save_lora(tmp_path / "dora.safetensors", {"unet": lora.map_layers(norms, dora["unet"])}, shapes)
    save_embedding(tmp_path / "old.safetensors", "<old>", {"text_encoder": np.full((2, 16), 0.3, np.float32)})
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("plain", "dora", "old")}
    loras = [{"path": files["plain"], "weight": 0.5}, {"path": files["dora"], "weight": 0.25}]
    return {"loras": loras, "embeddings": [files["old"]]}


def test_pictures_and_exports_of_a_run_on_files(run_of, beneath, micro_base):
    """Pictures hold the files beneath; the LoRA and word do not, and the card and the metadata name the files."""
    validation = {"prompts": ["a <old>"], "steps": 1, "guidance": 2.0, "weights": [0.5]}
    config, output = run_of("run", [STYLE], base=beneath, validation=validation)
    assert train(config) == 0
    below = micro_base.with_embedding(beneath["embeddings"][0])
    for item in beneath["loras"]:
        below = below.with_lora(item["path"], item["weight"])
    ours = output / "export" / "style" / "lora.safetensors"
    drawn = [
        sd.text2image("a <old>", steps=1, guidance=2.0, height=16, width=16, progress=False)[0]
        for sd in (below, below.with_lora(ours, 0.5), below.with_lora(ours))
    ]
    sheet = np.asarray(micro_sheet(output / "samples" / "style-before-after.png"))
    for column, picture in enumerate(drawn):
        shown = sheet[6:198, 6 + column * (192 + 6) :][:, :192][6::12, 6::12].astype(int)
        assert np.abs(shown - np.asarray(picture, int)).max() <= 2, column
    assert {path.name for path in ours.parent.glob("*.safetensors")} == {ours.name, "pytorch_lora_weights.safetensors"}
    card = (ours.parent / "README.md").read_text()
    assert "| with | `plain.safetensors` at weight 0.5, `dora.safetensors` at weight 0.25, `old.safetensors`" in card
    assert "--lora plain.safetensors:0.5 --lora dora.safetensors:0.25 --lora lora.safetensors" in card
    with safe_open(ours, "np") as file:
        named = json.loads(file.metadata()["sdjax_base"])
    assert [(each["file"], each.get("weight")) for each in named] == [
        ("plain.safetensors", 0.5),
        ("dora.safetensors", 0.25),
        ("old.safetensors", None),
    ]


def micro_sheet(path):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_the_file_of_a_word_names_what_lies_beneath(run_of, beneath):
    """It is the whole export of its stage: its metadata are those of ModelSpec, with the files to use it with."""
    config, output = run_of("run", [WORD | {"steps": 1}], base=beneath, license="openrail++")
    assert train(config) == 0
    with safe_open(output / "export" / "word" / "plana.safetensors", "np") as file:
        metadata = file.metadata()
    assert [each["file"] for each in json.loads(metadata["sdjax_base"])] == [
        "plain.safetensors",
        "dora.safetensors",
        "old.safetensors",
    ]
    assert metadata["modelspec.trigger_phrase"] == "<plana>" and metadata["modelspec.license"] == "openrail++"
    assert metadata["modelspec.usage_hint"] == "new words: <plana>; with plain at 0.5, dora at 0.25"
    assert metadata["modelspec.title"] == "word" and metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert (metadata["name"], metadata["format"]) == ("<plana>", "pt")


def test_a_model_trained_on_files_holds_their_loras(run_of, beneath, micro_base):
    config, output = run_of("run", [STYLE | {"train": ["unet"], "learning_rate": 1e-7, "steps": 1}], base=beneath)
    assert train(config) == 0
    trained = sdjax.load(output / "export" / "style" / "model")
    below = micro_base
    for item in beneath["loras"]:
        below = below.with_lora(item["path"], item["weight"])
    for part in ("unet", "text_encoder"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained.params[part], below.params[part])
    card = (output / "export" / "style" / "README.md").read_text()
    assert "`dora.safetensors` at weight 0.25 (included in `model/`); `old.safetensors` (not in these files" in card
    assert "--model model --embedding old.safetensors" in card


def test_a_run_resumes_on_the_same_files_only(run_of, beneath, micro_models, tmp_path):
    stages = [STYLE | {"lora_init": beneath["loras"][0]["path"], "lora_parts": ["unet", "text_encoder"]}]
    config, _ = run_of("run", stages, base=beneath, checkpoint={"every": 1})
    assert train(config) == 0
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path(beneath["embeddings"][0]).read_bytes())
    base = dataclasses.replace(config.base, embeddings=(str(moved),))
    assert train(dataclasses.replace(config, base=base), resume=True, resume_step=1) == 0
    shapes = Outline.load(micro_models()).shapes
    save_lora(beneath["loras"][0]["path"], random_lora(shapes, ["unet", "text_encoder"], seed=9), shapes)
    with pytest.raises(
        DataError, match=r"the file of base\.loras\.0 is another one; .*stages\.0\.lora_init is another"
    ):
        train(config, resume=True)
    loras = (dataclasses.replace(config.base.loras[0], weight=1.0), *config.base.loras[1:])
    with pytest.raises(DataError, match=r"base\.loras\.0\.weight was 0\.5, is 1\.0"):
        train(dataclasses.replace(config, base=dataclasses.replace(config.base, loras=loras)), resume=True)


def test_what_lies_beneath_changes_what_is_cached(run_of, beneath):
    """Not the latents of images, which no LoRA changes."""
    plans = [plan_run(run_of(name, [STYLE], base=base)[0]) for name, base in {"a": beneath, "b": {}}.items()]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].beneath.digest != plans[1].beneath.digest == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"lora_init = '.*' has unet/.* of rank 3, but lora_rank = 8: leave lora_rank out"),
        ({"lora_ranks": {"attn2": 3}}, r"has unet/.*attn1.* of rank 3, but lora_ranks = .*leave lora_ranks out"),
        ({"lora_alpha": 3.0}, r"of rank 3 and alpha 2, but lora_alpha = 3\.0"),
        ({"use_rslora": True}, r"of rank 3 and alpha 1\.1547, but use_rslora = True"),
        ({"use_dora": True}, r"without a DoRA magnitude, but use_dora = True"),
        ({"lora_targets": "linear"}, r"without an adapter, but lora_targets = 'linear'"),
        ({"lora_targets": ["attn1/to_q$"]}, r"with an adapter, but lora_targets = \('attn1"),
        ({"lora_parts": ["unet", "text_encoder"]}, r"adapts unet: give lora_parts = \['unet'\]"),
        ({"lora_continue": True}, "two beginnings"),
        ({"train": ["unet"]}, r"lora_init needs train = \['lora'\]"),
        ({"lora_kind": "loha"}, r"has unet/.* of kind LoRA, but lora_kind = 'loha': leave lora_kind out"),
    ],
)
def test_settings_that_disagree_with_the_file_are_refused(run_of, micro_models, tmp_path, no_weights, changes, message):
    shapes = Outline.load(micro_models()).shapes
    save_lora(tmp_path / "style.safetensors", random_lora(shapes), shapes)
    with pytest.raises(ConfigError, match=message):
        train(run_of("run", [STYLE | {"lora_init": str(tmp_path / "style.safetensors")} | changes])[0])


LOHA = {
    **{"name": "loha", "steps": 8, "learning_rate": 2e-2, "lora_kind": "loha", "lora_rank": 2, "lora_alpha": 4.0},
    "lora_targets": ["attn2/to_q$", "down_blocks_1/resnets_0/conv1$"],
}
LOKR = {
    **{"name": "lokr", "steps": 8, "learning_rate": 2e-2, "lora_kind": "lokr", "lora_factor": 2, "lora_rank": 1},
    **{"lora_targets": ["attn2/to_(k|v)$", "down_blocks_1/resnets_0/conv2$"], "lora_ranks": {"to_k": 8}},
    "lora_dropout": 0.1,
}


def test_loha_and_lokr_are_trained_resumed_drawn_with_and_trained_further(run_of, micro_base):
    """In two stages, on layers of each kind of kernel. The file draws what the run drew."""
    drawn_with = {"steps": 1, "guidance": 2.0}
    stages = [STYLE | LOHA, STYLE | LOKR]
    config, output = run_of(
        "run", stages, validation={"prompts": ["red circle"], **drawn_with}, checkpoint={"every": 5}
    )
    assert train(config) == 0
    held_out = [line["held_out_loss"] for line in micro.metric_lines(output, "held_out_loss")]
    assert held_out[1] < 0.98 * held_out[0] and held_out[3] < 0.98 * held_out[2]
    export = output / "export" / "lokr"
    assert {path.name for path in export.iterdir()} == {"lora.safetensors", "samples.png", "README.md"}
    tensors = load_file(export / "lora.safetensors")
    names = {name.partition(".")[2] for name in tensors}
    loha = {f"hada_w{i}_{side}" for i in "12" for side in "ab"}
    assert names == {"alpha", *loha, "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}
    with safe_open(output / "export" / "loha" / "lora.safetensors", "np") as file:
        metadata = file.metadata()
    assert (
        metadata["ss_network_module"] == "lycoris.kohya" and json.loads(metadata["ss_network_args"])["algo"] == "loha"
    )
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "4")
    described = describe(export / "lora.safetensors")
    assert described["kinds"] == {"LoHa": 2, "LoKr": 3} and described["ranks"] == {2: 2, 1: 2}
    card = (export / "README.md").read_text()
    assert "LoKr of unet, rank 1, targets `attn2" in card and "models/Lora/lokr.safetensors" in card
    assert "diffusers does not read LoHa and LoKr; merge it" in card
    # The picture of the run, drawn from the file.
    picture = micro_base.with_lora(export / "lora.safetensors").text2image(
        "red circle", height=16, width=16, progress=False, **drawn_with
    )[0]
    sheet = np.asarray(micro_sheet(output / "samples" / "lokr-before-after.png"))
    shown = sheet[6:198, -198:-6][6::12, 6::12].astype(int)
    assert np.abs(shown - np.asarray(picture, int)).max() <= 2
    # Resumed within the second stage it ends with the same bits.
    expected = micro.exported(output, "lokr")
    shutil.rmtree(output / "export" / "lokr")
    micro.remove_checkpoints_after(output, 13)
    assert train(config, resume=True) == 0
    assert micro.exported(output, "lokr") == expected
    # Another run begins with what is in the file.
    init = {"steps": 1, "lora_init": str(export / "lora.safetensors")}
    plan = plan_run(run_of("further", [STYLE | init])[0]).stages[0]
    shapes = lambda tree: jax.tree.map(np.shape, tree)
    assert shapes(lora.join(plan.state.trainable["unet"], plan.frozen["scales"]["unet"])) == shapes(
        load_lora(export / "lora.safetensors", micro_base.params)["unet"]
    )
    assert trained(plan) == ["LoHa, LoKr of unet, rank 1, 2, targets the 5 layers of the file"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"lora_factor": 4}], "lora_factor = 4 needs stages.0.lora_kind = 'lokr'"),
        ([{"lora_kind": "lokr", "lora_factor": 0}], "stages.0.lora_factor = 0: expected"),
        ([{"lora_kind": "oft"}], "stages.0.lora_kind = 'oft': expected one of lora, loha, lokr"),
        ([{"lora_kind": "loha", "lora_plus_ratio": 16.0}], "lora_plus_ratio is the ratio of LoRA's two rates"),
        ([{}, {"name": "more", "lora_kind": "loha"}], "stages.1: .*a LoHa layer cannot be added .*lora_continue"),
    ],
)
def test_settings_that_a_kind_does_not_have_are_refused(run_of, no_weights, stages, message):
    with pytest.raises(ConfigError, match=message):
        train(run_of("run", [STYLE | stage for stage in stages])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_kind": "loha"}, "of kind LoKr, but lora_kind = 'loha'"),
        ({"lora_factor": 4}, r"with a first factor \[2, 2\] in place of \[4, 4\], but lora_factor = 4"),
    ],
)
def test_settings_that_disagree_with_a_lokr_are_refused(run_of, micro_models, tmp_path, no_weights, changes, message):
    shapes = Outline.load(micro_models()).shapes
    lokr = lora.init(jax.random.key(0), shapes["unet"], rank=1, kind="lokr", factor=2)
    save_lora(tmp_path / "lokr.safetensors", {"unet": lokr}, shapes)
    stage = STYLE | {"lora_init": str(tmp_path / "lokr.safetensors")}
    with pytest.raises(ConfigError, match=message):
        train(run_of("run", [stage | changes])[0])
    agreeing = {"lora_kind": "lokr", "lora_factor": 2, "lora_rank": 1, "lora_targets": "attention"}
    plan_run(run_of("run", [stage | agreeing])[0])


def test_files_that_cannot_be_trained_further_are_refused(run_of, micro_models, tmp_path, no_weights):
    """Full differences, a changed bias, and DoRA by inputs."""
    shapes = Outline.load(micro_models()).shapes
    plain = random_lora(shapes, which=["attn1/to_out_0$"])["unet"]
    width = next(sdjax.trees.layers(plain, "down"))[1]["up"].shape[1]  # of the inputs and the outputs
    ones = np.ones((width, 1), np.float32)
    for change in (
        lambda a: {"diff": lora.delta(a), "scale": a["scale"]},
        lambda a: {**a, "bias": ones[:, 0]},
        lambda a: {**a, "magnitude": ones},
    ):
        save_lora(tmp_path / "a.safetensors", {"unet": lora.map_layers(change, plain)}, shapes)
        with pytest.raises(ConfigError, match="only LoRA, LoHa, LoKr and DoRA by outputs can be trained"):
            plan_run(run_of("run", [STYLE | {"lora_init": str(tmp_path / "a.safetensors")}])[0])


def test_settings_that_agree_with_the_file_are_accepted(run_of, micro_models, tmp_path):
    shapes = Outline.load(micro_models()).shapes
    options = {"rank": 3, "alpha": 2.0, "which": "linear", "ranks": {"attn1": 5, "conv|time": 0}}
    save_lora(tmp_path / "style.safetensors", random_lora(shapes, **options), shapes)
    agreeing = {"lora_rank": 3, "lora_ranks": options["ranks"], "lora_targets": "linear"}
    run = plan_run(run_of("run", [STYLE | agreeing | {"lora_init": str(tmp_path / "style.safetensors")}])[0])
    ranks = {layer["down"].shape[-1] for _, layer in sdjax.trees.layers(run.stages[0].adapters["unet"], "down")}
    assert ranks == {3, 5}


def test_files_that_do_not_fit_are_refused_before_weights_are_read(run_of, beneath, micro_models, tmp_path, no_weights):
    plain, old = beneath["loras"][0]["path"], beneath["embeddings"][0]
    half = tmp_path / "half.safetensors"
    half.write_bytes(Path(plain).read_bytes()[:1000])
    xl = Outline.load(micro_models(sdxl=True)).shapes
    save_lora(tmp_path / "xl.safetensors", random_lora(xl), xl)
    missing = str(tmp_path / "missing.safetensors")
    cases = [
        ({"loras": [{"path": missing}]}, {}, DataError, "missing.safetensors"),
        ({"loras": [{"path": str(half)}]}, {}, DataError, "half.safetensors"),
        ({"loras": [{"path": str(tmp_path / "xl.safetensors")}]}, {}, DataError, "xl.safetensors: made for"),
        ({"loras": [{"path": plain, "wieght": 1.0}]}, {}, ConfigError, "did you mean base.loras.0.weight"),
        ({"embeddings": [plain]}, {}, DataError, "plain.safetensors: not an embedding file"),
        ({"embeddings": [old, old]}, {}, ConfigError, "an earlier file hold the word <old>"),
        ({}, {"lora_init": str(half)}, DataError, "half.safetensors"),
        (
            {"embeddings": [old]},
            WORD | {"placeholder_tokens": ["<old>"], "init_tokens": []},
            ConfigError,
            "stages.0.placeholder_tokens: <old> is a word of base.embeddings, .* init_tokens",
        ),
    ]
    for base, stage, error, message in cases:
        with pytest.raises(error, match=message):
            plan_runs(run_of("run", [STYLE | stage], base=base)[0])
