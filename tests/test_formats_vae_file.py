"""Another autoencoder in place of a model's, from every kind of source."""

import json
import shutil

import numpy as np
import pytest

import sdjax
from sdjax.errors import DataError
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.weights_file import read_tensors
from sdjax.outline import Outline


@pytest.fixture(scope="module")
def other(micro_models, tmp_path_factory):
    """A model with another autoencoder than the micro model's: other weights, scaling_factor and force_upcast."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(micro_models(), folder)
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5, "force_upcast": False}))
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = {name: np.asarray(tensor) * np.float32(1.5) for name, tensor in read_tensors(file).tensors.items()}
    save_safetensors(file, tensors, {"format": "pt"})
    sdjax.load(folder).save(folder / "whole.safetensors")
    ldm = {
        key.removeprefix("first_stage_model."): np.asarray(tensor)
        for key, tensor in read_tensors(folder / "whole.safetensors").tensors.items()
        if key.startswith("first_stage_model.")
    }
    save_safetensors(folder / "ldm.safetensors", ldm, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "source",
    [".", "vae", "vae/diffusion_pytorch_model.safetensors", "ldm.safetensors", "whole.safetensors"],
)
def test_the_autoencoder_of_any_source_takes_the_place_of_the_models(micro_models, other, source):
    model = micro_models()
    replaced = sdjax.load(model, vae=other / source)
    pixels = np.random.default_rng(0).uniform(size=(1, 16, 16, 3)).astype(np.float32)
    expected = sdjax.load(other)
    # A file holds no config, so the scaling factor stays that of the model. The floats then round otherwise.
    scale = 1.0 if source in (".", "vae") else 0.5 / replaced.model.outline.vae.config.scaling_factor
    encoded = np.asarray(replaced.encode_image(pixels)) * np.float32(scale)
    np.testing.assert_allclose(encoded, expected.encode_image(pixels), rtol=0, atol=1e-5)
    assert np.abs(np.asarray(sdjax.load(model).encode_image(pixels) - replaced.encode_image(pixels))).max() > 0.01
    np.testing.assert_array_equal(
        replaced.params["unet"]["conv_in"]["kernel"], sdjax.load(model).params["unet"]["conv_in"]["kernel"]
    )


def test_a_model_of_one_file_takes_another_autoencoder_and_is_saved_with_it(micro_models, other, tmp_path):
    sdjax.load(micro_models()).save(tmp_path / "model.safetensors")
    replaced = sdjax.load(tmp_path / "model.safetensors", vae=other, tokenizer=other)
    replaced.save(tmp_path / "saved")
    again = sdjax.load(tmp_path / "saved")
    assert again.model.outline.vae.config.scaling_factor == 0.5
    kernel = lambda sd: np.asarray(sd.params["vae"]["encoder"]["conv_in"]["kernel"])
    np.testing.assert_array_equal(kernel(again), kernel(sdjax.load(other)))


def test_sources_of_something_else_are_refused(micro_models, other, tmp_path):
    model = micro_models()

    def refuses(source, match):
        with pytest.raises(DataError, match=match):
            Outline.load(model, vae=source)

    refuses(other / "unet", "config.json is that of a UNet2DConditionModel, not of an AutoencoderKL")
    refuses(tmp_path / "nothing.safetensors", "nothing.safetensors")
    refuses(tmp_path, "config.json: missing")
    refuses("no such model", "no such folder, and not a hub id")
    refuses(other / "unet/diffusion_pytorch_model.safetensors", "no autoencoder: it holds ")
    tensors = read_tensors(other / "ldm.safetensors").tensors
    save_safetensors(
        tmp_path / "part.safetensors", {k: v for k, v in tensors.items() if "encoder.conv_in" not in k}, {}
    )
    refuses(tmp_path / "part.safetensors", "not the structure of an autoencoder: no encoder.conv_in.weight")
    for key, value, match in [
        ("latent_channels", 16, "an autoencoder of 16 latent channels; the model needs 4"),
        ("block_out_channels", [8], "an autoencoder of 1 pixels a latent; the model needs 2"),
    ]:
        folder = tmp_path / key
        shutil.copytree(other / "vae", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        refuses(folder, match)


@pytest.mark.parametrize(
    ("sdxl", "upcast", "dtype", "expected"),
    [
        (True, None, "bfloat16", "float32"),
        (True, True, "float16", "float32"),
        (True, False, "bfloat16", "bfloat16"),
        (True, False, "float16", "float16"),
        (False, None, "bfloat16", "bfloat16"),
        (False, None, "float16", "float32"),
        (False, False, "float16", "float16"),
    ],
)
def test_the_number_type_of_an_autoencoder(micro_models, tmp_path, sdxl, upcast, dtype, expected):
    shutil.copytree(micro_models(sdxl=sdxl) / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    config = {**config, "force_upcast": upcast} if upcast is not None else config
    config.pop("force_upcast", None) if upcast is None else None
    (tmp_path / "vae/config.json").write_text(json.dumps(config))
    outline = Outline.load(micro_models(sdxl=sdxl), dtype, vae=tmp_path / "vae", platform="tpu")
    assert (outline.dtype("vae"), outline.dtype("unet")) == (expected, dtype)
