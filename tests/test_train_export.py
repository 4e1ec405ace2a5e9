"""The files that a stage exports: what they hold, and that they draw what the run drew."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import micro
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

import sdjax
from sdjax import lora, trees
from sdjax.formats.embedding_file import save_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.train import export
from sdjax.train.loop import train
from sdjax.train.results import Results

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_export_is_the_trained_adapter_in_both_namings(finished, micro_base):
    folder = finished[0] / "export" / "style"
    kohya, peft = (
        load_lora(folder / name, micro_base.params) for name in ("lora.safetensors", "pytorch_lora_weights.safetensors")
    )
    merged = lambda adapters: {part: lora.merge(micro_base.params[part], tree) for part, tree in adapters.items()}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), merged(kohya), merged(peft))
    assert all(np.abs(layer["up"]).max() > 0 for _, layer in trees.layers(kohya, "down"))
    assert "style" in (folder / "README.md").read_text()
    assert (folder / "samples.png").exists()


def test_every_export_holds_the_results_so_far(everything):
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
        files = {path.name for path in (Path(everything.output) / "export" / stage).iterdir()}
        assert files == {*names, "README.md", "samples.png"}, stage


def test_the_exports_draw_what_the_run_drew(everything, micro_base):
    """The last validation picture of the joint stage, drawn from its files alone."""
    folder = Path(everything.output) / "export" / "both"
    sd = micro_base.with_lora(folder / "lora.safetensors")
    for word in ("plana", "sky", "new"):
        sd = sd.with_embedding(folder / f"{word}.safetensors")
    picture = sd.text2image("a <plana> and <sky>", steps=1, guidance=7.5, height=16, width=16, progress=False)[0]
    grid = np.asarray(Image.open(Path(everything.output) / "samples" / "both-2.png").convert("RGB"))
    drawn = grid[6 : 6 + 192, 6 : 6 + 192][6::12, 6::12].astype(int)  # the middle of each enlarged pixel
    assert np.abs(drawn - np.asarray(picture, int)).max() <= 2


def test_pictures_of_several_shapes(micro_models, tmp_path):
    """A LoRA and an autoencoder trained in buckets: the files list the shapes; all shapes normalise the latents."""
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(16, 16)] * 3 + [(32, 8)] * 2 + [(8, 32)]):
        Image.new("RGB", size, (40 * i, 255 - 40 * i, 100)).save(images / f"{i}.png")
    data = {"path": str(images), "caption": "a thing", "resolution": 16, "batch_size": 2, "buckets": True}
    both = [{"name": "style", "train": ["lora"]}, {"name": "autoencoder", "train": ["vae"], "vae_normalise": True}]
    run = micro.settings(
        micro_models(),
        images,
        tmp_path / "run",
        stages=[{"steps": 4, **stage} for stage in both],
        data={**data, "bucket_step": 8, "bucket_max_aspect": 4.0},
        validation={},
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


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_card_loads_words_in_diffusers(tmp_path, monkeypatch, kind):
    """The code of the card, run as it stands: afterwards diffusers' text models hold the vectors of the word."""
    import pictures
    import safetensors
    import safetensors.torch

    pipeline = pictures.build(kind)
    models = [name for name in ("text_encoder", "text_encoder_2") if getattr(pipeline, name, None) is not None]
    rows = {
        name: np.random.default_rng(i).normal(size=(2, getattr(pipeline, name).config.hidden_size)).astype(np.float32)
        for i, name in enumerate(models)
    }
    save_embedding(tmp_path / "plana.safetensors", "<plana>", rows)
    monkeypatch.chdir(tmp_path)
    code = re.findall("`([^`]+)`", "\n".join(export.use_in_diffusers("<plana>", "plana.safetensors", models)))
    assert len(code) == (1 if kind == "sd1" else 3)
    names = {"pipeline": pipeline, "safetensors": safetensors, "FOLDER": str(tmp_path)}
    for line in code:
        exec(line, names)
    for name, tokenizer in zip(models, ("tokenizer", "tokenizer_2"), strict=False):
        ids = getattr(pipeline, tokenizer).convert_tokens_to_ids(["<plana>", "<plana>_1"])
        table = getattr(pipeline, name).get_input_embeddings().weight.detach().numpy()
        np.testing.assert_array_equal(table[ids], rows[name])


def test_the_card_of_a_dora_says_who_reads_it(tmp_path, micro_base, settings):
    """A1111, ComfyUI and kohya's scripts are sent to the merged model, not to the file."""
    adapter = {"unet": lora.init(jax.random.key(0), micro_base.params["unet"], rank=2, dora=True)}
    plan = SimpleNamespace(stage=SimpleNamespace(name="style"), words={})
    config = settings()
    for tree, dora in (
        (adapter, True),
        (lora.map_layers(lambda a: {k: a[k] for k in ("down", "up", "scale")}, adapter), False),
    ):
        text = "\n".join(export._use(config, plan, Results(tree, {}, {}), "x"))
        assert ("sdjax convert" in text and "merge it into the model" in text) == dora
        assert ("models/Lora/style.safetensors" in text) == (not dora)
        assert "load_lora_weights" in text
