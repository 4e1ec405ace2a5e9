"""Reads the embedding files of diffusers, A1111, kohya, OneTrainer and cloneofsimo, and those of sdjax."""

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.errors import ConfigError, DataError
from sdjax.formats.embedding_file import bundle, clean_word, file_name, load_embedding, save_embedding
from sdjax.formats.lora_file import load_lora, save_lora

SD1 = {"text_encoder": 8}
SDXL = {"text_encoder": 8, "text_encoder_2": 12}
RNG = np.random.default_rng(0)


def rows(vectors=2, width=8):
    return RNG.normal(size=(vectors, width)).astype(np.float32)


def write(path, content):
    """Writes a file as other programs do, with torch.save or the library safetensors."""
    if path.suffix == ".safetensors":
        tensors, metadata = content if isinstance(content, tuple) else (content, None)
        safetensors.numpy.save_file(tensors, path, metadata)
    else:
        import torch

        as_torch = lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        torch.save({key: as_torch(value) for key, value in content.items()}, path)
    return path


def check(got, wanted):
    assert {word: set(models) for word, models in got.items()} == {word: set(models) for word, models in wanted.items()}
    for word, models in wanted.items():
        for model, expected in models.items():
            assert got[word][model].dtype == np.float32
            np.testing.assert_array_equal(got[word][model], np.atleast_2d(expected))


# For tests whose pickles PyTorch writes.
PICKLE = pytest.mark.parity


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".bin", marks=PICKLE)])
@pytest.mark.parametrize("shape", [(3, 8), (1, 8), (8,)])
def test_diffusers(tmp_path, suffix, shape):
    value = RNG.normal(size=shape).astype(np.float32)
    path = write(tmp_path / f"learned_embeds{suffix}", {"<plana>": value})
    check(load_embedding(path, SD1), {"<plana>": {"text_encoder": value}})


@PICKLE
@pytest.mark.parametrize("wrap", ["plain", "module", "parameters"])
def test_a1111(tmp_path, wrap):
    import torch

    value = rows()
    tensor = torch.from_numpy(value)
    table = {
        "plain": {"*": tensor},
        "module": torch.nn.ParameterDict({"*": torch.nn.Parameter(tensor)}),
        "parameters": {"_parameters": {"*": torch.nn.Parameter(tensor)}},
    }[wrap]
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": table,
        "name": "my style",
        "step": 99,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    torch.save(content, tmp_path / "file.pt")
    check(load_embedding(tmp_path / "file.pt", SD1), {"my_style": {"text_encoder": value}})
    torch.save({"string_to_param": table}, tmp_path / "other.pt")
    check(load_embedding(tmp_path / "other.pt", SD1), {"other": {"text_encoder": value}})


@pytest.mark.parametrize("key", ["emb_params", "emp_params", "*"])
@pytest.mark.parametrize("name", ["cat.safetensors", pytest.param("cat.pt", marks=PICKLE)])
def test_kohya_and_onetrainer_name_the_word_by_the_file(tmp_path, key, name):
    value = rows()
    check(load_embedding(write(tmp_path / name, {key: value}), SD1), {"cat": {"text_encoder": value}})


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_sdxl(tmp_path, names):
    both = rows(3, 8), rows(3, 12)
    path = write(tmp_path / "cat.safetensors", dict(zip(names, both, strict=True)))
    check(load_embedding(path, SDXL), {"cat": {"text_encoder": both[0], "text_encoder_2": both[1]}})
    with pytest.raises(DataError, match="made for SDXL"):
        load_embedding(path, SD1)
    write(path, {names[0]: both[0]})
    with pytest.raises(DataError, match=names[1]):
        load_embedding(path, SDXL)
    write(path, {names[0]: both[0], names[1]: both[1][:1]})
    with pytest.raises(DataError, match="vectors"):
        load_embedding(path, SDXL)


def test_a_single_tensor_goes_to_the_text_model_of_its_width(tmp_path):
    for width, model in ((8, "text_encoder"), (12, "text_encoder_2")):
        value = rows(2, width)
        check(load_embedding(write(tmp_path / "a.safetensors", {"w": value}), SDXL), {"w": {model: value}})
    write(tmp_path / "a.safetensors", {"w": rows(2, 1024)})
    with pytest.raises(DataError, match=r"made for Stable Diffusion 2 \(width 1024\); the model's width is 8"):
        load_embedding(tmp_path / "a.safetensors", SD1)


def test_cloneofsimo(tmp_path):
    one, two = RNG.normal(size=8).astype(np.float32), RNG.normal(size=8).astype(np.float32)
    wanted = {"<s1>": {"text_encoder": one}, "<s2>": {"text_encoder": two}}
    check(load_embedding(write(tmp_path / "plain.safetensors", {"<s1>": one, "<s2>": two}), SD1), wanted)
    lora = {"unet:0:up": rows(), "unet:0:down": rows()}
    metadata = {"<s1>": "<embed>", "<s2>": "<embed>", "unet:0:rank": "2"}
    path = write(tmp_path / "a.safetensors", ({**lora, "<s1>": one, "<s2>": two}, metadata))
    check(load_embedding(path, SD1), wanted)


