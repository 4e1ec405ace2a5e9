"""The command `convert`: nothing is lost there and back, and mistakes are reported before anything is read."""

import json

import jax
import micro
import numpy as np
import pytest

from sdjax import __main__, convert, lora, trees
from sdjax.formats.embedding_file import load_embedding, save_embedding
from sdjax.formats.lora_file import load_lora, read_lora, save_lora
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
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


def random_lora(model, seed, **options):
    """A LoRA of U-Net and text model, none of whose arrays is 0."""
    parts = {
        part: lora.init(jax.random.key(seed), model.params[part], rank=2, **options)
        for part in ("unet", "text_encoder")
    }
    generator = np.random.default_rng(seed)
    noise = lambda leaf: leaf + 0.1 * generator.normal(size=leaf.shape).astype(np.float32) * (leaf.ndim > 0)
    return jax.tree.map(lambda leaf: noise(np.asarray(leaf)), parts)


def loha_file(path):
    """A LoHa of one layer of the U-Net."""
    generator = np.random.default_rng(5)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.hada_w{i}_{side}": generator.normal(size=(16, 2) if side == "a" else (2, 16))
        for i in "12"
        for side in "ab"
    }
    save_safetensors(path, {key: tensor.astype(np.float32) for key, tensor in tensors.items()})
    return path


def test_loras_of_several_kinds_are_merged_into_a_model(model, tmp_path):
    """A LoRA with a bundled word, a DoRA and a LoHa, each with its weight, to a folder and to a file."""
    words = {"<a>": {"text_encoder": np.ones((2, 16), np.float32)}}
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_lora(one, random_lora(model, 1), model.params, embeddings=words)
    save_lora(two, {"unet": random_lora(model, 2, dora=True)["unet"]}, model.params)
    three = loha_file(tmp_path / "three.safetensors")
    merging = ("--lora", f"{one}:0.5", "--lora", f"{two}:-1", "--lora", three)
    source = tmp_path / "titled.safetensors"
    model.save(source, metadata={"modelspec.title": "Mine", "modelspec.hash_sha256": "of the old file"})
    tokenizer = ("--tokenizer", model.outline.folder.path)
    assert run(source, tmp_path / "folder", "--to", "diffusers", *merging, *tokenizer) == 0
    assert run(source, tmp_path / "new" / "file.safetensors", "--to", "single_file", *merging, *tokenizer) == 0
    expected = model.with_lora(one, 0.5).with_lora(two, -1.0).with_lora(three)
    file = Model.load(tmp_path / "new" / "file.safetensors", tokenizer=model.outline.folder.path)
    same(file.params, expected.params, atol=1e-6)
    folder = Model.load(tmp_path / "folder")
    for part in ("unet", "vae"):
        same(folder.params[part], expected.params[part], atol=1e-6)
    # The word is in the folder's tokenizer and table, and in a file beside the single file, which has no tokenizer.
    table = folder.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(table[-2:], np.ones((2, 16)))
    same(load_embedding(tmp_path / "new" / "a.safetensors"), words)
    metadata = read_safetensors(tmp_path / "new" / "file.safetensors").metadata
    assert metadata["modelspec.title"] == "Mine" and "modelspec.hash_sha256" not in metadata
    assert (
        metadata["modelspec.merged_from"]
        == "titled.safetensors, one.safetensors:0.5, two.safetensors:-1, three.safetensors:1"
    )
    # The metadata survives the way through a folder too.
    assert run(source, tmp_path / "plain", "--to", "diffusers", *tokenizer) == 0
    assert run(tmp_path / "plain", tmp_path / "again.safetensors", "--to", "single_file", "--overwrite") == 0
    assert read_safetensors(tmp_path / "again.safetensors").metadata["modelspec.title"] == "Mine"


