"""Loading: a model with or without its weights, number types, and options."""

import jax
import numpy as np
import pytest

from sdjax import loading
from sdjax.errors import ConfigError, DataError


def test_an_outline_reads_no_weights(no_weights, micro_models):
    outline = loading.outline(micro_models())
    assert outline.name == str(micro_models()) and set(outline.shapes) == {"unet", "vae", "text_encoder"}
    with pytest.raises(AssertionError, match="weights were loaded"):
        loading.with_weights(outline)


def test_the_weights_have_the_shapes_of_the_outline(micro_models):
    outline = loading.outline(micro_models(sdxl=True))
    model = loading.load(micro_models(sdxl=True))
    assert model.outline.shapes.keys() == outline.shapes.keys() == model.params.keys()
    shapes_of = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    for part, shapes in outline.shapes.items():
        assert shapes_of(model.params[part]) == shapes_of(shapes)
    alone = loading.load_weights(outline, "text_encoder_2")
    jax.tree.map(np.testing.assert_array_equal, alone, model.params["text_encoder_2"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_and_computation_have_the_dtype_but_for_the_vae_in_float16(micro_models, dtype):
    model = loading.load(micro_models(), dtype)
    for part, params in model.params.items():
        expected = "float32" if (part, dtype) == ("vae", "float16") else dtype
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {expected}
        assert model.outline.module(part).compute.dtype == expected
    weights = loading.load_weights(model.outline, "unet", dtype="float32")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(weights)} == {"float32"}


def test_the_prediction_type_of_the_model_can_be_put_right(outline):
    assert outline.schedule.prediction_type == "v_prediction"
    other = loading.outline("tiny", prediction_type="epsilon")
    assert other.schedule.prediction_type == other.folder.scheduler["prediction_type"] == "epsilon"
    np.testing.assert_array_equal(other.schedule.betas, outline.schedule.betas)


def test_a_model_is_computed_for_the_platform_that_is_named():
    outline = loading.outline("tiny", platform="tpu")
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
        loading.load(source, **options)
