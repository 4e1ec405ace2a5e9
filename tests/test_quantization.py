"""The U-Net's weights in int8: their rounding, their layers, and drawing and training with them."""

import dataclasses

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

from sdjax import lora, quantization
from sdjax.draw.programs import drawing_with
from sdjax.errors import ConfigError
from sdjax.model import Model
from sdjax.models.layers import Compute, Conv, Dense
from sdjax.outline import Outline
from sdjax.train.loop import train
from sdjax.trees import layers, leaves

pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_each_weight_is_within_half_a_step_of_its_output():
    kernel = normal(0, 3, 3, 5, 4) * np.array([1e-6, 1.0, 0.0, 1e6], np.float32)
    whole, step = map(np.asarray, quantization.rounded(kernel))
    assert whole.dtype == np.int8 and step.dtype == np.float32
    largest = np.abs(kernel).max((0, 1, 2))
    np.testing.assert_allclose(step[[0, 1, 3]], largest[[0, 1, 3]] / 127, rtol=1e-6)
    assert np.abs(whole).max((0, 1, 2)).tolist() == [127, 127, 0, 127]  # the third output has weights of 0
    assert np.all(np.abs(whole * step - kernel) <= step / 2 * (1 + 1e-5))


MODULES = {
    "linear": (Dense(6, Compute()), (4, 10)),
    "3x3": (Conv(6, Compute()), (2, 8, 8, 3)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dora", [False, True])
def test_a_layer_computes_with_the_weights_that_its_kernel_stands_for(kind, dora):
    module, shape = MODULES[kind]
    x = normal(1, *shape)
    params = {"layer": module.init(jax.random.key(0), x)["params"]}
    adapter = lora.init(jax.random.key(1), params, rank=2, which="all", dora=dora)["layer"]
    adapter["up"] = normal(2, *adapter["up"].shape)
    kept = quantization.quantized(params)["layer"]
    plain = {"kernel": quantization.weights(kept), "bias": kept["bias"]}

    def output(layer, x):
        return module.apply({"params": layer, "lora": adapter}, x)

    np.testing.assert_allclose(output(kept, x), output(plain, x), rtol=1e-5, atol=1e-6)
    gradient = lambda layer: jax.grad(lambda x: jnp.sum(jnp.square(output(layer, x))))(x)
    np.testing.assert_allclose(gradient(kept), gradient(plain), rtol=1e-4, atol=1e-5)


def test_a_layer_in_two_ranges_of_outputs():
    module, x = Dense(6, Compute()), normal(1, 4, 10)
    kept = quantization.quantized({"layer": module.init(jax.random.key(0), x)["params"]})["layer"]
    parts = module.apply({"params": kept}, x, parts=2)
    np.testing.assert_allclose(np.concatenate(parts, -1), module.apply({"params": kept}, x), rtol=1e-6, atol=1e-7)


def kept_for_the_backward_pass(adapter, kernel):
    """The shapes and dtypes of what the gradient by the input keeps of a linear layer."""
    module, x = Dense(64, Compute()), normal(1, 4, 32)

    def pullback(x, adapter, kernel):
        return jax.vjp(lambda x: module.apply({"params": kernel, "lora": adapter}, x), x)[1]

    return {(leaf.dtype.name, leaf.shape) for leaf in jax.make_jaxpr(pullback)(x, adapter, kernel).out_avals}


def test_the_backward_pass_keeps_no_wide_weights():
    params = {"layer": {"kernel": normal(0, 32, 64), "bias": normal(1, 64)}}
    wide = ("float32", (32, 64))
    assert wide in kept_for_the_backward_pass({}, params["layer"])
    kept = kept_for_the_backward_pass({}, quantization.quantized(params)["layer"])
    assert wide not in kept and ("int8", (32, 64)) in kept


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_the_backward_pass_keeps_no_change_of_the_weights(kind):
    params = {"layer": {"kernel": normal(0, 32, 64), "bias": normal(1, 64)}}
    adapter = lora.init(jax.random.key(0), params, rank=2, kind=kind, which="all")["layer"]
    kept = quantization.quantized(params)["layer"]
    assert ("float32", (32, 64)) not in kept_for_the_backward_pass(adapter, kept)


# --------------------------------------------------------------------------------------------------- loading, drawing


@pytest.fixture(scope="module")
def plain(micro_models):
    return Model.load(micro_models())


@pytest.fixture(scope="module")
def kept(micro_models):
    return Model.load(micro_models(), base_dtype="int8")


@pytest.fixture(scope="module")
def adapters(plain):
    trees = {}
    for part in ("unet", "text_encoder"):
        tree = lora.init(jax.random.key(1), plain.params[part], rank=2)
        trees[part] = lora.map_layers(lambda a: {**a, "up": 0.3 * normal(2, *a["up"].shape)}, tree)
    return trees


def prediction(model):
    latents, context = normal(3, 2, 8, 8, 4), model.encode_text(["red heart", "cat"])
    return np.asarray(model.predict(latents, np.array([10, 700]), context))


def whole(model):
    """The model in int8 with the weights that its kernels stand for."""
    flat = dict(leaves(model.params["unet"]))
    for path, layer in layers(model.params["unet"], quantization.STEP):
        flat[*path, "kernel"] = quantization.weights(layer)
        del flat[*path, quantization.STEP]
    return dataclasses.replace(model, params={**model.params, "unet": quantization.nest(flat)}, adapters={})


def test_only_the_unet_is_kept_in_int8(plain, kept):
    dtypes = {path: leaf.dtype.name for path, leaf in leaves(kept.params)}
    assert {path[0] for path, dtype in dtypes.items() if dtype == "int8"} == {"unet"}
    assert {path[1] for path, dtype in dtypes.items() if path[-1] == "kernel" and dtype != "int8"} >= {
        "conv_in",
        "conv_out",
    }
    shapes = kept.outline.abstract_params("unet")
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), kept.params["unet"]
    )
    size = lambda model: sum(leaf.nbytes for path, leaf in leaves(model.params["unet"]) if path[-1] == "kernel")
    assert size(kept) < 0.3 * size(plain)
    assert kept.outline.load_weights("unet", dtype=jnp.float32)["conv_in"]["kernel"].dtype == jnp.float32


