"""Single files: each kind is recognised, a saved file reads back, and diffusers reads the same weights from it."""

import dataclasses
import json
import re
import shutil

import jax
import micro
import numpy as np
import pytest

from sdjax.diffusion import NoiseSchedule
from sdjax.errors import ConfigError, DataError
from sdjax.formats import single_file
from sdjax.formats.families import REFINER, SD1, SD2, SDXL
from sdjax.formats.ldm_config import infer_configs
from sdjax.formats.ldm_names import ldm_name, ldm_prefixes, ldm_vae_name, unet_structure, vae_name
from sdjax.formats.openclip import to_openclip
from sdjax.formats.parameter_names import tensor_name
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.model import Model
from sdjax.models import clip, unet, vae
from sdjax.outline import Outline
from sdjax.text.tokenizer import Tokenizer
from sdjax.trees import leaves

quick = pytest.fixture(scope="module", autouse=True)(micro.quick_compilation)

# The smallest sizes that fit what sdjax takes from the family: 32 norm groups; 8 heads, or heads of 64 channels.
UNET = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "norm_num_groups": 32,
}
LINEAR = {"use_linear_projection": True, "attention_head_dim": [1, 1]}
KINDS = {
    "sd1": {"attention_head_dim": 8},
    "sd2": LINEAR,
    "sdxl": {**LINEAR, "transformer_layers_per_block": [2, 1]},
}
SD1_ALONE = pytest.mark.parametrize("kind", ["sd1"], indirect=True)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tmp_path_factory):
    vae_config = {"block_out_channels": [32, 32], "norm_num_groups": 32}
    vae_config["scaling_factor"] = 0.13025 if kind == "sdxl" else 0.18215
    text = {"num_attention_heads": 1, "hidden_act": "gelu" if kind == "sd2" else "quick_gelu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro, "UNET", {**micro.UNET, **UNET, **KINDS[kind]})
        patch.setattr(micro, "VAE", {**micro.VAE, **vae_config})
        patch.setattr(micro, "TEXT", {**micro.TEXT, **text})
        folder = micro.make_model(tmp_path_factory.mktemp(kind) / "model", sdxl=kind == "sdxl")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "epsilon"}))
    if kind == "sdxl":  # the second text model has OpenCLIP's activation
        file = folder / "text_encoder_2" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "gelu"}))
    return Model.load(folder)


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def foreign(written):
    """The file as another program writes it: without configs, but with averages, buffers and other extras."""
    tensors, _ = read_safetensors(written)
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": np.zeros(3, np.float32),
        "model_ema.decay": np.zeros((), np.float32),
        "betas": np.zeros(1000, np.float32),
        "first_stage_model.loss.logvar": np.zeros((), np.float32),
    }
    prefix = next((key for key in tensors if key.endswith("embeddings.token_embedding.weight")), None)
    if prefix:
        extra[prefix.replace("token_embedding.weight", "position_ids")] = np.arange(16)[None]
    path = written.with_name("foreign.safetensors")
    save_safetensors(path, {**tensors, **extra})
    return path


def same(one, two):
    return jax.tree.all(jax.tree.map(np.array_equal, one, two))


