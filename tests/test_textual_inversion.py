"""What new words start as, the captions that teach them, and the pull on their norm."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import TOKENIZER, make_images, make_model, quick_compilation, settings

import sdjax
from sdjax import loading
from sdjax.errors import ConfigError, DataError
from sdjax.formats.embedding_file import save_embedding
from sdjax.model import Model
from sdjax.text.tokenizer import Tokenizer
from sdjax.textual_inversion import decay_norm, initial_rows, templates, typical_norm
from sdjax.train.results import NOTHING
from sdjax.train.stages import plan_run, prepare

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


def test_own_templates_are_kept_and_checked():
    assert templates(["{} on a table"]) == ("{} on a table",)
    for wrong in ("portrait", [], ["no place"]):
        with pytest.raises(ConfigError, match="template"):
            templates(wrong)


def test_a_phrase_gives_its_rows_over_and_over(table, tokenizer):
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


# In a bundle.

PROMPTS = ["a <w> and plana2, red plana2s", "<W>"]


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def model(request, tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp(request.param) / "model", sdxl=request.param == "sdxl")
    return sdjax.load(folder)


def new_rows(model, vectors, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(vectors, 16)).astype(np.float32) for name in model.model.outline.text_models}


def test_vectors_stand_where_the_word_does(model):
    """A word with the vectors of known tokens gives what these give."""
    tables = {
        name: model.params[name]["embeddings"]["token_embedding"]["embedding"]
        for name in model.model.outline.text_models
    }
    ids = model.model.outline.tokenizers["tokenizer"].words("red heart")
    same = {name: np.asarray(table)[np.array(ids)] for name, table in tables.items()}
    own = model.with_embedding({"<w>": same})
    for got, wanted in zip(
        own.model.encode_prompts(["a <w>, ok"]), model.model.encode_prompts(["a red heart, ok"]), strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert not model.model.placeholders and model.model.outline.tokenizers["tokenizer"].words(
        "<w>"
    ) != own.model.outline.tokenizers["tokenizer"].words("<w>")


def test_calls_add_up_and_a_saved_folder_gives_the_same(model, tmp_path):
    one, two = new_rows(model, 2), new_rows(model, 1, seed=1)
    save_embedding(tmp_path / "a.safetensors", "<w>", one)
    own = model.with_embedding(tmp_path / "a.safetensors").with_embedding({"x": two}, token="Plana2")
    for name, rows in own.model.placeholders.items():
        np.testing.assert_array_equal(rows, np.concatenate([one[name], two[name]]))
    wanted = own.model.encode_prompts(PROMPTS)
    other = model.with_embedding({"Plana2": two}).with_embedding({"<w>": one})
    own.save(tmp_path / "saved")
    saved = sdjax.load(tmp_path / "saved")
    for same in (other, saved):
        for got, expected in zip(same.model.encode_prompts(PROMPTS), wanted, strict=True):
            np.testing.assert_array_equal(got, expected)
    again = saved.with_embedding({"<later>": one})
    assert not saved.model.placeholders and len(again.model.placeholders["text_encoder"]) == 2
    again.save(tmp_path / "again")
    prompts = ["<later> <w>", "plana2 <later>"]
    for got, expected in zip(
        sdjax.load(tmp_path / "again").model.encode_prompts(prompts), again.model.encode_prompts(prompts), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_rows_go_where_the_tokenizer_numbers_them(model, tmp_path):
    """A table with spare rows behind the tokenizer's last word, as padded ones have."""
    model.save(tmp_path / "padded")
    config = tmp_path / "padded" / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] + 1}))
    wider = Model(loading.outline(tmp_path / "padded"), params_with_a_wider_table(model))
    own = wider.with_embedding({"<w>": new_rows(model, 2)})
    own.save(tmp_path / "saved")
    saved = sdjax.load(tmp_path / "saved")
    assert saved.model.outline.text_models["text_encoder"].config.vocab_size == settings["vocab_size"] + 2
    for got, expected in zip(saved.model.encode_prompts(PROMPTS), own.encode_prompts(PROMPTS), strict=True):
        np.testing.assert_array_equal(got, expected)


