"""What new words start as, the captions that teach them, and the pull on their norm."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.errors import ConfigError
from sdjax.prompt import Tokenizer
from sdjax.textual_inversion import decay_norm, initial_rows, templates, typical_norm

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(Path(sdjax.__file__).parent / "tiny" / "tokenizer", window=16)


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