def test_what_we_write_we_read(model, written, tmp_path):
    read = Model.load(written, tokenizer=model.outline.folder.path)
    assert same(read.params, model.params)
    assert (read.outline.folder.configs, read.outline.folder.scheduler) == (
        model.outline.folder.configs,
        model.outline.folder.scheduler,
    )
    assert read.outline.folder.model_index["_class_name"] == model.outline.folder.model_index["_class_name"]
    read.save(tmp_path / "folder")
    again = Model.load(tmp_path / "folder")
    assert same(again.params, model.params)
    prompts = ["a red heart", "!"]
    for got, wanted in zip(again.encode_prompts(prompts), model.encode_prompts(prompts), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_a_file_without_configs_is_understood(model, kind, foreign):
    """All settings that matter are inferred, including heads, activations and the scale of the latents."""
    read = Model.load(foreign, tokenizer=model.outline.folder.path, prediction_type="epsilon")
    assert same(read.params, model.params)
    assert read.outline.unet.config.sample_size == {"sdxl": 512}.get(kind, 256)  # the VAE has a factor of 2
    for one, two in (
        (read.outline.unet, model.outline.unet),
        (read.outline.vae, model.outline.vae),
    ):
        assert dataclasses.replace(one.config, sample_size=0) == dataclasses.replace(two.config, sample_size=0)
    for name, text in model.outline.text_models.items():
        assert dataclasses.replace(read.outline.text_models[name].config, eos_token_id=1) == text.config
    np.testing.assert_allclose(read.encode_text("a heart"), model.encode_text("a heart"), atol=1e-5)


def test_the_names_are_the_fields(written, kind):
    tensors, metadata = read_safetensors(written)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    block = "model.diffusion_model.input_blocks.1.1"
    width = 32 if kind == "sdxl" else 16
    assert shapes[f"{block}.transformer_blocks.0.attn2.to_k.weight"] == (32, width)
    assert shapes[f"{block}.proj_in.weight"] == ((32, 32) if kind in ("sd2", "sdxl") else (32, 32, 1, 1))
    assert shapes["model.diffusion_model.output_blocks.1.1.conv.weight"] == (64, 64, 3, 3)
    assert shapes["first_stage_model.encoder.mid.attn_1.q.weight"] == (32, 32, 1, 1)
    assert shapes["first_stage_model.decoder.up.1.upsample.conv.weight"] == (32, 32, 3, 3)
    text = {
        "sd2": "cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight",  # the spare block
        "sdxl": "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight",
    }.get(kind, "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight")
    assert shapes[text] == (48 if "in_proj" in text else 16, 16)
    assert metadata["modelspec.architecture"].startswith("stable-diffusion-")
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


@SD1_ALONE
def test_half_precision(model, tmp_path):
    model.save(tmp_path / "half.safetensors", dtype="float16")
    tensors, _ = read_safetensors(tmp_path / "half.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"float16"}
    read = Model.load(tmp_path / "half.safetensors", tokenizer=model.outline.folder.path)
    halved = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), model.params)
    assert same(read.params, halved)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_diffusers_reads_the_same_weights(model, kind, written):
    """The converters of diffusers turn the file into the tensors of the folder."""
    import torch
    from diffusers.loaders import single_file_utils as theirs
    from safetensors.torch import load_file

    checkpoint = load_file(written)
    configs = {"class_embed_type": None, "addition_embed_type": None, **model.outline.folder.configs["unet"]}
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(checkpoint), configs),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(checkpoint), model.outline.folder.configs["vae"]),
    }
    if kind != "sd2":
        converted["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(checkpoint))
    if kind in ("sd2", "sdxl"):

        class Model:
            config = None

        name, prefix = {
            "sd2": ("text_encoder", "cond_stage_model.model."),
            "sdxl": ("text_encoder_2", "conditioner.embedders.1.model."),
        }[kind]
        converted[name] = theirs.convert_open_clip_checkpoint(Model, dict(checkpoint), prefix=prefix)
    assert converted.keys() == model.params.keys()
    for name, tensors in converted.items():
        wanted = model.outline.folder.tensors(name)
        if kind == "sd2" and name == "text_encoder":  # diffusers leaves out block 23, whatever the size of the model
            unused = ("layers.2.", "projection")
            tensors = {key: tensor for key, tensor in tensors.items() if not any(part in key for part in unused)}
        vae_names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
        for old, new in vae_names.items():
            tensors = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        assert tensors.keys() == wanted.keys(), name
        for key, tensor in tensors.items():
            assert torch.equal(tensor.reshape(wanted[key].shape), torch.from_numpy(wanted[key].copy())), key


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"], indirect=True)  # not SD2: diffusers expects 24 blocks
def test_diffusers_makes_a_pipeline_of_it(model, kind, written):
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

    pipeline = {"sd1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind].from_single_file(
        str(written), config=str(model.outline.folder.path), local_files_only=True
    )
    # diffusers tells SDXL's two text models apart by their widths, which are equal here.
    for name in model.params.keys() - {"text_encoder_2"}:
        theirs, ours = getattr(pipeline, name).state_dict(), model.outline.folder.tensors(name)
        ours = {key.removeprefix("text_model."): tensor for key, tensor in ours.items()}
        theirs = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()}
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            assert torch.equal(tensor, torch.from_numpy(ours[key].copy())), (name, key)


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "step"), [("sd1", 0), ("sd2", 875000), ("sd2", 140000)], indirect=["kind"])
def test_pickles_nest_their_tensors_and_tell_the_step(model, kind, foreign, tmp_path, step):
    import torch

    tensors, _ = read_safetensors(foreign)
    nested = {key: torch.from_numpy(tensor.copy()) for key, tensor in tensors.items()}
    nested = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in nested.items()}
    torch.save({"state_dict": nested, "global_step": step, "epoch": 3}, tmp_path / "model.ckpt")
    read = Outline.load(tmp_path / "model.ckpt", tokenizer=model.outline.folder.path)
    halved = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), model.params["unet"])
    assert same(read.load_weights("unet"), halved)
    v = kind == "sd2" and step != 875000
    assert read.schedule.prediction_type == ("v_prediction" if v else "epsilon")


