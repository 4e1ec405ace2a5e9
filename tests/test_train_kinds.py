"""Every kind of fine-tuning in one run of stages: what each leaves behind, and that an interruption changes no bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import sdjax
from sdjax import textual_inversion, trees
from sdjax.errors import ConfigError
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.train.loop import train
from sdjax.train.stages import plan_run

WORDS = {"train": ["textual_inversion"], "placeholder_tokens": ["<plana>", "<sky>"], "vectors_per_token": [2, 1]}
STAGES = [
    {"name": "words", **WORDS, "init_tokens": ["red circle", "<rand-0.1>"], "weight_decay": 0.1, "clip_ti_decay": True},
    {"name": "style", "train": ["lora"], "lora_targets": "attention+ff", "ema_decay": 0.9},
    {
        "name": "both",
        "train": ["lora", "textual_inversion"],
        "lora_continue": True,
        "lora_parts": ["unet", "text_encoder"],
        "placeholder_tokens": ["<sky>", "<new>"],
        "template": "object",
        "learning_rate": {"unet": 1e-3, "text_encoder": 1e-3, "textual_inversion": 1e-2},
    },
    {"name": "autoencoder", "train": ["vae"], "vae_normalise": True, "vae_augment": True, "data": {"flip": True}},
    {"name": "whole", "train": ["unet", "text_encoder"], "ema_decay": 0.9, "noise_offset": 0.1, "loss": "huber"},
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    yield from micro.quick_compilation()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    stages = [{"steps": 2, "learning_rate": 1e-2, **stage} for stage in STAGES]
    return micro.settings(
        micro.make_model(folder / "model"),
        micro.make_images(folder / "images"),
        folder / "run",
        stages=stages,
        validation={"prompts": ["a <plana> and <sky>"], "steps": 1},
        checkpoint={"every": 1, "keep": 100},
    )


@pytest.fixture(scope="module")
def finished(config):
    assert train(config) == 0
    return Path(config.output)


@pytest.fixture(scope="module")
def base(config):
    return sdjax.load(config.model)


def exported(finished, stage):
    return finished / "export" / stage


def words_of(folder, base):
    width = {"text_encoder": base.model.outline.text_models["text_encoder"].config.hidden_size}
    found = [load_embedding(path, width) for path in folder.glob("*.safetensors") if "lora" not in path.name]
    return {word: rows["text_encoder"] for file in found for word, rows in file.items()}


def test_every_export_holds_what_there_is_so_far(finished):
    words = ["plana.safetensors", "sky.safetensors"]
    adapters = ["lora.safetensors", "pytorch_lora_weights.safetensors"]
    expected = {
        "words": words,
        "style": words + adapters,
        "both": [*words, *adapters, "new.safetensors"],
        "autoencoder": [*words, *adapters, "new.safetensors", "model"],
        "whole": [*words, "new.safetensors", "model"],  # the adapter was merged into the weights that were trained
    }
    for stage, names in expected.items():
        found = {path.name for path in exported(finished, stage).iterdir()}
        assert found == {*names, "README.md", "samples.png"}, stage


def test_only_the_trained_words_move(finished, base):
    words, style, both = (words_of(exported(finished, stage), base) for stage in ("words", "style", "both"))
    start = np.asarray(base.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"])
    red, circle = (start[number] for number in base.model.outline.tokenizers["tokenizer"].words("red circle"))
    assert words["<plana>"].shape == (2, 16) and words["<sky>"].shape == (1, 16)
    assert 0 < np.abs(words["<plana>"] - np.stack([red, circle])).max() < 3
    # clip_ti_decay with a rate of 0.01 draws the norm all the way.
    norm = textual_inversion.typical_norm(start)
    np.testing.assert_allclose(np.linalg.norm(words["<sky>"]), norm, rtol=1e-5)
    for word, rows in words.items():
        np.testing.assert_array_equal(style[word], rows)
    np.testing.assert_array_equal(both["<plana>"], words["<plana>"])
    assert np.abs(both["<sky>"] - words["<sky>"]).max() > 1e-3
    assert both["<new>"].shape == (1, 16)
    whole = sdjax.load(exported(finished, "words").parent / "whole" / "model")
    assert whole.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"].shape == start.shape


def test_an_adapter_is_trained_further_not_added_to(finished, base):
    style, both = (load_lora(exported(finished, s) / "lora.safetensors", base.params) for s in ("style", "both"))
    assert set(style) == {"unet"} and set(both) == {"unet", "text_encoder"}
    first, second = (dict(trees.layers(tree["unet"], "down")) for tree in (style, both))
    assert first.keys() == second.keys()
    moved = [np.abs(first[path]["up"] - second[path]["up"]).max() for path in first]
    assert all(first[path]["down"].shape == second[path]["down"].shape for path in first) and min(moved) > 0


def test_a_trained_autoencoder_is_used_by_what_follows(finished, base):
    after = sdjax.load(exported(finished, "autoencoder") / "model")
    for part in ("unet", "text_encoder"):
        jax.tree.map(np.testing.assert_array_equal, after.params[part], base.params[part])
    whole = sdjax.load(exported(finished, "whole") / "model")
    jax.tree.map(np.testing.assert_array_equal, whole.params["vae"], after.params["vae"])
    for part in ("unet", "text_encoder"):
        leaves = zip(jax.tree.leaves(whole.params[part]), jax.tree.leaves(base.params[part]), strict=True)
        assert all(np.abs(a - b).max() > 0 for a, b in leaves)


def test_the_exports_draw_what_the_run_drew(finished, base):
    """The last validation picture of the joint stage, from its files alone."""
    from PIL import Image

    folder = exported(finished, "both")
    sd = base.with_lora(folder / "lora.safetensors")
    for word in ("plana", "sky", "new"):
        sd = sd.with_embedding(folder / f"{word}.safetensors")
    picture = sd.text2image("a <plana> and <sky>", steps=1, guidance=7.5, height=16, width=16, progress=False)[0]
    grid = np.asarray(Image.open(finished / "samples" / "both-2.png").convert("RGB"))
    drawn = grid[6 : 6 + 192, 6 : 6 + 192][6::12, 6::12].astype(int)  # the middle of each enlarged pixel
    assert np.abs(drawn - np.asarray(picture, int)).max() <= 2


@pytest.mark.parametrize("step", [4, 7])
def test_resuming_anywhere_ends_with_the_same_bits(finished, config, tmp_path, step):
    """Step 4: between two stages; 7: within the autoencoder's, with another to come."""
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name.split("_")[1]) > step:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "export")
    again = dataclasses.replace(config, output=str(tmp_path / "run"))
    validation = dataclasses.replace(config.validation, prompts=())
    assert train(dataclasses.replace(again, validation=validation), resume=True) == 0
    for path in (finished / "export" / "whole").rglob("*.safetensors"):
        other = tmp_path / "run" / path.relative_to(finished)
        assert other.read_bytes() == path.read_bytes(), path.name


