"""The command `convert`: nothing is lost there and back, and mistakes are reported before anything is read."""

import json

import jax
import micro
import numpy as np
import pytest

from sdjax import __main__, convert, lora, trees
from sdjax.formats.embedding_file import load_embedding, save_embedding
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.formats.safetensors_file import read_safetensors
from sdjax.model import Model

SHALLOW = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
quick = pytest.fixture(scope="module", autouse=True)(micro.quick_compilation)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "UNET", {**micro.UNET, **SHALLOW})
        return Model.load(micro.make_model(tmp_path_factory.mktemp("model") / "model"))


def run(*words):
    return convert.main([str(word) for word in words])


def deltas(adapter):
    """Path of each layer -> the change of its kernel."""
    return {path: lora.delta(layer) for path, layer in trees.layers(adapter, "up")}


def same(one, two, **tolerance):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 0})), one, two)


def test_a_folder_to_a_file_and_back(model, tmp_path, capsys):
    file, folder = tmp_path / "new" / "m.safetensors", tmp_path / "folder"
    assert __main__.main(["convert", str(model.outline.folder.path), str(file), "--to", "single_file"]) == 0
    assert run(file, folder, "--to", "diffusers", "--tokenizer", model.outline.folder.path) == 0
    assert capsys.readouterr().out.splitlines() == [str(file), str(folder)]
    for target, form in ((file, "single_file"), (folder, "diffusers")):
        assert run(model.outline.folder.path, target, "--to", form) == 2
        assert f"{target}: exists already; --overwrite replaces it" in capsys.readouterr().err
    assert run(model.outline.folder.path, folder, "--to", "diffusers", "--overwrite") == 0
    same(Model.load(folder).params, model.params)
    half = tmp_path / "half.safetensors"
    assert run(folder, half, "--to", "single_file", "--dtype", "float16", "--prediction-type", "v_prediction") == 0
    # Without --dtype a model keeps the dtype of its weights.
    assert run(half, tmp_path / "again.safetensors", "--to", "single_file", "--tokenizer", folder) == 0
    one, two = read_safetensors(half), read_safetensors(tmp_path / "again.safetensors")
    assert one.metadata == two.metadata and one.metadata["modelspec.prediction_type"] == "v"
    assert {str(tensor.dtype) for tensor in two.tensors.values()} == {"float16"}
    same(dict(one.tensors), dict(two.tensors))


def test_a_standard_model_is_widened_for_inpainting(model, tmp_path, capsys):
    folder, file = tmp_path / "nine", tmp_path / "nine.safetensors"
    for target in (folder, file):
        form = "single_file" if target.suffix else "diffusers"
        assert run(model.outline.folder.path, target, "--to", form, "--for-inpainting") == 0
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    wide = Model.load(folder)
    same(Model.load(file, tokenizer=folder).params, wide.params)
    assert wide.outline.unet.config.in_channels == 9
    latents, context = np.ones((1, 8, 8, 9), np.float32), np.ones((1, 8, 16), np.float32)
    same(wide.predict(latents, 500, context), model.predict(latents[..., :4], 500, context), atol=1e-5)
    assert run(folder, tmp_path / "again", "--to", "diffusers", "--for-inpainting") == 2
    assert "is made for inpainting already" in capsys.readouterr().err


def test_a_lora_to_either_style_and_back(model, tmp_path):
    adapter = {"unet": lora.init(jax.random.key(0), model.params["unet"], rank=2, alpha=1.0)}
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1) * (np.ndim(leaf) > 0), adapter)
    save_lora(tmp_path / "a.safetensors", adapter, model.params)
    for style, source, target in (("peft", "a", "b"), ("kohya", "b", "c")):
        source, target = tmp_path / f"{source}.safetensors", tmp_path / f"{target}.safetensors"
        assert run(source, target, "--to", style, "--model", model.outline.folder.path) == 0
        got = load_lora(target, model.params)["unet"]
        same(deltas(got), deltas(adapter["unet"]), atol=1e-5)
    assert any(key.endswith("lora_A.weight") for key in read_safetensors(tmp_path / "b.safetensors").tensors)


def test_a_lora_is_taken_out_of_a_tuned_model(model, tmp_path, capsys):
    adapter = lora.init(jax.random.key(0), model.params["unet"], rank=2)
    adapter = jax.tree.map(lambda leaf: leaf + np.float32(0.1) * (leaf.ndim > 0), adapter)
    model.with_lora({"unet": adapter}).save(tmp_path / "tuned")
    flags = ("--to", "kohya", "--base", model.outline.folder.path)
    assert run(tmp_path / "tuned", tmp_path / "a.safetensors", *flags, "--rank", 2, "--dtype", "float32") == 0
    read = load_lora(tmp_path / "a.safetensors", model.params)
    assert list(read) == ["unet"]
    same(deltas(read["unet"]), deltas(adapter), atol=1e-4)
    assert run(model.outline.folder.path, tmp_path / "b.safetensors", *flags) == 3
    assert "are the same" in capsys.readouterr().err
    assert run("tiny", tmp_path / "b.safetensors", *flags) == 3
    assert "different kinds" in capsys.readouterr().err


