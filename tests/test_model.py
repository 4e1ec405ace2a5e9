"""A model and its outline: loading, what the parts say, its text, image and U-Net computations, and what changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pictures
import pytest
from PIL import Image

import sdjax.model
from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.model import Model
from sdjax.text.syntax import emphasis


@pytest.fixture(scope="module")
def model(micro_models):
    return Model.load(micro_models())


def adapters(model, seed):
    """Part -> an adapter that changes the part."""
    trees = {part: lora.init(jax.random.key(seed), model.params[part], rank=2) for part in ("unet", "text_encoder")}
    return {
        part: lora.map_layers(lambda layer: layer | {"up": layer["up"] + 0.1 * (seed + 1)}, tree)
        for part, tree in trees.items()
    }


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


def test_one_timestep_stands_for_all_examples(model):
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 8, 8, 4)).astype(np.float32)
    context = model.encode_text(["a red heart", "taco"])
    np.testing.assert_array_equal(
        model.predict(latents, 500, context), model.predict(latents, np.array([500.0, 500.0]), context)
    )


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
