"""Model folders: every kind is read, a saved folder reads back, and each fault gives an error that names it."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_formats_parameter_names import TABLES, UNET, VAE, load, state_dict

from sdjax.errors import DataError
from sdjax.formats.diffusers_folder import read_folder, save_folder
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.trees import leaves

# Reading folders that are written by hand.

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
}


def make_folder(path, index=None, configs=None):
    index = INDEX if index is None else index
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps(index))
    for name, table in TABLES.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps((configs or {}).get(name, {"in_channels": 4})))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_safetensors(path / name / f"{stem}.safetensors", state_dict(table))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    (path / "tokenizer" / "merges.txt").write_text("")
    return path


def test_reads_a_folder(tmp_path):
    folder = read_folder(make_folder(tmp_path / "m"))
    assert folder.scheduler == {"_class_name": "DDIMScheduler"}
    assert folder.configs.keys() == {"unet", "vae", "text_encoder"}
    assert folder.tokenizers == {"tokenizer": tmp_path / "m" / "tokenizer"}
    assert folder.tensors("unet").keys() == state_dict(UNET).keys()
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder.path = tmp_path


def folder_fault(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        read_folder(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRONG_KINDS = {
    "Flux": (
        {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
        "a FluxPipeline, which has no U-Net; sdjax reads Stable Diffusion 1.x",
    ),
    "SD3": (
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
        "a StableDiffusion3Pipeline",
    ),
    "AltDiffusion": (
        INDEX | {"_class_name": "AltDiffusionPipeline",
                 "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]},
        "a AltDiffusionPipeline whose text_encoder is a RobertaSeriesModelWithTransformation, not CLIPTextModel",
    ),
    "video": (
        INDEX | {"_class_name": "TextToVideoSDPipeline", "unet": ["diffusers", "UNet3DConditionModel"]},
        "unet is a UNet3DConditionModel",
    ),
    "no VAE": ({key: value for key, value in INDEX.items() if key != "vae"}, "names no vae"),
    "broken": ([1, 2], "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_other_kinds_of_model_are_named(tmp_path, kind):
    index, match = WRONG_KINDS[kind]
    folder_fault(make_folder(tmp_path / "m", index), match)


def test_other_input_channels_are_named(tmp_path):
    index = INDEX | {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
    path = make_folder(tmp_path / "m", index, {"unet": {"in_channels": 8}})
    folder_fault(path, "StableDiffusionInstructPix2PixPipeline whose U-Net takes 8 channels")


def test_single_models_and_other_folders_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    folder_fault(tmp_path, "holds a single ControlNetModel, not a whole pipeline")
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    folder_fault(tmp_path, "holds a single LORA")
    (tmp_path / "adapter_config.json").unlink()
    folder_fault(tmp_path, "no model_index.json, .* it holds nothing")
    (tmp_path / "notes.txt").write_text("x")
    folder_fault(tmp_path, "it holds notes.txt")
    folder_fault(tmp_path / "notes.txt", "a file where a model folder is expected")
    folder_fault(tmp_path / "none" / "at" / "all", "no such folder, and not a hub id")


def test_missing_files_are_named_with_what_was_looked_for(tmp_path):
    path = make_folder(tmp_path / "m")
    (path / "unet" / "diffusion_pytorch_model.safetensors").rename(path / "unet" / "other.safetensors")
    message = folder_fault(path, r"unet: no weights; looked for diffusion_pytorch_model\.safetensors, ")
    assert "diffusion_pytorch_model.fp16.safetensors" in message
    assert "diffusion_pytorch_model.bin" in message
    (path / "vae" / "config.json").unlink()
    folder_fault(path, r"vae/config\.json: missing")
    (path / "vae" / "config.json").write_text("{'a': 1}")
    folder_fault(path, r"vae/config\.json: not JSON")
    (path / "vae" / "config.json").write_text("{}")
    (path / "tokenizer" / "vocab.json").unlink()
    folder_fault(path, "tokenizer/ has neither tokenizer.json nor vocab.json")
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    (path / "unet" / "other.safetensors").rename(path / "unet" / "diffusion_pytorch_model.safetensors")
    read_folder(path)
    (path / "scheduler" / "scheduler_config.json").unlink()
    folder_fault(path, r"scheduler_config\.json: missing")


def test_choice_among_weight_files(tmp_path):
    path = make_folder(tmp_path / "m")
    unet = path / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    half = unet / "diffusion_pytorch_model.fp16.safetensors"
    save_safetensors(half, state_dict(UNET, dtype=np.float16))
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert read_folder(path).weights["unet"] == (plain,)
    assert read_folder(path, variant="fp16").weights["unet"] == (half,)
    assert read_folder(path, variant="fp16").weights["vae"][0].name == "diffusion_pytorch_model.safetensors"
    assert read_folder(path, variant="ema").weights["unet"] == (plain,)
    plain.unlink()
    assert read_folder(path).weights["unet"] == (half,)
    half.unlink()
    assert read_folder(path).weights["unet"] == (unet / "diffusion_pytorch_model.bin",)


def test_shards(tmp_path):
    path = make_folder(tmp_path / "m")
    unet = path / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    tensors = state_dict(UNET)
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    halves = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, keys in halves.items():
        save_safetensors(unet / file, {key: tensors[key] for key in keys})
    places = {key: file for file, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = read_folder(path).tensors("unet")
    assert read.keys() == tensors.keys()
    for key, array in tensors.items():
        np.testing.assert_array_equal(read[key], array)

    save_safetensors(unet / next(iter(halves)), tensors)
    with pytest.raises(DataError, match="tensors that another shard holds too"):
        read_folder(path).tensors("unet")
    (unet / next(iter(halves))).unlink()
    folder_fault(path, "shards missing: diffusion_pytorch_model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    folder_fault(path, "names a file outside its folder")
    index.write_text(json.dumps({"weight_map": ["a"]}))
    folder_fault(path, "no object weight_map")


# Saving.


def save(path, **changes):
    source = path.with_name(f"{path.name}-tokenizer")
    source.mkdir(exist_ok=True)
    (source / "vocab.json").write_text("{}")
    arguments = {
        "configs": {
            "unet": {"in_channels": 4},
            "vae": {},
            "text_encoder": {"architectures": ["FlaxCLIPTextModel"], "_name_or_path": "/home/me"},
        },
        "params": {name: load(state_dict(table), table) for name, table in TABLES.items()},
        "tokenizers": {"tokenizer": source},
        "scheduler": {"_class_name": "FlaxDDIMScheduler", "beta_start": 0.00085},
    } | changes
    save_folder(path, **arguments)


def test_saved_folder_reads_back(tmp_path):
    path = tmp_path / "m"
    save(path, model_index={"_class_name": "FlaxStableDiffusionPipeline", "safety_checker": ["x", "FlaxY"]})
    text = json.dumps([json.loads(file.read_text()) for file in path.rglob("*.json")])
    assert "Flax" not in text
    folder = read_folder(path)
    assert folder.model_index["_class_name"] == "StableDiffusionPipeline"
    for name in ("feature_extractor", "safety_checker", "image_encoder"):
        assert folder.model_index[name] == [None, None]
    assert folder.scheduler == {"_class_name": "DDIMScheduler", "beta_start": 0.00085}
    assert folder.configs["unet"] == {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    for name, table in TABLES.items():
        for (_, one), (_, other) in zip(
            leaves(load(folder.tensors(name), table)), leaves(load(state_dict(table), table)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert "text_model.final_layer_norm.bias" in folder.tensors("text_encoder")
    assert "text_projection.weight" in folder.tensors("text_encoder")
    (stored,) = folder.weights["unet"]
    assert read_safetensors(stored).metadata == {"format": "pt"}


def test_saving_in_another_dtype(tmp_path):
    configs = {"unet": {}, "vae": {}, "text_encoder": {"dtype": "float32"}}
    save(tmp_path / "m", dtype=jnp.bfloat16, configs=configs)
    folder = read_folder(tmp_path / "m")
    assert folder.configs["text_encoder"]["dtype"] == "bfloat16"
    assert all(array.dtype == ml_dtypes.bfloat16 for array in folder.tensors("unet").values())


def test_saving_replaces_a_model_and_spares_anything_else(tmp_path):
    path = tmp_path / "m"
    save(path)
    (path / "stray.txt").write_text("of the old model")
    save(path, scheduler={"_class_name": "PNDMScheduler"})
    assert read_folder(path).scheduler["_class_name"] == "PNDMScheduler"
    assert not (path / "stray.txt").exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m", "m-tokenizer"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="not a model folder; it is left alone"):
        save(photos)
    assert (photos / "a.png").exists()


def test_a_folder_saved_onto_itself_keeps_its_tokenizer(tmp_path):
    save(tmp_path / "m")
    save(tmp_path / "m", tokenizers=read_folder(tmp_path / "m").tokenizers)
    assert (tmp_path / "m" / "tokenizer" / "vocab.json").exists()


def test_failed_save_leaves_the_old_folder(tmp_path):
    path = tmp_path / "m"
    save(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    complex_kernel = {"conv_in": {"kernel": np.ones((2, 2), np.complex64)}}
    with pytest.raises(DataError, match="complex64"):
        save(path, params={"vae": load(state_dict(VAE), VAE), "unet": complex_kernel})
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m", "m-tokenizer"]