def test_masking_the_update_of_the_whole_table_gives_the_same_bits(finished, config, base):
    """The rows beside the table against a table whose other rows' update is masked: AdamW with decay, same gradient."""
    import optax

    plan = plan_run(config).stages[0]
    table = base.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
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

    full, own = (whole, optimizer.init(whole)), (rows, optimizer.init(rows))
    for _ in range(5):
        full, own = masked(*full), beside(*own)
    np.testing.assert_array_equal(full[0][len(table) :], own[0])
    np.testing.assert_array_equal(full[0][: len(table)], table)
    assert plan.recipe.rows == (0, 1, 2)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({**WORDS, "placeholder_tokens": ["heart"], "vectors_per_token": 1}, "'heart' is a word of the vocabulary"),
        ({**WORDS, "init_tokens": ["nothing.safetensors", "red"]}, "nothing.safetensors"),
        ({"train": ["text_encoder_2"]}, "no text_encoder_2"),
        ({"train": ["lora"], "lora_parts": ["text_encoder_2"]}, "no text_encoder_2"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(config, stage, message, monkeypatch):
    changed = dataclasses.replace(
        micro.settings(Path(config.model), Path(config.data.path), Path(config.output), stages=[stage])
    )
    monkeypatch.setattr("sdjax.loading.load_params", None)
    with pytest.raises(Exception, match=message) as error:
        plan_run(changed)
    assert isinstance(error.value, ConfigError) or error.value.exit_code == 3


def test_pictures_of_several_shapes(config, tmp_path):
    """A LoRA and an autoencoder trained in buckets: the files say the shapes, and latents are normalised over all."""
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(16, 16)] * 3 + [(32, 8)] * 2 + [(8, 32)]):
        Image.new("RGB", size, (40 * i, 255 - 40 * i, 100)).save(images / f"{i}.png")
    data = {"path": str(images), "caption": "a thing", "resolution": 16, "batch_size": 2, "buckets": True}
    both = [{"name": "style", "train": ["lora"]}, {"name": "autoencoder", "train": ["vae"], "vae_normalise": True}]
    run = micro.settings(
        Path(config.model),
        images,
        tmp_path / "run",
        stages=[{"steps": 4, **stage} for stage in both],
        data={**data, "bucket_step": 8, "bucket_max_aspect": 4.0},
        checkpoint={"every": 10},
    )
    assert train(run) == 0
    style, autoencoder = (tmp_path / "run" / "export" / name for name in ("style", "autoencoder"))
    assert "| images | 1 at 8 x 32, 3 at 16 x 16, 2 at 32 x 8 |" in (style / "README.md").read_text()
    with safe_open(style / "lora.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["ss_enable_bucket"] == "True"
    assert json.loads(metadata["ss_bucket_info"])["buckets"] == {
        "0": {"resolution": [8, 32], "count": 1},
        "1": {"resolution": [16, 16], "count": 3},
        "2": {"resolution": [32, 8], "count": 2},
    }
    trained = sdjax.load(autoencoder / "model")
    pixels = [[Image.open(images / f"{i}.png")] for i in range(6)]
    means = np.concatenate([np.asarray(trained.encode_image(picture)).reshape(-1, 4) for picture in pixels])
    np.testing.assert_allclose(means.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(means.std(axis=0), 1, rtol=1e-3)
