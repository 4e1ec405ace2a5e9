"""Merging while writing gives what merging in memory gives, and reads a leaf only when it is asked for."""

import jax
import micro
import numpy as np
import pytest

from sdjax import lora
from sdjax.errors import ConfigError, DataError
from sdjax.formats.deferred import Deferred
from sdjax.formats.merging import merged
from sdjax.model import Model
from sdjax.outline import Outline
from sdjax.trees import leaves

quick = pytest.fixture(scope="module", autouse=True)(micro.quick_compilation)


def test_a_deferred_array_is_computed_when_numpy_asks_for_it():
    calls = []
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    deferred = Deferred(values.shape, values.dtype, lambda: calls.append(1) or values)
    turned = deferred.transpose(2, 0, 1)
    views = {
        "T": (deferred.T, values.T),
        "turned": (turned, values.transpose(2, 0, 1)),
        "more": (turned[:, None, :1], values.transpose(2, 0, 1)[:, None, :1]),
    }
    assert not calls and (deferred.ndim, deferred.size) == (3, 24)
    for view, expected in views.values():
        assert view.shape == expected.shape and view.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(view), expected)
    assert len(calls) == 3 and np.asarray(deferred, np.float16).dtype == np.float16


def test_merging_reads_one_leaf_at_a_time(micro_models, tmp_path):
    outline = Outline.load(micro_models())
    model = Model.of(outline)
    adapter = lora.init(jax.random.key(0), model.params["unet"], rank=2, which="all")
    adapter = lora.map_layers(lambda layer: layer | {"up": layer["up"] + 0.1}, adapter)
    tree = merged(outline.view_weights("unet"), [(adapter, 0.5), (adapter, 1.0)])
    assert all(isinstance(leaf, Deferred) for _, leaf in leaves(tree))
    expected = lora.merge(lora.merge(model.params["unet"], adapter, 0.5), adapter)
    flat = dict(leaves(expected))
    for path, leaf in leaves(tree):
        np.testing.assert_array_equal(np.asarray(leaf), flat[path], err_msg=str(path))
    with pytest.raises(ConfigError, match="a layer the model lacks: nowhere"):
        stray = {"nowhere": {"diff": np.ones(3, np.float32), "scale": np.float32(1)}}
        merged(outline.view_weights("unet"), [(stray, 1.0)])


def test_what_is_not_a_number_is_found_while_writing(micro_models, tmp_path):
    model = Model.load(micro_models())
    kernel = model.params["unet"]["conv_in"]["kernel"]
    broken = {
        **model.params["unet"],
        "conv_in": {**model.params["unet"]["conv_in"], "kernel": kernel.at[0].set(np.nan)},
    }
    Model(model.outline, {**model.params, "unet": broken}).save(tmp_path / "a")
    outline = Outline.load(tmp_path / "a")
    lazy = Model(outline, {part: outline.view_weights(part) for part in outline.shapes})
    with pytest.raises(DataError, match=r"conv_in\.weight holds NaN or Inf"):
        lazy.save(tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
