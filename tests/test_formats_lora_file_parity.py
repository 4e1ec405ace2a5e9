"""LoRA files: sdjax, and diffusers with peft, read each other's files with the same change of every kernel."""

import numpy as np
import oracle
import pictures
import pytest
from adapters import SD1, apply, inputs_of, random_adapter
from safetensors.numpy import load_file, save_file
from test_formats_lora_file import assert_same, delta, kohya_file, random_lora, torch_layout
from test_formats_parameter_names import torch_expected

from sdjax import lora
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.formats.parameter_names import module_name
from sdjax.trees import layers, nest

SETS = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "transformer": ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "proj_out"),
    "convolutions": ("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj", "to_k"),
}
TEXT_SET = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


SDXL_UNET = {
    "block_out_channels": (16, 16, 24),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(scope="module")
def pipelines():
    return {"sd1": pictures.build("sd1"), "sdxl": pictures.build("sdxl", **SDXL_UNET)}


def models(pipeline):
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def model_trees(pipeline):
    return {name: torch_expected(model) for name, model in models(pipeline).items()}


def adapted_kernels(trees, which):
    """Path -> shape of the kernels of one of the SETS, and of TEXT_SET in text models."""
    ends = tuple(name.replace(".", "_") for name in SETS[which])
    return {
        path: layer["kernel"].shape
        for path, layer in layers(trees, "kernel")
        if (path[-1] in TEXT_SET if path[0] != "unet" else path[-1] in ends)
    }


def effective(pipeline):
    """(part, name of the module) -> change of the weight and DoRA's magnitude, as peft computes them."""
    changes = {}
    for part, model in models(pipeline).items():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                path = name.removeprefix("text_model.")
                change = module.get_delta_weight("default").detach().numpy()
                vectors = module.lora_magnitude_vector
                magnitude = vectors["default"].weight.detach().numpy() if "default" in vectors else None
                changes[part, path] = (change, magnitude)
    return changes


def by_module(lora):
    """(part, name of the module in PyTorch) -> change of the weight and DoRA's magnitude, of our LoRA tree."""
    return {
        (path[0], module_name(path[1:])): (torch_layout(delta(layer)), layer.get("magnitude"))
        for path, layer in layers(lora, "down")
    }


def assert_effective(pipeline, lora):
    theirs, ours = effective(pipeline), by_module(lora)
    assert theirs.keys() == ours.keys()
    for key, (change, magnitude) in ours.items():
        np.testing.assert_allclose(theirs[key][0], change, rtol=1e-5, atol=1e-6, err_msg=str(key))
        assert (magnitude is None) == (theirs[key][1] is None)
        if magnitude is not None:
            np.testing.assert_allclose(theirs[key][1].reshape(-1), magnitude, rtol=1e-6)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", SETS)
@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_what_we_write(tmp_path, pipelines, kind, style, which):
    pipeline = pipelines[kind]
    trees = model_trees(pipeline)
    lora = random_lora(adapted_kernels(trees, which), ranks=(4, 2))
    save_lora(tmp_path / "a.safetensors", lora, trees, style=style)
    try:
        pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="default")
        assert_effective(pipeline, lora)
    finally:
        remove_adapters(pipeline)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_our_dora(tmp_path, pipelines, kind):
    """In PEFT's style only: diffusers drops the `dora_scale` of a kohya file."""
    pipeline = pipelines[kind]
    trees = model_trees(pipeline)
    lora = random_lora(adapted_kernels(trees, "attention"), dora=True)
    save_lora(tmp_path / "a.safetensors", lora, trees, style="peft")
    try:
        pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="default")
        assert_effective(pipeline, lora)
    finally:
        remove_adapters(pipeline)


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 8},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"attn1.to_q": 2},
        "alpha_pattern": {"attn2.to_k": 1, "self_attn.q_proj": 2},
    },
    "rsLoRA": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 8, "use_dora": True},
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_we_read_what_diffusers_writes(tmp_path, pipelines, kind, config):
    """peft makes the adapters, and the pipeline saves them with metadata that hold their alpha."""
    import torch
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = pipelines[kind]
    torch.manual_seed(1)
    try:
        states = {}
        for name, model in models(pipeline).items():
            targets = SETS["convolutions" if config != "DoRA" else "attention"] if name == "unet" else TEXT_SET
            config_ = LoraConfig(target_modules=list(targets), init_lora_weights=False, **CONFIGS[config])
            model.add_adapter(config_, adapter_name="default")
            key = "unet_lora_layers" if name == "unet" else f"{name}_lora_layers"
            states[key] = get_peft_model_state_dict(model, adapter_name="default")
        metadata = _collate_lora_metadata(models(pipeline))
        type(pipeline).save_lora_weights(tmp_path, **states, **metadata)
        lora = load_lora(tmp_path, model_trees_without_adapters(pipeline))
        assert_effective(pipeline, lora)
    finally:
        remove_adapters(pipeline)


def remove_adapters(pipeline):
    """Does what unload_lora_weights does, but also works if adding the adapters failed halfway."""
    from diffusers.utils import recurse_remove_peft_layers

    for model in models(pipeline).values():
        recurse_remove_peft_layers(model)
        if hasattr(model, "peft_config"):
            del model.peft_config
        model._hf_peft_config_loaded = False