def test_bundle(tmp_path):
    layer = {"lora_unet_x.lora_down.weight": rows(), "lora_unet_x.alpha": np.array(1, np.float32)}
    one, two = rows(2), rows(1)
    tensors = bundle({"<a>": {"text_encoder": one}, "b": {"text_encoder": two}})
    assert list(tensors) == ["bundle_emb.<a>.string_to_param.*", "bundle_emb.b.string_to_param.*"]
    path = write(tmp_path / "lora.safetensors", layer | tensors)
    check(load_embedding(path, SD1), {"<a>": {"text_encoder": one}, "b": {"text_encoder": two}})
    write(path, layer | {"bundle_emb.c.emb_params": two})
    check(load_embedding(path, SD1), {"c": {"text_encoder": two}})
    both = {"text_encoder": rows(2, 8), "text_encoder_2": rows(2, 12)}
    tensors = bundle({"<a>": both})
    assert list(tensors) == ["bundle_emb.<a>.clip_l", "bundle_emb.<a>.clip_g"]
    check(load_embedding(write(path, layer | tensors), SDXL), {"<a>": both})
    write(path, layer | {"bundle_emb.c.x": two, "bundle_emb.c.y": two})
    with pytest.raises(DataError, match=r"bundle_emb\.c"):
        load_embedding(path, SD1)
    with pytest.raises(DataError, match="dot"):
        bundle({"a.b": {"text_encoder": one}})


def test_a_lora_carries_words_and_stays_a_lora(tmp_path):
    shapes = {"down_blocks_0": {"attentions_0": {"proj_in": {"kernel": np.zeros((6, 8), np.float32)}}}}
    expected = {"unet": shapes, "text_encoder": {}}
    layer = {"down": rows(6, 2), "up": rows(2, 8), "scale": np.float32(1)}
    lora = {"unet": {"down_blocks_0": {"attentions_0": {"proj_in": layer}}}}
    words = {"<a>": {"text_encoder": rows(2)}, "b": {"text_encoder": rows(1)}}
    path = tmp_path / "lora.safetensors"
    save_lora(path, lora, expected, embeddings=words)
    check(load_embedding(path, SD1), words)
    read = load_lora(path, expected)["unet"]["down_blocks_0"]["attentions_0"]["proj_in"]
    assert all(np.array_equal(read[part], layer[part]) for part in layer)
    with pytest.raises(ConfigError, match="PEFT"):
        save_lora(path, lora, expected, style="peft", embeddings=words)


@settings(max_examples=30, deadline=None)
@given(
    word=st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="/\\"), min_size=1, max_size=12),
    vectors=st.integers(1, 4),
    sdxl=st.booleans(),
)
def test_round_trip(tmp_path_factory, word, vectors, sdxl):
    if not clean_word(word):
        return
    widths = SDXL if sdxl else SD1
    written = {model: rows(vectors, width) for model, width in widths.items()}
    path = tmp_path_factory.mktemp("e") / file_name(word)
    save_embedding(path, word, written)
    check(load_embedding(path, widths), {word: written})
    assert len(safetensors.numpy.load_file(path)) == len(widths)


def test_other_programs_find_one_tensor_named_as_the_word(tmp_path):
    value = rows()
    save_embedding(tmp_path / "a.safetensors", "<plana>", {"text_encoder": value.T.copy().T}, dtype=np.float16)
    tensors = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert list(tensors) == ["<plana>"]
    np.testing.assert_array_equal(tensors["<plana>"], value.astype(np.float16))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\x\\cat", "cat"),
        ("..", "file"),
        ("a\nb", "a_b"),
        ("*", "file"),
        ("/", "file"),
        ("<plana>", "<plana>"),
    ],
)
def test_names_never_hold_a_path(tmp_path, name, word):
    assert list(load_embedding(write(tmp_path / "file.safetensors", {name: rows()}), SD1)) == [word]


@pytest.mark.parametrize(
    ("word", "name"), [("<plana>", "plana"), ("../x", "x"), ("a b/c", "a-b-c"), ("<雪>", "雪"), ("<*>", "embedding")]
)
def test_file_names_are_safe(word, name):
    assert file_name(word) == f"{name}.safetensors"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({}, "no tensors"),
        ({"a": np.zeros((2, 2, 8), np.float32)}, "not an embedding file"),
        ({"unet:0:up": np.zeros((2, 8), np.float32)}, "not an embedding file"),
        ({"x.lora_down.weight": np.zeros((2, 8), np.float32)}, "not an embedding file"),
        ({"a": np.zeros((2, 8), np.int32)}, "int32"),
        ({"a": np.full((2, 8), np.nan, np.float32)}, "NaN"),
        ({"a": np.zeros((0, 8), np.float32)}, r"\[0, 8\]"),
        ({"x/a": np.zeros(8, np.float32), "y/a": np.zeros(8, np.float32)}, "twice"),
    ],
)
def test_faults_are_one_line(tmp_path, content, fault):
    path = write(tmp_path / "a.safetensors", content)
    with pytest.raises(DataError, match=fault) as caught:
        load_embedding(path, SD1)
    assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value)


def test_missing_truncated_and_foreign_files(tmp_path):
    with pytest.raises(DataError, match="png"):
        load_embedding(tmp_path / "a.png", SD1)
    with pytest.raises(DataError, match="cannot be read"):
        load_embedding(tmp_path / "a.pt", SD1)
    path = write(tmp_path / "a.safetensors", {"a": rows()})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="safetensors: "):
        load_embedding(path, SD1)
    for bad in ({"text_encoder": np.zeros(8)}, {}, {"text_encoder": np.full((1, 8), np.inf)}, {"unet": rows()}):
        with pytest.raises(DataError, match="the word 'a'"):
            save_embedding(tmp_path / "b.safetensors", "a", bad)
