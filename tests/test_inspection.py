"""The command `inspect`: every kind of file is named, with what is in it, without a model."""

import json
import re

import jax
import micro
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdjax import __main__, inspection, lora
from sdjax.formats.embedding_file import save_embedding
from sdjax.formats.lora_file import save_lora
from sdjax.model import Model
from sdjax.trees import layers

quick = pytest.fixture(scope="module", autouse=True)(micro.quick_compilation)


@pytest.fixture(scope="module")
def model(micro_models):
    return Model.load(micro_models())


@pytest.fixture(scope="module")
def sdxl(micro_models):
    return Model.load(micro_models(sdxl=True))


def inspect(capsys, file, *flags):
    capsys.readouterr()
    assert __main__.main(["inspect", str(file), *flags]) == 0
    return capsys.readouterr().out


def described(capsys, file):
    return json.loads(inspect(capsys, file, "--json"))


def random_adapter(model, **options):
    adapter = {"unet": lora.init(jax.random.key(0), model.params["unet"], **options)}
    return jax.tree.map(lambda leaf: leaf + np.float32(0.1) * (leaf.ndim == 2), adapter)


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_a_lora_with_words(model, tmp_path, capsys, style):
    adapter = random_adapter(model, rank=2, alpha=1.0)
    words = {"<a>": {"text_encoder": np.full((3, 16), 0.5, np.float32)}} if style == "kohya" else None
    file = tmp_path / "a.safetensors"
    metadata = {"ss_output_name": "dog", "ss_long": "x" * 500}
    save_lora(file, adapter, model.params, style=style, embeddings=words, metadata=metadata)
    found = described(capsys, file)
    count = len(list(layers(adapter, "down")))
    # PEFT's style keeps the strength in the values: its alpha is the rank.
    assert (found["kind"], found["form"], found["kinds"]) == ("LoRA", style, {"LoRA": count})
    assert (found["ranks"], found["alphas"]) == ({"2": count}, {"1.0" if style == "kohya" else "2.0": count})
    assert sum(found["targets"]["unet"].values()) == count and found["targets"]["unet"]["attn1_to_q"] >= 1
    assert found["metadata"]["ss_output_name"] == "dog"
    norms = sorted(np.linalg.norm(lora.delta(layer)) for _, layer in layers(adapter, "down"))
    np.testing.assert_allclose(sorted(row["norm"] for row in found["layers"]), norms, rtol=1e-5)
    table = inspect(capsys, file)
    assert re.search(rf"^rank +2 \({count}\)$", table, re.MULTILINE) and "dog" in table and "x" * 101 not in table
    assert table.count("\n") < 30 and inspect(capsys, file, "--layers").count(" norm ") == count
    if words:
        assert found["words"] == {
            "<a>": {"vectors": 3, "widths": {"text_encoder": 16}, "norms": {"text_encoder": [2.0] * 3}}
        }
        assert "<a>: 3 vectors, width text_encoder 16" in table


def test_kinds_of_adapters_and_their_norms(tmp_path, capsys):
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    loha = {f"{block}k.hada_w{i}_a": draw(8, 2) for i in "12"} | {f"{block}k.hada_w{i}_b": draw(2, 768) for i in "12"}
    lokr = {f"{block}q.lokr_w1": draw(2, 2), f"{block}q.lokr_w2_a": draw(4, 3), f"{block}q.lokr_w2_b": draw(3, 6)}
    full = {f"{block}v.diff": draw(8, 768), "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": draw(8)}
    dora = {f"{block}out_0.lora_down.weight": draw(2, 8), f"{block}out_0.lora_up.weight": draw(8, 2)}
    dora[f"{block}out_0.dora_scale"] = np.ones((8, 1), np.float32)
    alpha = {f"{block}k.alpha": np.array(1, np.float32)}
    save_file(loha | lokr | full | dora | alpha, tmp_path / "a.safetensors")
    found = described(capsys, tmp_path / "a.safetensors")
    assert found["family"] == "Stable Diffusion 1"
    assert found["kinds"] == {"LoHa": 1, "LoKr": 1, "full difference": 2, "DoRA": 1}
    norms = {row["layer"][-2:]: row["norm"] for row in found["layers"]}
    a, b, c, d = (loha[f"{block}k.hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    np.testing.assert_allclose(norms["_k"], 0.5 * np.linalg.norm((a @ b) * (c @ d)), rtol=1e-5)
    kron = np.kron(lokr[f"{block}q.lokr_w1"], lokr[f"{block}q.lokr_w2_a"] @ lokr[f"{block}q.lokr_w2_b"])
    np.testing.assert_allclose(norms["_q"], np.linalg.norm(kron), rtol=1e-5)
    np.testing.assert_allclose(norms["_v"], np.linalg.norm(full[f"{block}v.diff"]), rtol=1e-5)


def test_models(model, sdxl, tmp_path, capsys):
    model.save(tmp_path / "m.safetensors", dtype="float16", metadata={"modelspec.title": "Mine"})
    file = described(capsys, tmp_path / "m.safetensors")
    folder = described(capsys, model.outline.folder.path)
    for found, form in ((file, "single file"), (folder, "folder")):
        assert (found["kind"], found["form"], found["inpainting"]) == ("model", form, False)
        count = sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"]))
        assert found["parts"]["unet"]["parameters"] == count and "vae" in found["parts"]
    assert file["metadata"]["modelspec.title"] == "Mine" and file["dtypes"].keys() == {"float16"}
    assert "million parameters" in inspect(capsys, tmp_path / "m.safetensors")
    assert described(capsys, sdxl.outline.folder.path)["parts"].keys() == sdxl.params.keys()


def test_embeddings(tmp_path, capsys):
    save_embedding(tmp_path / "a.safetensors", "<a>", {"text_encoder": np.ones((2, 768), np.float32)})
    found = described(capsys, tmp_path / "a.safetensors")
    assert (found["kind"], found["family"], list(found["words"])) == ("embedding", "Stable Diffusion 1", ["<a>"])
    both = {"text_encoder": np.ones((2, 768), np.float32), "text_encoder_2": np.ones((2, 1280), np.float32)}
    save_embedding(tmp_path / "b.safetensors", "<b>", both)
    assert described(capsys, tmp_path / "b.safetensors")["family"] == "SDXL"
    assert "<b>: 2 vectors, width text_encoder 768, text_encoder_2 1280" in inspect(capsys, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"control_model.input_blocks.0.0.weight": (2, 2, 1, 1)}, "a ControlNet; sdjax reads"),
        ({"model.diffusion_model.double_blocks.0.weight": (2, 2)}, "Flux"),
        ({"lora_unet_conv_in.alpha": (2,)}, "alpha has shape"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, capsys, tensors, fault):
    file = tmp_path / "a.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, file)
    assert inspection.main([str(file)]) == 3
    err = capsys.readouterr().err
    assert fault in err and err.count("\n") == 1
    file.write_bytes(file.read_bytes()[:-4])
    assert inspection.main([str(file)]) == 3 and "truncated" in capsys.readouterr().err
    assert inspection.main([str(tmp_path / "none.safetensors")]) == 3 and "no such file" in capsys.readouterr().err