def model_trees_without_adapters(pipeline):
    """The trees of `model_trees` for a pipeline with adapters, in which peft has moved each layer to `base_layer`."""
    trees = {}
    for name, model in models(pipeline).items():
        flat = {}
        for path, layer in layers(torch_expected(model), "kernel"):
            if not any(part.startswith("lora_") for part in path):
                flat[(*(part for part in path if part != "base_layer"), "kernel")] = layer["kernel"]
        trees[name] = nest(flat)
    return trees


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_kohya_written_by_its_rule_means_the_same_to_diffusers_and_us(tmp_path, pipelines):
    """All modules of kohya's default set, named with underscores for dots."""
    pipeline = pipelines["sd1"]
    table = {}
    for part, model in models(pipeline).items():
        for name, module in model.named_modules():
            plain = name.removeprefix("text_model.")
            ends = SETS["transformer"] if part == "unet" else TEXT_SET
            if plain.endswith(tuple("." + end for end in ends)) and hasattr(module, "weight"):
                shape = tuple(module.weight.shape)
                shape = shape[::-1] if len(shape) == 2 else (*shape[2:], shape[1], shape[0])
                table[part, plain] = (plain, shape)
    tensors, _ = kohya_file(table)
    save_file(tensors, tmp_path / "a.safetensors")
    trees = model_trees(pipeline)
    try:
        pipeline.load_lora_weights(tmp_path / "a.safetensors", adapter_name="default")
        lora = load_lora(tmp_path / "a.safetensors", trees)
        assert len(by_module(lora)) == len(table)
        assert_effective(pipeline, lora)
    finally:
        remove_adapters(pipeline)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_sdxl_names_are_those_of_the_original_unet(tmp_path, pipelines):
    """These names are in SDXL files of kohya's scripts. A file with diffusers' names gives the same LoRA."""
    trees = model_trees(pipelines["sdxl"])
    lora = random_lora(adapted_kernels(trees, "transformer") | adapted_kernels(trees, "convolutions"))
    save_lora(tmp_path / "a.safetensors", lora, trees)
    tensors = load_file(tmp_path / "a.safetensors")
    for name in (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_proj_in",
        "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_output_blocks_5_1_transformer_blocks_0_ff_net_0_proj",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_input_blocks_7_0_skip_connection",
        "lora_unet_middle_block_0_emb_layers_1",
        "lora_unet_middle_block_2_out_layers_3",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_8_0_in_layers_2",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    ):
        assert f"{name}.lora_down.weight" in tensors, name
    assert_same(lora, load_lora(tmp_path / "a.safetensors", trees))
    # The same LoRA with diffusers' names in the U-Net.
    text = {key: value for key, value in tensors.items() if not key.startswith("lora_unet_")}
    unet_only = {"unet": lora["unet"]}
    save_lora(tmp_path / "b.safetensors", unet_only, {"unet": trees["unet"]})
    plain = load_file(tmp_path / "b.safetensors")
    assert any("down_blocks_1_attentions_0" in key for key in plain)
    save_file(plain | text, tmp_path / "c.safetensors")
    assert_same(lora, load_lora(tmp_path / "c.safetensors", trees))


@pytest.mark.parity
@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.parametrize("which", ["attention", "transformer", "all"])
def test_diffusers_loads_our_files(tmp_path, style, which):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    model = oracle.randomised(UNet2DConditionModel(**SD1))
    read = oracle.saved(model, tmp_path / "unet")
    # kohya's LoCon has no modules for layers such as time_emb_proj. Those of transformers and resnets are exported.
    which = ["attentions", "resnets.*/conv", "samplers_0"] if which == "all" else which
    adapter = random_adapter(read.params, which=which, alpha=1.0)
    save_lora(tmp_path / "lora.safetensors", {"unet": adapter}, {"unet": read.params}, style=style)
    tensors, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "lora.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(tensors, alphas, model)
    inputs = inputs_of(SD1)
    out = model(
        *(convert(x) for convert, x in zip((oracle.channels_first, oracle.tensor, oracle.tensor), inputs, strict=False))
    )
    ours = apply(read.module.config, read.params, adapter)
    assert oracle.error(ours, apply(read.module.config, read.params)) > 0.01
    assert oracle.error(ours, oracle.channels_last(out.sample)) <= 1e-4
    again = load_lora(tmp_path / "lora.safetensors", {"unet": read.params})["unet"]
    assert oracle.error(apply(read.module.config, read.params, again), ours) <= 1e-6


def test_alpha_survives_both_styles(tmp_path, base_unet):
    """The change is the same with alpha as a tensor, in the metadata, or folded into the weights."""
    _, params = base_unet
    adapter = random_adapter(params, alpha=1.0)
    for style in ("kohya", "peft"):
        save_lora(tmp_path / f"{style}.safetensors", {"unet": adapter}, {"unet": params}, style=style)
        again = load_lora(tmp_path / f"{style}.safetensors", {"unet": params})["unet"]
        changes = {path: lora.delta(layer) for path, layer in layers(again, "down")}
        for path, layer in layers(adapter, "down"):
            np.testing.assert_allclose(changes[path], lora.delta(layer), rtol=1e-5, atol=1e-7)