def test_embeddings(model, tmp_path, capsys):
    words = {
        word: {"text_encoder": np.full((2, 16), i, np.float32)} for i, word in enumerate(("<a>", "b", "c/d", "c*d"))
    }
    adapter = {"unet": lora.init(jax.random.key(0), model.params["unet"], rank=2)}
    bundled = {word: words[word] for word in ("<a>", "b")}
    save_lora(tmp_path / "lora.safetensors", adapter, model.params, embeddings=bundled)
    assert run(tmp_path / "lora.safetensors", tmp_path / "words", "--to", "embedding") == 0
    assert sorted(path.name for path in (tmp_path / "words").iterdir()) == ["a.safetensors", "b.safetensors"]
    for name, word in (("a", "<a>"), ("b", "b")):
        read = load_embedding(tmp_path / "words" / f"{name}.safetensors")
        assert list(read) == [word]
        same(read[word], bundled[word])
    source, target = tmp_path / "words" / "a.safetensors", tmp_path / "x.safetensors"
    assert run(source, target, "--to", "embedding", "--token", "<x>", "--dtype", "float16") == 0
    assert list(load_embedding(target)) == ["<x>"] and read_safetensors(target).tensors["<x>"].dtype == np.float16
    both = {"text_encoder": np.ones((1, 768), np.float32), "text_encoder_2": np.ones((1, 1280), np.float32)}
    save_embedding(tmp_path / "xl.safetensors", "<y>", both)
    assert run(tmp_path / "xl.safetensors", target, "--to", "embedding", "--overwrite") == 0
    assert load_embedding(target)["<y>"].keys() == both.keys()
    capsys.readouterr()
    for flags, fault in (((target,), "write them to a folder"), ((tmp_path / "y", "--token", "<z>"), "names one word")):
        assert run(tmp_path / "lora.safetensors", *flags, "--to", "embedding") == 2
        assert fault in capsys.readouterr().err
    save_lora(tmp_path / "lora.safetensors", adapter, model.params, embeddings={"a:b": words["b"], "a?b": words["b"]})
    assert run(tmp_path / "lora.safetensors", tmp_path / "y", "--to", "embedding") == 2
    assert "would share a file name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ((), "required"),
        (("a", "b"), "--to"),
        (("a", "b", "--to", "ckpt"), "--to ckpt: choices are diffusers, single_file, kohya, peft, embedding"),
        (("a", "b", "--to", "diffusers", "--dtype", "int8"), "--dtype int8: choices are"),
        (("a", "b.ckpt", "--to", "single_file"), "ends in .safetensors"),
        (("a", "b.safetensors", "--to", "diffusers"), "writes a folder"),
        (("a", "b.safetensors", "--to", "kohya"), "needs either --model"),
        (("a", "b.safetensors", "--to", "kohya", "--model", "m", "--base", "m"), "needs either --model"),
        (("a", "b.safetensors", "--to", "peft", "--model", "m", "--rank", "4"), "go with --base"),
        (("a", "b.safetensors", "--to", "peft", "--base", "m", "--rank", "0"), "--rank 0"),
        (("a", "b.safetensors", "--to", "peft", "--base", "m", "--targets", "x"), "--targets x: choices are"),
        (("a", "b", "--to", "diffusers", "--token", "x"), "--token has no meaning for --to diffusers"),
        (("a", "b", "--to", "embedding", "--model", "x"), "--model has no meaning"),
        (("a", "b", "--to", "embedding", "--for-inpainting"), "--for-inpainting has no meaning"),
        (("a", "b", "--to", "diffusers", "--x"), "`sdjax convert --help`"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(words, fault, capsys):
    assert convert.main(words) == 2
    out, err = capsys.readouterr()
    assert fault in err and not out and "Traceback" not in err and err.count("\n") == 1


def test_faults_of_files_have_their_exit_code(model, tmp_path, capsys):
    file = tmp_path / "blocked"
    file.write_text("")
    for words in (
        (tmp_path / "none.safetensors", tmp_path / "a", "--to", "embedding"),
        (tmp_path / "none.safetensors", tmp_path / "a", "--to", "diffusers"),
        (model.outline.folder.path, file / "x" / "a.safetensors", "--to", "single_file"),
        (model.outline.folder.path, file, "--to", "diffusers", "--overwrite"),
    ):
        assert run(*words) == 3
        assert capsys.readouterr().err.startswith("error: ")
    assert file.read_text() == ""


def test_help_names_the_forms(capsys):
    with pytest.raises(SystemExit) as caught:
        convert.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(form in out for form in convert.FORMS)