def test_predictions_are_those_of_the_rounded_weights_and_near_those_of_float32(plain, kept):
    np.testing.assert_allclose(prediction(kept), prediction(whole(kept)), rtol=1e-4, atol=1e-5)
    error = np.linalg.norm(prediction(kept) - prediction(plain)) / np.linalg.norm(prediction(plain))
    assert 1e-4 < error < 0.02


def test_a_lora_stays_beside_the_weights(kept, adapters):
    twice = kept.with_lora(adapters, 0.5).with_lora({"unet": adapters["unet"]}, 0.2)
    merged = whole(kept).with_lora(adapters, 0.5).with_lora({"unet": adapters["unet"]}, 0.2)
    np.testing.assert_allclose(prediction(twice), prediction(merged), rtol=1e-4, atol=1e-5)
    assert not quantization.is_quantized(twice.params["text_encoder"]) and set(twice.adapters) == {"unet"}


def test_each_picture_with_its_lora_on_top_of_a_common_one(kept, adapters):
    common = kept.with_lora({"unet": adapters["unet"]}, 0.5)
    each = common.with_loras([{"unet": adapters["unet"]}, None], [0.3, 1.0])
    for picture, weight in enumerate((0.8, 0.5)):
        got = each.variables("unet", [picture])["lora"]
        _, layer = next(layers(got, "scale"))
        _, alone = next(layers(adapters["unet"], "scale"))
        expected = weight * alone["scale"] * alone["down"] @ alone["up"]
        np.testing.assert_allclose(
            layer["scale"][0] * layer["down"][0] @ layer["up"][0], expected, rtol=1e-4, atol=1e-5
        )
    with pytest.raises(ConfigError, match="with_lora comes before with_loras"):
        each.with_lora(adapters)


def test_with_loras_replaces_those_of_an_earlier_call(plain, adapters):
    again = plain.with_loras([adapters, None]).with_loras([None, {"unet": adapters["unet"]}])
    once = plain.with_loras([None, {"unet": adapters["unet"]}])
    assert again.adapters.keys() == {"unet"}
    jax.tree.map(np.testing.assert_array_equal, again.adapters, once.adapters)


def test_loras_of_the_base_are_merged_before_the_rounding(plain, kept, adapters):
    outline = dataclasses.replace(kept.outline, loras=((adapters, 0.7),))
    merged = quantization.quantized(lora.merge(plain.params["unet"], adapters["unet"], 0.7))
    jax.tree.map(np.testing.assert_array_equal, outline.load_weights("unet"), merged)


def test_nothing_is_merged_into_or_saved_from_rounded_weights(kept, adapters, tmp_path, micro_models):
    with pytest.raises(ConfigError, match="is in int8, which would lose the change"):
        lora.merge(kept.params["unet"], adapters["unet"])
    with pytest.raises(ConfigError, match="load the model without base_dtype to save it"):
        kept.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="base_dtype = 'int4': expected one of"):
        Outline.load(micro_models(), base_dtype="int4")


def test_the_planned_step_of_drawing_takes_int8(micro_models):
    programs = drawing_with(
        str(micro_models()), "bfloat16", jax.devices()[:1], side=None, count=1, steps=2, base_dtype="int8"
    )
    lowered = next(p for p in programs if p.name == "sampler step").lower(lambda *arrays: arrays)
    assert "xi8>" in lowered.as_text()


# ----------------------------------------------------------------------------------------------------------- training


def run(tmp_path, micro_models, micro_images, name, stages=None, **changes):
    config = micro.settings(micro_models(), micro_images, tmp_path / name, stages=stages, **changes)
    assert train(config) == 0
    return tmp_path / name


def losses(output, key="loss"):
    return np.array([line[key] for line in micro.metric_lines(output, key)])


STAGES = [
    {"name": "first", "lora_parts": ["unet", "text_encoder"], "steps": 3},
    {"name": "style", "lora_parts": ["unet"], "steps": 3},
]


def test_loras_are_trained_on_int8(tmp_path, micro_models, micro_images):
    """The second stage stands on the first, whose LoRA is merged before the base is rounded again."""
    blind = {"validation": {"every": 3}}
    plain = run(tmp_path, micro_models, micro_images, "plain", STAGES, **blind)
    kept = run(tmp_path, micro_models, micro_images, "kept", STAGES, base_dtype="int8")
    assert len(losses(kept)) == 6
    for key in ("loss", "held_out_loss"):
        np.testing.assert_allclose(losses(kept, key), losses(plain, key), rtol=0.02)
    for stage in ("first", "style"):
        assert (kept / f"samples/{stage}-before-after.png").exists()
        assert micro.exported(kept, stage).keys() == micro.exported(plain, stage).keys()
    mesh = {"parallel": {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}}}
    split = run(tmp_path, micro_models, micro_images, "split", STAGES[:1], base_dtype="int8", **blind, **mesh)
    np.testing.assert_allclose(losses(split), losses(kept)[:3], rtol=1e-4)


def test_a_setting_that_changes_nothing_is_refused(micro_models, micro_images, tmp_path):
    with pytest.raises(ConfigError, match="base_dtype = 'int8' is for weights beneath LoRA or words"):
        micro.settings(micro_models(), micro_images, tmp_path, stages=[{"train": ["unet"]}], base_dtype="int8")