# Models of full size, as arrays that need no memory.

PUBLISHED = {
    SD1: {
        "unet": {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64},
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    SD2: {
        "unet": {
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
    SDXL: {
        "unet": {
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "sample_size": 128,
            "use_linear_projection": True,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        "text_encoder_2": {
            "architectures": ["CLIPTextModelWithProjection"],
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
    },
}
PUBLISHED[REFINER] = {
    "unet": {
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "sample_size": 128,
        "use_linear_projection": True,
        "block_out_channels": [384, 768, 1536, 1536],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 4, 4, 4],  # published as 4; the first level has no attention
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
    "text_encoder_2": PUBLISHED[SDXL]["text_encoder_2"],
}


TEXT_PREFIXES = {
    SD1: {"text_encoder": "cond_stage_model.transformer.text_model."},
    SD2: {"text_encoder": "cond_stage_model.model."},
    SDXL: {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    REFINER: {"text_encoder_2": "conditioner.embedders.0.model."},
}


def torch_shapes(params):
    """PyTorch's name -> an array of PyTorch's shape that needs no memory, for a tree of shapes."""
    arrays = {}
    for path, leaf in leaves(params):
        shape = leaf.shape
        if path[-1] == "kernel":
            shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], *shape[:2])
        arrays[tensor_name(path)] = np.broadcast_to(np.float16(0), shape)
    return arrays


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_models_are_recognised(family, tmp_path, monkeypatch):
    """Their configs are inferred from the shapes in their files, which hold the published number of tensors."""
    configs = {**PUBLISHED[family], "vae": {}}
    modules = {"unet": (unet, unet.UNetConfig), "vae": (vae, vae.VAEConfig)}
    modules = {name: modules.get(name, (clip, clip.TextConfig)) for name in configs}
    wanted = {name: kind.from_dict(configs[name]) for name, (_, kind) in modules.items()}
    if family in (SDXL, REFINER):
        wanted["vae"] = dataclasses.replace(wanted["vae"], scaling_factor=0.13025)
    trees = {name: module.abstract_params(wanted[name]) for name, (module, _) in modules.items()}
    shapes = {name: torch_shapes(tree) for name, tree in trees.items()}
    prefixes = ldm_prefixes(trees["unet"])
    file = {}
    for key, tensor in shapes["unet"].items():
        module, _, leaf = key.rpartition(".")
        file[f"model.diffusion_model.{ldm_name(module, prefixes)}.{leaf}"] = tensor
    for key, tensor in shapes["vae"].items():
        module, _, leaf = key.rpartition(".")
        file[f"first_stage_model.{ldm_vae_name(module, 4)}.{leaf}"] = tensor
    for name, prefix in TEXT_PREFIXES[family].items():
        openclip = prefix.endswith(".model.")
        text = to_openclip(shapes[name], sd2=family == SD2) if openclip else shapes[name]
        file |= {prefix + key: tensor for key, tensor in text.items()}
    assert family == REFINER or len(shapes["unet"]) == {SD1: 686, SD2: 686, SDXL: 1680}[family]
    assert len(shapes["vae"]) == 248 and file.keys() >= {
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.mid.block_2.conv2.bias",
    }
    monkeypatch.setattr(single_file, "read_tensors", lambda path: (file, {}))
    monkeypatch.setattr(single_file, "snapshot", lambda *_: micro.TOKENIZER)
    folder = single_file.read_single_file(tmp_path / "model.safetensors")
    for name, (_, kind) in modules.items():
        got = kind.from_dict(folder.configs[name])
        if name.startswith("text"):
            assert got == wanted[name]
        else:
            size = {SD1: 512, SD2: 768}.get(family, 1024)
            assert dataclasses.replace(got, sample_size=0) == dataclasses.replace(wanted[name], sample_size=0)
            assert got.sample_size == (size // 8 if name == "unet" else size)
        assert folder.state and folder.state[name].keys() == shapes[name].keys()
    assert bool(folder.model_index.get("requires_aesthetics_score")) == (family == REFINER)
    assert folder.scheduler["prediction_type"] == ("v_prediction" if family == SD2 else "epsilon")
    assert (folder.scheduler["beta_start"], folder.scheduler["beta_end"]) == (0.00085, 0.012)


# Files that are refused, and settings.


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["model.diffusion_model.double_blocks.0.x"], "Flux"),
        (["model.diffusion_model.out.2.weight", "edm_mean"], "EDM"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["lora_unet_x.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.to_q.lora_A.weight"], "a LoRA"),
        (["<plana>"], "an embedding"),
        (["emb_params"], "an embedding"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a U-Net alone"),
        (["encoder.conv_in.weight"], "a VAE alone"),
        (["text_model.encoder.layers.0.mlp.fc1.weight"], "a text model alone"),
        (["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"], "without its text models"),
        (["something"], "it holds something"),
    ],
)
def test_other_files_are_named(tmp_path, keys, kind):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {key: np.zeros((2, 2), np.float32) for key in keys})
    with pytest.raises(DataError, match=re.escape(kind)) as caught:
        Model.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@SD1_ALONE
def test_parts_that_are_missing_or_odd_are_named(model, foreign, tmp_path):
    tensors, _ = read_safetensors(foreign)
    path = tmp_path / "a.safetensors"

    def refused(match, change):
        changed = {new: tensor for key, tensor in tensors.items() if (new := change(key))}
        save_safetensors(path, changed)
        with pytest.raises(DataError, match=match):
            Model.load(path, tokenizer=model.outline.folder.path)

    refused("without its VAE", lambda key: None if key.startswith("first_stage") else key)
    refused("no encoder.conv_in.weight", lambda key: None if key.endswith("model.encoder.conv_in.weight") else key)
    refused("no input_blocks.0.0.weight", lambda key: None if "input_blocks.0.0.weight" in key else key)
    refused("no middle_block.1.proj_in", lambda key: None if "proj_in.weight" in key else key)
    refused("1 missing: conv_in.bias", lambda key: None if key.endswith("input_blocks.0.0.bias") else key)
    refused(
        "not expected: middle",
        lambda key: key.replace("out.2.bias", "middle.bias") if "diffusion_model.out" in key else key,
    )


@SD1_ALONE
def test_the_other_vae_prefix(model, foreign, tmp_path):
    tensors, _ = read_safetensors(foreign)
    save_safetensors(
        tmp_path / "a.safetensors", {k.replace("first_stage_model.", "vae."): t for k, t in tensors.items()}
    )
    read = Outline.load(tmp_path / "a.safetensors", tokenizer=model.outline.folder.path)
    assert same(read.load_weights("vae"), model.params["vae"])


@SD1_ALONE
def test_the_channels_tell_inpainting(model, foreign, tmp_path):
    tensors, _ = read_safetensors(foreign)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    path = tmp_path / "a.safetensors"
    for channels in (9, 8):
        save_safetensors(path, {**tensors, key: np.zeros((32, channels, 3, 3), np.float32)})
        if channels == 9:
            read = Outline.load(path, tokenizer=model.outline.folder.path)
            assert read.unet.config.in_channels == 9 and read.schedule.prediction_type == "epsilon"
            assert read.folder.model_index["_class_name"] == "StableDiffusionInpaintPipeline"
    with pytest.raises(DataError, match="takes 8 channels"):
        Model.load(path, tokenizer=model.outline.folder.path)


@SD1_ALONE
def test_damaged_configs_are_refused(model, foreign, tmp_path):
    tensors, metadata = read_safetensors(foreign)
    path = tmp_path / "a.safetensors"
    for damaged in ("{", "[]", '{"configs": {}, "scheduler": {}}'):
        save_safetensors(path, tensors, {**metadata, "sdjax.configs": damaged})
        with pytest.raises(DataError, match="configs is damaged"):
            Model.load(path, tokenizer=model.outline.folder.path)


def test_the_prediction_type_is_what_is_known_of_it(model, kind, foreign, tmp_path, caplog):
    tensors, _ = read_safetensors(foreign)
    path = tmp_path / "a.safetensors"

    def read(extra=None, metadata=None, **settings):
        save_safetensors(path, {**tensors, **(extra or {})}, metadata)
        caplog.clear()
        folder = single_file.read_single_file(path, tokenizer=model.outline.folder.path, **settings)
        return NoiseSchedule.from_config(folder.scheduler)

    assert read().prediction_type == ("v_prediction" if kind == "sd2" else "epsilon")
    assert ("give prediction_type" in caplog.text) == (kind == "sd2")
    assert read(metadata={"modelspec.prediction_type": "v"}).prediction_type == "v_prediction"
    assert read(metadata={"modelspec.prediction_type": "epsilon"}).prediction_type == "epsilon"
    assert not caplog.text
    for prediction in ("epsilon", "v_prediction"):
        assert read(prediction_type=prediction).prediction_type == prediction
    marked = read({"v_pred": np.zeros(0, np.float32), "ztsnr": np.zeros(0, np.float32)})
    assert marked.prediction_type == "v_prediction" and marked.alphas_cumprod[-1] < 1e-6
    with pytest.raises(ConfigError, match="prediction_type = 'v'"):
        read(prediction_type="v")


def test_velocity_and_zero_snr_survive(model, kind, tmp_path):
    folder = dataclasses.replace(
        model.outline.folder,
        scheduler={
            **model.outline.folder.scheduler,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        },
    )
    model = dataclasses.replace(model, outline=dataclasses.replace(model.outline, folder=folder))
    model.save(tmp_path / "a.safetensors")
    tensors, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata["modelspec.prediction_type"] == "v" and "ztsnr" in tensors
    assert ("v_pred" in tensors) == (kind == "sdxl")
    read = single_file.read_single_file(tmp_path / "a.safetensors", tokenizer=model.outline.folder.path)
    assert read.scheduler == folder.scheduler


@SD1_ALONE
def test_settings_that_do_not_go_together(model, written, tmp_path):
    with pytest.raises(ConfigError, match="never as a pickle"):
        single_file.save_single_file(
            tmp_path / "a.ckpt",
            configs=model.outline.folder.configs,
            params=model.params,
            scheduler=model.outline.folder.scheduler,
        )
    rows = {name: np.zeros((1, 16), np.float32) for name in model.outline.text_models}
    with pytest.raises(ConfigError, match="cannot hold the new words <w>"):
        model.with_embedding({"<w>": rows}).save(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="is for models of a single file"):
        Model.load(model.outline.folder.path, tokenizer=tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        Model.load(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="is no folder with"):
        Model.load(written, tokenizer=tmp_path)
    assert not list(tmp_path.iterdir())


def test_tokenizers_pad_as_the_family_does(model, kind, foreign, tmp_path, monkeypatch):
    """This holds for the hub and for one folder for all tokenizers. Those of a model's folder stay as they are."""
    exclamation = model.outline.tokenizers["tokenizer"].vocabulary.convert_tokens_to_ids("!")
    pads = {"tokenizer": exclamation if kind == "sd2" else 1} | ({"tokenizer_2": exclamation} if kind == "sdxl" else {})
    shutil.copytree(micro.TOKENIZER, tmp_path / "tokenizer")

    def padding(tokenizer=None):
        folder = single_file.read_single_file(foreign, tokenizer=tokenizer, prediction_type="epsilon")
        return {name: Tokenizer.from_folder(path, window=16).pad for name, path in folder.tokenizers.items()}

    assert padding(micro.TOKENIZER) == pads
    assert set(padding(model.outline.folder.path).values()) == {1}
    assert padding(tmp_path) == pads | {"tokenizer": 1}
    with pytest.raises(DataError, match=r"its tokenizer has 2263 words, Stable Diffusion's 49408: give its folder"):
        padding()
    monkeypatch.setattr(single_file, "VOCABULARY", 2263)
    monkeypatch.setattr(single_file, "snapshot", lambda repository, patterns: micro.TOKENIZER)
    assert padding() == pads

    def offline(repository, patterns):
        raise DataError(f"{repository}: the hub cannot be reached")

    monkeypatch.setattr(single_file, "snapshot", offline)
    with pytest.raises(DataError, match="the tokenizer is not in the file; give its folder with --tokenizer DIR"):
        padding()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("levels", [1, 4])
def test_the_vaes_names_go_both_ways(layers, levels):
    config = vae.VAEConfig(block_out_channels=(32,) * levels, layers_per_block=layers)
    modules = {tensor_name(path).rpartition(".")[0] for path, _ in leaves(vae.abstract_params(config))}
    theirs = {ldm_vae_name(module, levels) for module in modules}
    assert len(theirs) == len(modules) and {vae_name(name, levels) for name in theirs} == modules
    assert {vae_name(module, levels) for module in modules} == modules  # diffusers' names stay as they are


def test_a_structure_that_is_none_is_named():
    with pytest.raises(DataError, match="not the structure of a Stable Diffusion 1 model: no "):
        infer_configs(SD1, {"unet": {}, "vae": {}, "text_encoder": {}}, "epsilon")


def test_a_config_that_leaves_out_the_blocks_has_those_of_sd1():
    """As in diffusers. The names in a single file depend on the blocks, and each must lead back to its module."""
    shapes = unet.abstract_params(unet.UNetConfig.from_dict({"in_channels": 4}))
    prefixes = ldm_prefixes(unet_structure({"in_channels": 4}))
    assert prefixes == ldm_prefixes(shapes)
    back = {ldm: ours for ours, ldm in prefixes.items()}
    for path, _ in leaves(shapes):
        module = tensor_name(path).rpartition(".")[0]
        assert ldm_name(ldm_name(module, prefixes), back) == module
