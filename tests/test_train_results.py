"""What a stage starts from and what it leaves, in a run that trains everything; the rows of new words."""

from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest

import sdjax
from sdjax import trees
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.text import textual_inversion
from sdjax.train.stages import plan_run

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def exports(everything):
    """The folder with the exports of all stages."""
    return Path(everything.output) / "export"


@pytest.fixture
def table(micro_base):
    """The embedding table of the base model."""
    return micro_base.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]


def words_of(folder):
    width = {"text_encoder": micro.TEXT["hidden_size"]}
    files = [load_embedding(path, width) for path in folder.glob("*.safetensors") if "lora" not in path.name]
    return {word: rows["text_encoder"] for file in files for word, rows in file.items()}


def test_only_the_trained_words_move(exports, micro_base, table):
    words, style, both = (words_of(exports / stage) for stage in ("words", "style", "both"))
    table = np.asarray(table)
    red, circle = (table[number] for number in micro_base.model.outline.tokenizers["tokenizer"].words("red circle"))
    assert words["<plana>"].shape == (2, 16) and words["<sky>"].shape == (1, 16)
    assert 0 < np.abs(words["<plana>"] - np.stack([red, circle])).max() < 3
    # clip_ti_decay with a rate of 0.01 draws the norm all the way.
    norm = textual_inversion.typical_norm(table)
    np.testing.assert_allclose(np.linalg.norm(words["<sky>"]), norm, rtol=1e-5)
    for word, rows in words.items():
        np.testing.assert_array_equal(style[word], rows)
    np.testing.assert_array_equal(both["<plana>"], words["<plana>"])
    assert np.abs(both["<sky>"] - words["<sky>"]).max() > 1e-3
    assert both["<new>"].shape == (1, 16)
    whole = sdjax.load(exports / "whole" / "model")
    assert whole.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"].shape == table.shape


def test_an_adapter_is_trained_further_not_added_to(exports, micro_base):
    style, both = (load_lora(exports / stage / "lora.safetensors", micro_base.params) for stage in ("style", "both"))
    assert set(style) == {"unet"} and set(both) == {"unet", "text_encoder"}
    first, second = (dict(trees.layers(tree["unet"], "down")) for tree in (style, both))
    assert first.keys() == second.keys()
    moved = [np.abs(first[path]["up"] - second[path]["up"]).max() for path in first]
    assert all(first[path]["down"].shape == second[path]["down"].shape for path in first) and min(moved) > 0


def test_a_trained_autoencoder_is_used_by_later_stages(exports, micro_base):
    after = sdjax.load(exports / "autoencoder" / "model")
    for part in ("unet", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, after.params[part], micro_base.params[part])
    whole = sdjax.load(exports / "whole" / "model")
    jax.tree.map(np.testing.assert_array_equal, whole.params["vae"], after.params["vae"])
    for part in ("unet", "text_encoder"):
        leaves = zip(jax.tree.leaves(whole.params[part]), jax.tree.leaves(micro_base.params[part]), strict=True)
        assert all(np.abs(a - b).max() > 0 for a, b in leaves)


def test_masking_the_update_of_the_whole_table_gives_the_same_bits(everything, table):
    """Rows beside the table, and a table in which the update of the other rows is masked: AdamW, same gradient."""
    import optax

    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16)), jnp.float32)
    whole = jnp.concatenate([table, rows])
    ids = jnp.asarray([[1, len(table), 5, len(table) + 2, len(table) + 1, 2]])
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 16)), jnp.float32)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)
    chosen = jnp.arange(len(whole))[:, None] >= len(table)

    @jax.jit
    def masked(table, moments):
        gradient = jax.grad(lambda table: jnp.sum(jnp.square(table[ids] * weights)))(table)
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(gradient, moments, table)
        return table + jnp.where(chosen, updates, 0.0), moments

    @jax.jit
    def beside(rows, moments):
        def loss(rows):
            vectors = jnp.where(
                (ids >= len(table))[..., None], rows[jnp.maximum(ids - len(table), 0)], table[ids % len(table)]
            )
            return jnp.sum(jnp.square(vectors * weights))

        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimizer.update(jax.grad(loss)(rows), moments, rows)
        return rows + updates, moments

    full, separate = (whole, optimizer.init(whole)), (rows, optimizer.init(rows))
    for _ in range(5):
        full, separate = masked(*full), beside(*separate)
    np.testing.assert_array_equal(full[0][len(table) :], separate[0])
    np.testing.assert_array_equal(full[0][: len(table)], table)
    assert plan_run(everything).stages[0].recipe.rows == (0, 1, 2)