def params_with_a_wider_table(model):
    params = dict(model.params)
    text = params["text_encoder"]
    table = text["embeddings"]["token_embedding"]["embedding"]
    wider = jnp.concatenate([table, jnp.ones((1, table.shape[1]), table.dtype)])
    params["text_encoder"] = {**text, "embeddings": {**text["embeddings"], "token_embedding": {"embedding": wider}}}
    return params


def test_the_pooled_vector_is_the_end_tokens(model):
    """Old configs say eos_token_id 2 and mean the largest id: the end token's, not a new word's."""
    if not model.model.outline.is_sdxl:
        return
    name = "text_encoder_2"
    module = model.model.outline.text_models[name]
    old = module.clone(config=dataclasses.replace(module.config, eos_token_id=2))
    ids = np.array([[5, 2263, 9, 2262, 1]])
    variables = model.with_embedding({"<w>": new_rows(model, 1)}).model.variables(name)
    context, pooled = jax.jit(old.apply)(variables, ids)
    last = context[0, 3] @ variables["params"]["text_projection"]["kernel"]
    np.testing.assert_allclose(pooled[0], last, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(model, tmp_path):
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


# Beside diffusers.


def theirs(folder):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, unet=None, vae=None, local_files_only=True)


def their_context(pipeline, prompts):
    import torch

    pipeline.unet = None
    with torch.no_grad():
        if hasattr(pipeline, "text_encoder_2"):
            found = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
            return found[0].numpy(), found[2].numpy()
        found = pipeline.encode_prompt(prompts, "cpu", 1, False)
        return (found[0].numpy(),)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("word", "vectors"), [("<Plana>", 1), ("<plana>", 3)])
def test_diffusers_gives_the_same_context(model, tmp_path, word, vectors):
    from safetensors.numpy import load_file

    rows = new_rows(model, vectors)
    save_embedding(tmp_path / "plana.safetensors", word, rows)
    pipeline = theirs(model.model.outline.folder.path)
    if model.model.outline.is_sdxl:
        tensors = load_file(tmp_path / "plana.safetensors")
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            pipeline.load_textual_inversion(
                {word: as_torch(tensors[key])},
                token=word,
                text_encoder=getattr(pipeline, f"text_encoder{number}"),
                tokenizer=getattr(pipeline, f"tokenizer{number}"),
            )
    else:
        pipeline.load_textual_inversion(tmp_path / "plana.safetensors")
    own = model.with_embedding(tmp_path / "plana.safetensors")
    prompts = [f"a {word} on red", "heart", f"{word}, {word}"]
    wanted = their_context(pipeline, prompts)
    for got, expected in zip(own.model.encode_prompts(prompts), wanted, strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    # A folder we save is read by them, and one they save by us. (They give a word with capitals all of its vectors only
    # if it comes from a folder of ours.)
    own = own.with_embedding({"Two2": new_rows(model, 2, seed=2)}) if vectors == 1 else own
    own.save(tmp_path / "ours")
    read = their_context(theirs(tmp_path / "ours"), [*prompts, "a Two2"])
    for got, expected in zip(read, own.model.encode_prompts([*prompts, "a Two2"]), strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-4)
    shutil.copytree(model.model.outline.folder.path, tmp_path / "theirs")
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        if hasattr(pipeline, name):
            shutil.rmtree(tmp_path / "theirs" / name)
            getattr(pipeline, name).save_pretrained(tmp_path / "theirs" / name)
    for got, expected in zip(sdjax.load(tmp_path / "theirs").model.encode_prompts(prompts), wanted, strict=False):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def as_torch(array):
    import torch

    return torch.from_numpy(array)


@pytest.mark.parametrize(("norm", "said"), [({}, False), ({"clip_ti_norm": 50.0}, True)])
def test_a_norm_far_from_where_the_words_begin_is_said(tmp_path, caplog, norm, said):
    stage = {"train": ["textual_inversion"], "placeholder_tokens": ["<w>"], "init_tokens": ["red"]}
    stage |= {"clip_ti_decay": True, **norm}
    folders = make_model(tmp_path / "model"), make_images(tmp_path / "images"), tmp_path / "run"
    run = plan_run(settings(*folders, stages=[stage]))
    prepare(run, run.stages[0], NOTHING)
    assert ("clip_ti_decay draws them to 50, clip_ti_norm" in caplog.text) == said
