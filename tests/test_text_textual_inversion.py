"""Textual Inversion: captions, first rows, decay of norms, models with new words, and their gradient."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from micro import TOKENIZER, make_images, make_model, quick_compilation, settings

from sdjax.errors import ConfigError, DataError
from sdjax.formats.embedding_file import save_embedding
from sdjax.model import Model
from sdjax.outline import Outline
from sdjax.text.textual_inversion import decay_norm, initial_rows, templates, typical_norm
from sdjax.text.tokenizer import Tokenizer
from sdjax.train.results import NOTHING
from sdjax.train.stages import plan_run, prepare
from sdjax.train.step import Draws, distance, variables

KEY = jax.random.key(0)
quick = pytest.fixture(scope="module", autouse=True)(quick_compilation)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(TOKENIZER, window=16)


@pytest.fixture(scope="module")
def table():
    return np.random.default_rng(0).normal(0, 0.1, (2263, 8)).astype(np.float16)


@pytest.mark.parametrize("name", ["object", "style"])
def test_each_template_has_one_place_for_the_word(name):
    texts = templates(name)
    assert len(set(texts)) == len(texts) >= 20
    assert all(text.count("{}") == 1 and "<w>" in text.format("<w>") for text in texts)


def test_a_list_of_templates_is_kept_and_checked():
    assert templates(["{} on a table"]) == ("{} on a table",)
    for wrong in ("portrait", [], ["no braces"]):
        with pytest.raises(ConfigError, match="template"):
            templates(wrong)


def test_a_phrase_gives_its_rows_repeated(table, tokenizer):
    ids = tokenizer.words("red heart")
    rows = initial_rows(KEY, table, tokenizer, "red heart", 2 * len(ids) + 1)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[*ids, *ids, ids[0]]])
    np.testing.assert_array_equal(initial_rows(KEY, jnp.asarray(table), tokenizer, "red heart", None), table[ids[:1]])


def test_random_zero_and_default(table, tokenizer):
    assert not initial_rows(KEY, table, tokenizer, "<zero>", 3).any()
    rows = initial_rows(KEY, table, tokenizer, "<rand-0.017>", 4000)
    np.testing.assert_allclose([rows.std(), rows.mean()], [0.017, 0.0], atol=3e-4)
    default = initial_rows(KEY, table, tokenizer, None, 3)
    np.testing.assert_allclose(np.linalg.norm(default, axis=-1), typical_norm(table), rtol=1e-5)
    assert np.abs(default[0] - default[1]).max() > 0.01
    assert not np.array_equal(default, initial_rows(jax.random.key(1), table, tokenizer, None, 3))


def test_rows_of_a_file_are_taken_as_they_are(table, tokenizer):
    rows = np.ones((3, 8), np.float32)
    for vectors in (3, None):
        np.testing.assert_array_equal(initial_rows(KEY, table, tokenizer, rows, vectors), rows)
    for shape, vectors in (((3, 8), 2), ((3, 9), 3), ((8,), 1)):
        with pytest.raises(ConfigError, match="shape"):
            initial_rows(KEY, table, tokenizer, np.ones(shape, np.float32), vectors)


@pytest.mark.parametrize("init", ["", "   ", "<rand-x>", "<rand-0>", "<rand-inf>", "<rand--1>", "a <new>"])
def test_an_unusable_init_is_named(table, tokenizer, init):
    known = tokenizer.with_placeholders({"<new>": 1}, first=len(table))
    with pytest.raises(ConfigError, match="init_tokens"):
        initial_rows(KEY, table, known, init, 1)


def test_norm_decay_is_the_formula(table):
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(5, 8)), jnp.float32).at[2].set(0)
    norm = np.linalg.norm(np.asarray(rows), axis=-1)
    for rate in (1e-3, 5e-3, 0.01, 1.0):
        got = np.asarray(jax.jit(decay_norm)(rows, rate, 0.4))
        wanted = norm + min(1, 100 * rate) * (0.4 - norm)
        wanted[2] = 0
        np.testing.assert_allclose(np.linalg.norm(got, axis=-1), wanted, rtol=1e-5)
        cosine = np.sum(got * np.asarray(rows), axis=-1)[norm > 0] / (wanted * norm)[norm > 0]
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    np.testing.assert_array_equal(decay_norm(rows, 0.0, 0.4), rows)
    gradient = jax.grad(lambda rows: jnp.sum(decay_norm(rows, 0.1, 0.4)))(rows[:2])
    assert np.isfinite(gradient).all()


def test_typical_norm_leaves_rows_of_zeros_out():
    table = np.zeros((100, 4), np.float32)
    assert typical_norm(table) == 0
    table[:3, 0] = [1, 2, 30]
    assert typical_norm(table) == 2


# Models with new words.

PROMPTS = ["a <w> and plana2, red plana2s", "<W>"]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp(request.param) / "model", sdxl=request.param == "sdxl")
    return Model.load(folder)


def new_rows(model, vectors, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(vectors, 16)).astype(np.float32) for name in model.outline.text_models}


def test_vectors_stand_where_the_word_does(model):
    """A word with the vectors of known tokens gives the context of these tokens."""
    tables = {
        name: model.params[name]["embeddings"]["token_embedding"]["embedding"] for name in model.outline.text_models
    }
    ids = model.outline.tokenizers["tokenizer"].words("red heart")
    same = {name: np.asarray(table)[np.array(ids)] for name, table in tables.items()}
    taught = model.with_embedding({"<w>": same})
    got, expected = taught.encode_prompts(["a <w>, ok"]), model.encode_prompts(["a red heart, ok"])
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    words = lambda model: model.outline.tokenizers["tokenizer"].words("<w>")
    assert not model.placeholders and words(model) != words(taught)


def test_calls_add_up_and_a_saved_folder_gives_the_same(model, tmp_path):
    one, two = new_rows(model, 2), new_rows(model, 1, seed=1)
    save_embedding(tmp_path / "a.safetensors", "<w>", one)
    taught = model.with_embedding(tmp_path / "a.safetensors").with_embedding({"x": two}, token="Plana2")
    for name, rows in taught.placeholders.items():
        np.testing.assert_array_equal(rows, np.concatenate([one[name], two[name]]))
    expected = taught.encode_prompts(PROMPTS)
    other = model.with_embedding({"Plana2": two}).with_embedding({"<w>": one})
    taught.save(tmp_path / "saved")
    saved = Model.load(tmp_path / "saved")
    for same in (other, saved):
        for ours, theirs in zip(same.encode_prompts(PROMPTS), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    again = saved.with_embedding({"<later>": one})
    assert not saved.placeholders and len(again.placeholders["text_encoder"]) == 2
    again.save(tmp_path / "again")
    prompts = ["<later> <w>", "plana2 <later>"]
    reread = Model.load(tmp_path / "again")
    for got, expected in zip(reread.encode_prompts(prompts), again.encode_prompts(prompts), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_rows_go_where_the_tokenizer_numbers_them(model, tmp_path):
    """The table has a spare row after the last word of the tokenizer, as padded tables have."""
    model.save(tmp_path / "padded")
    config = tmp_path / "padded" / "text_encoder" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"vocab_size": values["vocab_size"] + 1}))
    wider = Model(Outline.load(tmp_path / "padded"), params_with_a_wider_table(model))
    taught = wider.with_embedding({"<w>": new_rows(model, 2)})
    taught.save(tmp_path / "saved")
    saved = Model.load(tmp_path / "saved")
    assert saved.outline.text_models["text_encoder"].config.vocab_size == values["vocab_size"] + 2
    for got, expected in zip(saved.encode_prompts(PROMPTS), taught.encode_prompts(PROMPTS), strict=True):
        np.testing.assert_array_equal(got, expected)


def params_with_a_wider_table(model):
    params = dict(model.params)
    text = params["text_encoder"]
    table = text["embeddings"]["token_embedding"]["embedding"]
    wider = jnp.concatenate([table, jnp.ones((1, table.shape[1]), table.dtype)])
    params["text_encoder"] = {**text, "embeddings": {**text["embeddings"], "token_embedding": {"embedding": wider}}}
    return params


def test_the_pooled_vector_is_that_of_the_end_token(model):
    """In old configs eos_token_id = 2 means the largest id of the table, which no new word has."""
    if not model.outline.is_sdxl:
        return
    name = "text_encoder_2"
    module = model.outline.text_models[name]
    old = module.clone(config=dataclasses.replace(module.config, eos_token_id=2))
    ids = np.array([[5, 2263, 9, 2262, 1]])
    collections = model.with_embedding({"<w>": new_rows(model, 1)}).variables(name)
    context, pooled = jax.jit(old.apply)(collections, ids)
    last = context[0, 3] @ collections["params"]["text_projection"]["kernel"]
    np.testing.assert_allclose(pooled[0], last, rtol=1e-4, atol=1e-5)


def test_words_that_do_not_fit_are_refused(model, tmp_path):
    rows = new_rows(model, 2)
    wide = {name: np.zeros((2, 17), np.float32) for name in rows}
    for words, fault in (
        ({"<w>": wide}, "17"),
        ({"<w>": {}}, "the word '<w>'"),
        ({"<w>": {**rows, "unet": np.zeros((1, 16))}}, "unet"),
        ({"<w>": {"text_encoder_2": np.zeros((2, 16), np.float32)}}, "text_encoder_2"),
    ):
        with pytest.raises(DataError, match=fault):
            model.with_embedding(words)
    save_embedding(tmp_path / "a.safetensors", "a", wide)
    with pytest.raises(DataError, match="the model's width is 16"):
        model.with_embedding(tmp_path / "a.safetensors")
    known = model.with_embedding({"<w>": rows})
    for words, token in (({"<w>": rows}, None), ({"<new>": rows}, "heart"), ({"a1b": rows, "b1a": rows}, "c1")):
        with pytest.raises(ConfigError, match=r"placeholder token|names one word"):
            known.with_embedding(words, token)


@pytest.mark.parametrize(("norm", "warned"), [({}, False), ({"clip_ti_norm": 50.0}, True)])
def test_a_norm_far_from_that_of_the_first_rows_is_warned_of(tmp_path, caplog, norm, warned):
    stage = {"train": ["textual_inversion"], "placeholder_tokens": ["<w>"], "init_tokens": ["red"]}
    stage |= {"clip_ti_decay": True, **norm}
    folders = make_model(tmp_path / "model"), make_images(tmp_path / "images"), tmp_path / "run"
    run = plan_run(settings(*folders, stages=[stage]))
    prepare(run, run.stages[0], NOTHING)
    assert ("clip_ti_decay draws them to 50, clip_ti_norm" in caplog.text) == warned


# Beside diffusers and PyTorch.


def theirs(folder):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, unet=None, vae=None, local_files_only=True)


def their_context(pipeline, prompts):
    import torch

    pipeline.unet = None
    with torch.no_grad():
        if hasattr(pipeline, "text_encoder_2"):
            context, _, pooled, _ = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
            return context.numpy(), pooled.numpy()
        context, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
        return (context.numpy(),)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("word", "vectors"), [("<Plana>", 1), ("<plana>", 3)])
def test_diffusers_gives_the_same_context(model, tmp_path, word, vectors):
    from safetensors.numpy import load_file

    rows = new_rows(model, vectors)
    save_embedding(tmp_path / "plana.safetensors", word, rows)
    pipeline = theirs(model.outline.folder.path)
    if model.outline.is_sdxl:
        tensors = load_file(tmp_path / "plana.safetensors")
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                {word: oracle.tensor(tensors[key])},
                token=word,
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
            )
    else:
        pipeline.load_textual_inversion(tmp_path / "plana.safetensors")
    taught = model.with_embedding(tmp_path / "plana.safetensors")
    prompts = [f"a {word} on red", "heart", f"{word}, {word}"]
    expected = their_context(pipeline, prompts)
    for ours, wanted in zip(taught.encode_prompts(prompts), expected, strict=False):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)
    # They read a folder that we save, and we read one that they save. (diffusers gives a word with capitals all of its
    # vectors only if the word comes from a folder of ours.)
    taught = taught.with_embedding({"Two2": new_rows(model, 2, seed=2)}) if vectors == 1 else taught
    taught.save(tmp_path / "ours")
    read = their_context(theirs(tmp_path / "ours"), [*prompts, "a Two2"])
    for wanted, ours in zip(read, taught.encode_prompts([*prompts, "a Two2"]), strict=False):
        np.testing.assert_allclose(wanted, ours, atol=1e-4)
    shutil.copytree(model.outline.folder.path, tmp_path / "theirs")
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if hasattr(pipeline, name):
            shutil.rmtree(tmp_path / "theirs" / name)
            getattr(pipeline, name).save_pretrained(tmp_path / "theirs" / name)
    for ours, wanted in zip(Model.load(tmp_path / "theirs").encode_prompts(prompts), expected, strict=False):
        np.testing.assert_allclose(ours, wanted, atol=1e-4)


WORDS = {"placeholder_tokens": ["<a>", "<b>"], "vectors_per_token": [2, 1], "init_tokens": ["red", "<rand-0.5>"]}
CAPTIONS = ["a <a> and a <b>", "<b> emoji", "red heart", "<a>"]


@pytest.mark.parity
@pytest.mark.parametrize("sdxl", [False, True], ids=["sd", "sdxl"])
def test_the_gradient_by_the_rows_is_that_of_pytorch(tmp_path, sdxl):
    folder, images = make_model(tmp_path / "model", sdxl=sdxl), make_images(tmp_path / "images")
    stage = {"train": ["textual_inversion"], "learning_rate": 1e-2, **WORDS}
    run = plan_run(settings(folder, images, tmp_path / "run", stages=[stage]))
    plan, recipe = run.stages[0], run.stages[0].recipe
    state, frozen = prepare(run, plan, NOTHING)
    rng = np.random.default_rng(0)
    latents, noise = (rng.normal(size=(4, 8, 8, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.array([10, 300, 600, 990])
    ids = recipe.outline.tokenize(CAPTIONS)
    sizes = rng.integers(0, 64, (4, 6)).astype(np.float32)
    batch = {**ids, "moments": np.zeros((4, 8, 8, 8), np.float32), "sizes": sizes}
    draws = Draws(latents, noise, jnp.asarray(timesteps), jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

    @jax.jit
    @jax.value_and_grad
    def loss(trainable):
        return jnp.mean(distance(recipe, variables(recipe, trainable, frozen), batch, draws))

    value, gradient = loss(state.trainable)
    expected_value, expected = pytorch(folder, recipe.outline, state.trainable, ids, latents, noise, timesteps, sizes)
    assert float(value) == pytest.approx(expected_value, rel=1e-4)
    for name, rows in gradient["textual_inversion"].items():
        assert oracle.error(rows, expected[name]) <= 1e-3, name


def pytorch(folder, model, trainable, ids, latents, noise, timesteps, sizes):
    """Returns the loss and its gradient by the rows of each text model, as diffusers' training scripts compute them."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tables, hidden, pooled = {}, [], None
    for name in model.text_models:
        second = name == "text_encoder_2"
        text = (CLIPTextModelWithProjection if second else CLIPTextModel).from_pretrained(folder / name)
        size = text.config.vocab_size
        new = trainable["textual_inversion"][name]
        text.resize_token_embeddings(size + len(new), mean_resizing=False)
        table = text.get_input_embeddings().weight
        with torch.no_grad():
            table[size:] = oracle.tensor(new)
        output = text(oracle.tensor(ids[name][:, 0]).long(), output_hidden_states=True)
        hidden.append(output.hidden_states[-2] if model.is_sdxl else output.last_hidden_state)
        pooled, tables[name] = output.text_embeds if second else None, (table, size)
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    latents, noise = (oracle.channels_first(array) for array in (latents, noise))
    timesteps = torch.from_numpy(timesteps)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    added = {"text_embeds": pooled, "time_ids": oracle.tensor(sizes)}
    output = unet(noisy, timesteps, torch.cat(hidden, -1), added_cond_kwargs=added if model.is_sdxl else None).sample
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = (output - target).square().mean()
    loss.backward()
    return loss.item(), {name: table.grad[size:].numpy() for name, (table, size) in tables.items()}
