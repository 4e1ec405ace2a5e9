"""A model and its outline: loading, what the parts say, its text, image and U-Net computations, and what changes it."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pictures
import pytest
from PIL import Image

import sdjax.model
from sdjax import lora
from sdjax.errors import ConfigError, DataError
from sdjax.model import Model, Outline
from sdjax.text.encoding import HiddenState
from sdjax.text.syntax import Span, emphasis


@pytest.fixture(scope="module")
def model(micro_models):
    return Model.load(micro_models())


@pytest.fixture(scope="module")
def sdxl(micro_models):
    return Outline.load(micro_models(sdxl=True))


def adapters(model, seed):
    """Part -> an adapter that changes the part."""
    trees = {part: lora.init(jax.random.key(seed), model.params[part], rank=2) for part in ("unet", "text_encoder")}
    return {
        part: lora.map_layers(lambda layer: layer | {"up": layer["up"] + 0.1 * (seed + 1)}, tree)
        for part, tree in trees.items()
    }


# The outline.


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


# The text.


def test_the_context_of_a_prompt_does_not_depend_on_the_prompts_beside_it(model):
    together = model.encode_text(["a red heart", "taco"])
    np.testing.assert_allclose(together[1:], model.encode_text("taco"), atol=1e-5)
    longer, pooled = model.encode_prompts(["a red heart", "joker, " * 12])
    assert longer.shape == (2, model.outline.chunks(["joker, " * 12]) * 16, 16) and pooled.shape[0] == 2
    np.testing.assert_allclose(longer[:1, :16], together[:1], atol=1e-5)
    assert np.abs(np.asarray(model.encode_text("taco", clip_skip=2) - together[1:])).max() > 1e-3


LONG = "a " * 10
CHUNKS = {  # a prompt -> the weighted texts in each of its chunks
    "a (red heart:1.5), [taco]": [[("a ", 1), ("red heart", 1.5), (", ", 1), ("taco", 1 / 1.1)]],
    "plain words, BREAK ((joker))": [[("plain words,", 1)], [("joker", 1.21)]],
    f"{LONG}, (red heart:1.3) hot dog {LONG}": [
        [(f"{LONG},", 1)],
        [("red heart", 1.3), (f"hot dog {LONG}", 1)],
    ],
    f"{LONG}, a (<w>:0.5)": [[(f"{LONG}, a", 1)], [("<w>", 0.5)]],
    "<w> (cat:-1)": [[("<w>", 1), ("cat", -1)]],
}
WINDOW = 16


def by_pytorch(tokenizer, text_model, chunks, *, penultimate, restore_mean):
    """A1111's rule: the context of each chunk times the weights of its tokens, then back to the mean it had."""
    import torch

    contexts = []
    for spans in chunks:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in spans:
            more = [2263, 2264, 2265] if text == "<w>" else tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, weights = [*ids, *more], [*weights, *[weight] * len(more)]
        ids.append(tokenizer.eos_token_id)
        assert len(ids) <= WINDOW
        ids += [tokenizer.pad_token_id] * (WINDOW - len(ids))
        weights = torch.tensor([*weights, *[1.0] * (WINDOW - len(weights))])
        with torch.no_grad():
            out = text_model(torch.tensor([ids]), output_hidden_states=True)
        context = out.hidden_states[-2] if penultimate else out.last_hidden_state
        weighted = context * weights[None, :, None]
        contexts.append(weighted * (context.mean() / weighted.mean()) if restore_mean else weighted)
    return torch.cat(contexts, dim=1).numpy()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sd2v", "sdxl"])
def test_long_and_weighted_prompts_have_the_context_that_pytorch_gives(tmp_path, kind):
    import torch

    theirs, sd = pictures.pair(kind, tmp_path / kind)
    rng = np.random.default_rng(0)
    rows = {
        name: rng.normal(size=(3, width)).astype(np.float32) for name, width in sd.model.outline.text_widths.items()
    }
    model = sd.model.with_embedding({"<w>": rows})
    for name in rows:
        text_model = getattr(theirs, name)
        if text_model.config.eos_token_id == 2:  # means the largest id, which belongs to a new word below
            text_model.config.eos_token_id = 1
        text_model.resize_token_embeddings(2266)
        with torch.no_grad():
            text_model.get_input_embeddings().weight[2263:] = torch.from_numpy(rows[name])
    plain = model.encode_prompts(["plain words,"])
    for prompt, chunks in CHUNKS.items():
        for restore_mean in (True, False):
            expected = [
                by_pytorch(
                    getattr(theirs, name.replace("text_encoder", "tokenizer")),
                    getattr(theirs, name),
                    chunks,
                    penultimate=kind == "sdxl",
                    restore_mean=restore_mean,
                )
                for name in rows
            ]
            context, pooled = model.encode_prompts([emphasis(prompt)], restore_mean=restore_mean)
            assert oracle.error(context, np.concatenate(expected, axis=-1)) <= 1e-4, prompt
            if prompt.startswith("plain"):
                np.testing.assert_allclose(pooled, plain[1], atol=1e-5)  # that of the first chunk, without weights


# The image and the U-Net.