def test_loras_are_added_and_resized(model, tmp_path, capsys):
    flags = ("--model", model.outline.folder.path)
    trees = [random_lora(model, seed) for seed in (1, 2)]
    words = {"<a>": {"text_encoder": np.ones((2, 16), np.float32)}}
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    metadata = {"ss_output_name": "one", "ss_tag_frequency": "{}", "modelspec.author": "me"}
    save_lora(files[0], trees[0], model.params, embeddings=words, metadata=metadata)
    save_lora(files[1], trees[1], model.params, style="peft")
    added = tmp_path / "added.safetensors"
    assert run(f"{files[0]}:0.5", added, "--to", "kohya", *flags, "--lora", f"{files[1]}:2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(added)] and not err
    read = read_lora(added, model.params)
    sums = {
        path: 0.5 * lora.delta(layer) + 2 * lora.delta(dict(trees_layers(trees[1]))[path])
        for path, layer in trees_layers(trees[0])
    }
    for path, layer in trees_layers(read.adapters):
        np.testing.assert_allclose(lora.delta(layer), sums[path], atol=1e-5)
    assert read.words == ["<a>"] and read.metadata.items() >= metadata.items()
    assert read.metadata["ss_network_dim"] == "4"
    assert read.metadata["modelspec.merged_from"] == "one.safetensors, two.safetensors:2"
    # Resized to half the rank and in PEFT's style: the nearest, with the error told, and the word in a file beside.
    small = tmp_path / "small" / "s.safetensors"
    assert run(added, small, "--to", "peft", *flags, "--rank", "2") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(small), str(tmp_path / "small" / "a.safetensors")]
    same(load_embedding(tmp_path / "small" / "a.safetensors"), words)
    lost = whole = 0.0
    for path, layer in trees_layers(load_lora(small, model.params)):
        change = np.asarray(sums[path], np.float64).reshape(-1, sums[path].shape[-1])
        s = np.linalg.svd(change, compute_uv=False)
        missing = np.linalg.norm(change - np.asarray(lora.delta(layer)).reshape(change.shape))
        np.testing.assert_allclose(missing, np.linalg.norm(s[2:]), rtol=1e-3, atol=1e-5)
        lost, whole = lost + np.square(s[2:]).sum(), whole + np.square(s).sum()
    assert f"relative error {np.sqrt(lost / whole):.2g} of the change" in err
    assert read_safetensors(small).metadata["ss_output_name"] == "one"
    # And the word goes back into one file.
    assert run(small, added, "--to", "kohya", *flags, "--embedding", tmp_path / "small" / "a.safetensors") == 2
    assert "exists already" in capsys.readouterr().err
    back = tmp_path / "back.safetensors"
    assert run(small, back, "--to", "kohya", *flags, "--embedding", tmp_path / "small" / "a.safetensors") == 0
    assert read_lora(back, model.params).words == ["<a>"]
    assert read_safetensors(back).metadata["ss_tag_frequency"] == "{}"


def trees_layers(adapters):
    return trees.layers(adapters, "down")


def test_other_kinds_become_a_plain_lora(model, tmp_path, capsys):
    """At full rank nothing is lost but rounding; without a rank they are refused."""
    flags = ("--to", "kohya", "--model", model.outline.folder.path)
    file = loha_file(tmp_path / "loha.safetensors")
    assert run(file, tmp_path / "plain.safetensors", "--to", "peft", *flags[2:]) == 3
    assert "PEFT's naming holds LoRA and DoRA alone" in capsys.readouterr().err
    assert run(file, tmp_path / "same.safetensors", *flags) == 0  # kohya's naming holds it
    same(load_lora(tmp_path / "same.safetensors", model.params), load_lora(file, model.params), rtol=1e-6)
    assert run(file, tmp_path / "plain.safetensors", *flags, "--lora", f"{file}:1") == 2
    assert "LoHa is no plain LoRA: give --rank, --ratio or --energy" in capsys.readouterr().err
    assert run(file, tmp_path / "plain.safetensors", *flags, "--energy", "1") == 0
    same(model.with_lora(tmp_path / "plain.safetensors").params, model.with_lora(file).params, atol=1e-5)
    dora = tmp_path / "dora.safetensors"
    save_lora(dora, {"unet": random_lora(model, 2, dora=True)["unet"]}, model.params)
    assert run(dora, tmp_path / "plain.safetensors", *flags, "--rank", 64, "--overwrite") == 0
    same(model.with_lora(tmp_path / "plain.safetensors").params, model.with_lora(dora).params, atol=1e-5)


def test_a_lora_for_another_model_or_half_a_file_changes_nothing(model, tmp_path, capsys):
    wrong, half = tmp_path / "wrong.safetensors", tmp_path / "half.safetensors"
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_safetensors(wrong, {f"{block}.lora_down.weight": np.ones((2, 768), np.float32)})
    save_lora(half, random_lora(model, 1), model.params)
    half.write_bytes(half.read_bytes()[:-100])
    target = tmp_path / "out.safetensors"
    target.write_text("mine")
    for file, fault in (
        (wrong, "made for Stable Diffusion 1"),
        (half, "truncated"),
        (tmp_path / "none", "no such file"),
    ):
        flags = ("--to", "single_file", "--lora", file, "--overwrite")
        assert run(model.outline.folder.path, target, *flags) == 3
        assert fault in capsys.readouterr().err
    assert target.read_text() == "mine"


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
        (
            ("a", "b.safetensors", "--to", "peft", "--model", "m", "--targets", "attention"),
            "--targets goes with --base",
        ),
        (("a", "b.safetensors", "--to", "peft", "--base", "m", "--lora", "x"), "--lora goes with --model"),
        (("a", "b.safetensors", "--to", "peft", "--base", "m", "--ratio", "0.5"), "--ratio 0.5: must be 1 or more"),
        (
            ("a", "b.safetensors", "--to", "peft", "--base", "m", "--energy", "2"),
            "--energy 2.0: must be 1e-06 or more, and",
        ),
        (("a", "b.safetensors", "--to", "peft", "--base", "m", "--targets", "conv"), "--targets conv: choices are"),
        (("a", "b", "--to", "embedding", "--lora", "x"), "--lora has no meaning"),
        (("a", "b.safetensors", "--to", "single_file", "--embedding", "x"), "--embedding has no meaning"),
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
