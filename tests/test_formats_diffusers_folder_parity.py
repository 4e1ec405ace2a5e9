"""Model folders: sdjax reads what diffusers saves, and diffusers and transformers read what sdjax saves."""

import jax.numpy as jnp
import numpy as np
import pictures
import pytest
from test_formats_parameter_names import torch_expected

from sdjax.formats.diffusers_folder import read_folder, save_folder
from sdjax.formats.parameter_names import load_params, to_state_dict
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors

KINDS = ("sd1", "sd2v", "sdxl")


@pytest.fixture(scope="module")
def pipelines():
    return {kind: pictures.build(kind) for kind in KINDS}


def parts(pipeline):
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def load_all(folder, models):
    return {
        name: load_params(folder.tensors(name), torch_expected(model), dtype=jnp.float32, what=name)
        for name, model in models.items()
    }


def same(params, model):
    import torch

    theirs = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("position_ids")}
    ours = to_state_dict(params)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(torch.from_numpy(np.ascontiguousarray(ours[key])), theirs[key]) for key in ours)


SAVINGS = {
    "plain": {},
    "pickle": {"safe_serialization": False},
    "sharded": {"max_shard_size": "100KB"},
    "variant": {"variant": "fp16"},
    "sharded variant": {"variant": "fp16", "max_shard_size": "100KB"},
    "sharded pickle": {"safe_serialization": False, "max_shard_size": "100KB"},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saving", SAVINGS)
def test_whatever_diffusers_saves_is_read(tmp_path, pipelines, kind, saving):
    pipeline = pipelines[kind]
    pipeline.save_pretrained(tmp_path / "m", **SAVINGS[saving])
    if "sharded" in saving:
        assert len(list((tmp_path / "m" / "unet").glob("*-of-*"))) > 1
    folder = read_folder(tmp_path / "m", variant=SAVINGS[saving].get("variant"))
    params = load_all(folder, parts(pipeline))
    assert all(same(params[name], model) for name, model in parts(pipeline).items())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_diffusers_loads(tmp_path, pipelines, kind):
    import torch
    from diffusers import DiffusionPipeline

    pipeline = pipelines[kind]
    pipeline.save_pretrained(tmp_path / "theirs")
    folder = read_folder(tmp_path / "theirs")
    save_folder(
        tmp_path / "ours",
        configs=folder.configs,
        params=load_all(folder, parts(pipeline)),
        tokenizers=folder.tokenizers,
        scheduler=folder.scheduler,
        model_index=folder.model_index,
    )
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert type(loaded) is type(pipeline)
    ours = read_folder(tmp_path / "ours").model_index
    theirs = {key: value for key, value in folder.model_index.items() if key != "_diffusers_version"}
    assert {key: ours[key] for key in theirs} == theirs
    for name, model in parts(pipeline).items():
        other = getattr(loaded, name).state_dict()
        assert other.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in model.state_dict().items()), name
    settings = dict(pipeline.scheduler.config)
    settings.pop("_use_default_values")  # which options were not given
    assert {key: value for key, value in loaded.scheduler.config.items() if key in settings} == settings


@pytest.mark.parity
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_text_encoders_are_read_by_transformers_under_either_prefix(tmp_path, projection):
    """transformers 5.23 reads both; without the prefix 4.57 leaves the weights random, so sdjax writes the prefix."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    config = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=12,
    )
    model = kind(config)
    model.save_pretrained(tmp_path)
    params = load_params(
        read_safetensors(tmp_path / "model.safetensors").tensors, torch_expected(model), dtype=jnp.float32, what="x"
    )
    for prefix in ("", "text_model."):
        tensors = to_state_dict(params, prefix=prefix)
        save_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
        again = kind.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