def test_images_and_latents_are_computed_one_by_one(model):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 24, 3), np.uint8)) for _ in range(2)]
    latents = model.encode_image(images)
    assert latents.shape == (2, 8, 12, 4)
    values = np.stack([np.asarray(image, np.float32) / 255 for image in images])
    np.testing.assert_allclose(model.encode_image(values), latents, atol=1e-5)
    decoded = model.decode_latents(10 * latents)
    assert decoded.shape == (2, 16, 24, 3) and decoded.min() == 0 and decoded.max() == 1
    np.testing.assert_array_equal(model.decode_latents(10 * latents[1:]), decoded[1:])


def test_the_autoencoder_in_tiles_is_another_model(model):
    image = np.random.default_rng(0).uniform(size=(1, 128, 128, 3)).astype(np.float32)
    in_tiles = model.with_tiled_vae(tile=64, overlap=16)
    whole, latents = model.encode_image(image), in_tiles.encode_image(image)
    assert model.tiling is None and latents.shape == whole.shape
    assert 0 < np.abs(np.asarray(latents - whole)).mean() < 0.2 * np.asarray(whole).std()
    assert in_tiles.decode_latents(latents).shape == (1, 128, 128, 3)


def test_a_picture_too_large_for_the_autoencoder_is_computed_in_tiles(model, monkeypatch, caplog):
    """XLA's library for the CPU fails on very large convolutions, and a GPU has no memory for them."""
    decode = sdjax.model.compiled_decode

    def failing(module, params, latents):
        if latents.shape[1] > 256:
            raise jax.errors.JaxRuntimeError("INTERNAL: YNNPACK operation failed\nmore")
        return decode(module, params, latents)

    latents = np.random.default_rng(0).normal(size=(1, 264, 8, 4)).astype(np.float32)
    expected = model.with_tiled_vae().decode_latents(latents)
    monkeypatch.setattr("sdjax.model.compiled_decode", failing)
    np.testing.assert_array_equal(model.decode_latents(latents), expected)
    assert "(INTERNAL: YNNPACK operation failed): it works in tiles (--tiled-vae)" in caplog.text


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


def test_one_timestep_stands_for_all_examples(model):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = model.encode_text(["a red heart", "taco"])
    np.testing.assert_array_equal(
        model.predict(latents, 500, context), model.predict(latents, np.array([500.0, 500.0]), context)
    )


# Adapters.


def test_a_merged_lora_leaves_the_first_model_as_it_was(model):
    trees = adapters(model, 0)
    before = jax.tree.map(np.asarray, model.params)
    merged = model.with_lora(trees, 0.5)
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    expected = lora.merge(model.params["unet"], trees["unet"], 0.5)
    jax.tree.map(np.testing.assert_array_equal, merged.params["unet"], expected)
    assert merged.params["vae"] is model.params["vae"]


def test_each_picture_has_the_adapter_of_its_number(model):
    first, second = adapters(model, 0), {"unet": adapters(model, 1)["unet"]}
    many = model.with_loras([first, second, None], [0.5, 1.0, 1.0])
    assert "lora" not in many.variables("unet") and "lora" not in many.variables("vae", [0])
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(3, 8, 8, 4)).astype(np.float32)
    prompts, numbers = ["a red heart", "taco", "cat"], [2, 0, 1]
    context, _ = many.encode_prompts(prompts, pictures=numbers)
    timesteps = np.full(3, 500, np.float32)
    predicted = jax.jit(model.outline.unet.apply)(many.variables("unet", numbers), latents, timesteps, context)
    alone = [model, model.with_lora(first, 0.5), model.with_lora(second)]
    for i, merged in enumerate(alone):
        own = merged.encode_text(prompts[i])
        np.testing.assert_allclose(context[i : i + 1], own, atol=1e-4)
        np.testing.assert_allclose(predicted[i : i + 1], merged.predict(latents[i : i + 1], 500, own), atol=1e-4)


def test_loras_need_a_weight_each(model):
    for loras, weights in (([{}], [1.0, 2.0]), ([], None)):
        with pytest.raises(ConfigError, match=f"{len(loras)} LoRAs with {len(weights or [])} weights"):
            model.with_loras(loras, weights)


# Inpainting.


def test_a_model_for_inpainting_computes_what_it_did_whatever_the_new_channels(model):
    nine = model.for_inpainting()
    assert nine.outline.is_inpainting and not model.outline.is_inpainting
    assert jax.tree.map(jnp.shape, nine.params["unet"]) == jax.tree.map(
        lambda leaf: leaf.shape, nine.outline.shapes["unet"]
    )
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 9)).astype(np.float32)
    context = model.encode_text("taco")
    np.testing.assert_allclose(
        nine.predict(latents, 500, context), model.predict(latents[..., :4], 500, context), atol=1e-5
    )


# Loading.


def test_an_outline_reads_no_weights(no_weights, micro_models):
    outline = Outline.load(micro_models())
    assert outline.name == str(micro_models()) and set(outline.shapes) == {"unet", "vae", "text_encoder"}
    with pytest.raises(AssertionError, match="weights were loaded"):
        outline.with_weights()


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
