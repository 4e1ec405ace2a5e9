"""An outline tells what a model is and what fits it, and reads no weights."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import ConfigError, DataError
from sdjax.model import Model
from sdjax.outline import Outline
from sdjax.text.encoding import HiddenState
from sdjax.text.syntax import Span


@pytest.fixture(scope="module")
def sdxl(micro_models):
    return Outline.load(micro_models(sdxl=True))


def test_an_outline_tells_sizes_and_kinds(outline, sdxl, micro_models):
    assert (outline.native_size, outline.size_multiple, outline.is_sdxl, outline.is_inpainting) == (64, 8, False, False)
    assert not outline.zeros_empty_prompts and sdxl.zeros_empty_prompts
    assert (sdxl.native_size, sdxl.size_multiple, sdxl.is_sdxl) == (16, 8, True)  # a factor of 2, but at least 8
    assert outline.text_widths == {"text_encoder": 128}
    assert sdxl.text_widths == {"text_encoder": 16, "text_encoder_2": 16}
    assert [sdxl.module(part) for part in sdxl.shapes] == [sdxl.unet, sdxl.vae, *sdxl.text_models.values()]
    assert Outline.load(micro_models(inpainting=True)).is_inpainting
    five = outline.unet.clone(config=dataclasses.replace(outline.unet.config, in_channels=5))
    with pytest.raises(ConfigError, match="5 input channels; expected 4 or, for inpainting, 9"):
        _ = dataclasses.replace(outline, unet=five).is_inpainting


def test_prompts_of_a_call_have_one_number_of_chunks(outline, sdxl):
    long = "joker, " * 12
    assert outline.chunks(["taco"]) == 1 < outline.chunks(["taco", long]) == outline.chunks([long])
    assert outline.chunks([[[Span("taco", 1.0)], [Span("cat", 1.5)]]]) == 2  # the sections of BREAK
    for name, ids in sdxl.tokenize(["taco", long]).items():
        assert ids.shape == (2, sdxl.chunks([long]), 16), name
    assert sdxl.tokenize(["taco"], chunks=3)["text_encoder_2"].shape == (1, 3, 16)


def test_the_context_is_the_last_hidden_state_or_that_of_clip_skip(outline, sdxl):
    assert outline.hidden_state() == HiddenState(1, True) and outline.hidden_state(2) == HiddenState(2, True)
    assert sdxl.hidden_state() == HiddenState(2, False) and sdxl.hidden_state(1) == HiddenState(1, False)
    for clip_skip in (0, -1, 4):
        with pytest.raises(ConfigError, match=re.escape(f"clip_skip = {clip_skip}: must lie in 1 (last layer)..3")):
            outline.hidden_state(clip_skip)


def test_only_sdxl_has_added_conditions(outline, sdxl):
    pooled = jnp.ones((2, 16), jnp.float32)
    sizes = np.array([[64, 96, 0, 0, 64, 96]] * 2)
    assert outline.added_conditions(pooled, sizes) is None
    added = sdxl.added_conditions(pooled, sizes)
    np.testing.assert_array_equal(added["time_ids"], sizes)
    np.testing.assert_array_equal(added["text_embeds"], pooled)


def test_a_refiner_must_be_of_the_same_kind(outline, sdxl, micro_models):
    for base, refiner, message in [
        (outline, sdxl, "(SDXL) cannot refine tiny (SD)"),
        (Outline.load(micro_models(inpainting=True)), Outline.load(micro_models()), "(SD) cannot refine "),
        (outline, Outline.load(micro_models()), "latent channels, pixels a latent, scaling_factor are (4, 2, "),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            base.with_refiner(refiner)
    for switch in (0, 1.1, -1):
        with pytest.raises(ConfigError, match="refiner switch = "):
            outline.with_refiner(outline, switch)


def test_new_words_are_added_to_a_new_outline(outline):
    wider = outline.with_words({"<w>": 2})
    first = outline.text_models["text_encoder"].config.vocab_size
    ids = wider.tokenize(["a <w>"])["text_encoder"]
    assert np.isin([first, first + 1], ids).all() and first not in outline.tokenize(["a <w>"])["text_encoder"]
    for word in ("<w>", "heart"):
        with pytest.raises(ConfigError, match=re.escape(f"{word!r}")):
            wider.with_words({word: 1})


def test_words_must_fit_the_text_models(outline, sdxl):
    rows = np.ones((2, 128), np.float32)
    words = {"<w>": {"text_encoder": rows}}
    np.testing.assert_array_equal(outline.load_words(words, "<v>")["<v>"]["text_encoder"], rows)
    with pytest.raises(ConfigError, match=r"token = '<v>' names one word; the mapping holds <w>, <x>$"):
        outline.load_words(words | {"<x>": words["<w>"]}, "<v>")
    with pytest.raises(DataError, match=r"'<w>' has vectors for text_encoder; .* has text_encoder, text_encoder_2"):
        sdxl.load_words(words)
    with pytest.raises(DataError, match="'<w>' has vectors for text_encoder; "):
        outline.load_words({"<w>": {"text_encoder": rows[0]}})  # one vector without its axis
    with pytest.raises(DataError, match=r"'<w>' has vectors \{.*\(2, 64\)\}; the widths"):
        outline.load_words({"<w>": {"text_encoder": rows[:, :64]}})


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": None},
        {"block_out_channels": "wide"},
        {"block_out_channels": []},
        {"block_out_channels": [16, 0]},
        {"layers_per_block": 10**9},
        {"layers_per_block": -1},
        {"norm_num_groups": 7},
        {"norm_num_groups": 0},
        {"attention_head_dim": 0},
        {"cross_attention_dim": 10**30},
        {"down_block_types": ["DownBlock2D"]},
        {"down_block_types": 5},
    ],
    ids=str,
)
def test_configs_that_make_no_model_are_an_error(micro_models, tmp_path, changes):
    shutil.copytree(micro_models(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "model/unet/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises((DataError, ConfigError)) as error:
        Outline.load(tmp_path / "model", weights=False)
    assert len(str(error.value).splitlines()) <= 2


def test_an_outline_reads_no_weights(no_weights, micro_models):
    outline = Outline.load(micro_models())
    assert outline.name == str(micro_models()) and set(outline.shapes) == {"unet", "vae", "text_encoder"}
    with pytest.raises(AssertionError, match="weights were loaded"):
        Model.of(outline)


def test_the_weights_have_the_shapes_of_the_outline(micro_models):
    outline = Outline.load(micro_models(sdxl=True))
    model = Model.load(micro_models(sdxl=True))
    assert model.outline.shapes.keys() == outline.shapes.keys() == model.params.keys()
    shapes_of = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    for part, shapes in outline.shapes.items():
        assert shapes_of(model.params[part]) == shapes_of(shapes)
    alone = outline.load_weights("text_encoder_2")
    jax.tree.map(np.testing.assert_array_equal, alone, model.params["text_encoder_2"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_and_computation_have_the_dtype_but_for_the_vae_in_float16(micro_models, dtype):
    model = Model.load(micro_models(), dtype)
    for part, params in model.params.items():
        expected = "float32" if (part, dtype) == ("vae", "float16") else dtype
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {expected}
        assert model.outline.module(part).compute.dtype == expected
    weights = model.outline.load_weights("unet", dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights)} == {"float32"}


def test_the_prediction_type_of_the_model_can_be_put_right(outline):
    assert outline.schedule.prediction_type == "v_prediction"
    other = Outline.load("tiny", prediction_type="epsilon")
    assert other.schedule.prediction_type == other.folder.scheduler["prediction_type"] == "epsilon"
    np.testing.assert_array_equal(other.schedule.betas, outline.schedule.betas)


def test_a_model_is_computed_for_the_platform_that_is_named():
    outline = Outline.load("tiny", platform="tpu")
    assert {outline.module(part).compute.target for part in outline.shapes} == {"tpu"}


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("tiny", {"dtype": "int8"}, ConfigError, "dtype = 'int8': expected one of float32, bfloat16, float16"),
        ("tiny", {"prediction_type": "x"}, ConfigError, "prediction_type"),
        ("tiny", {"tokenizer": "folder"}, ConfigError, "tokenizer = 'folder' is for models of a single file; tiny has"),
        ("nowhere/at/all", {}, DataError, "nowhere/at/all"),
        ("none.safetensors", {}, DataError, "none.safetensors"),
    ],
)
def test_what_cannot_be_loaded_is_named(no_weights, source, options, error, message):
    with pytest.raises(error, match=message):
        Model.load(source, **options)
