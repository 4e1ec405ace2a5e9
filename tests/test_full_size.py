"""The published sizes, with random weights: the parts of SD1.5, SD2.1, SDXL and its refiner, beside PyTorch.

These tests run only with `python -m pytest -m slow -s tests/test_full_size.py`. SDXL's U-Net takes 13 GB of memory and
13 GB of disk. PyTorch and sdjax run one after the other, each in a new process, so that memory holds one model.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import oracle
import peft_gradients
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.parity]

FLOAT32, BFLOAT16, GRADIENT = 1e-4, 3e-2, 1e-3

UNETS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
    "sdxl refiner": {
        "sample_size": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    },
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}
VAES = {
    "sd": VAE | {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": VAE | {"sample_size": 1024, "scaling_factor": 0.13025},
}
TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 49407}
TEXTS = {
    "sd15 and sdxl": TEXT | {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                             "num_attention_heads": 12, "hidden_act": "quick_gelu", "projection_dim": 768},
    "sd21": TEXT | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                    "num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 512},
    "sdxl 2": TEXT | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280},
}  # fmt: skip


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def unet_inputs(config):
    size = 16 if "block_out_channels" in config else 32
    added = None
    if "addition_embed_type" in config:
        ids = np.array([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 0, 64, 512, 768]], np.float32)
        if config["projection_class_embeddings_input_dim"] == 1280 + 5 * config["addition_time_embed_dim"]:
            ids = np.array([[1024, 1024, 0, 0, 6], [512, 768, 0, 64, 2.5]], np.float32)  # the refiner's aesthetic score
        added = {"text_embeds": normal(1, 2, 1280), "time_ids": ids}
    timesteps = np.array([17, 801], np.float32)
    return normal(2, 2, size, size, 4), timesteps, normal(3, 2, 77, config["cross_attention_dim"]), added


def token_ids():
    ids = np.random.default_rng(0).integers(1, 49406, (2, 77), dtype=np.int32)
    ids[:, 0], ids[0, 9:], ids[1, 76:] = 49406, 49407, 49407
    return ids


# In a process with PyTorch: each function saves a random model and returns its outputs.


def run_unet(config, folder):
    from diffusers import UNet2DConditionModel

    model = oracle.randomised(UNet2DConditionModel(**config))
    model.save_pretrained(folder, max_shard_size="1GB")
    latents, timesteps, context, added = unet_inputs(config)
    out = model(
        oracle.channels_first(latents),
        oracle.tensor(timesteps),
        oracle.tensor(context),
        added_cond_kwargs={name: oracle.tensor(value) for name, value in (added or {}).items()},
    )
    return [oracle.channels_last(out.sample)]


def run_vae(config, folder):
    from diffusers import AutoencoderKL

    model = oracle.randomised(AutoencoderKL(**config))
    model.save_pretrained(folder)
    moments = model.encode(oracle.channels_first(np.tanh(normal(0, 1, 128, 192, 3)))).latent_dist.parameters
    decoded = model.decode(oracle.channels_first(normal(1, 1, 16, 24, 4))).sample
    return [oracle.channels_last(moments), oracle.channels_last(decoded)]


def run_text(config, folder):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    projects = config["hidden_size"] == 1280
    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    model = oracle.randomised(kind(CLIPTextConfig(**config)))
    model.save_pretrained(folder, max_shard_size="1GB")
    out = model(oracle.tensor(token_ids()).long(), output_hidden_states=True)
    pooled = out.text_embeds if projects else out.pooler_output
    return [array.numpy() for array in (out.last_hidden_state, pooled, out.hidden_states[-2])]


def run_lora(config, folder):
    from diffusers import UNet2DConditionModel

    model = oracle.randomised(UNet2DConditionModel(**config))
    model.save_pretrained(folder, max_shard_size="1GB")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inputs, wanted = unet_inputs(config), normal(4, *unet_inputs(config)[0].shape)
    return peft_gradients.by_torch(model, folder, inputs, wanted, target_modules=targets)


# In a process with JAX: the model is read and computed by sdjax, and the errors are returned.


def our_errors(kind, config, folder, expected, dtype):
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    module, params = oracle.read_model(folder, dtype=dtype)

    def ours(*inputs, **options):
        return jax.jit(lambda params, *inputs: module.apply({"params": params}, *inputs, **options))(params, *inputs)

    if kind == "unet":
        outputs = [ours(*unet_inputs(config))]
    elif kind == "vae":
        outputs = [
            ours(np.tanh(normal(0, 1, 128, 192, 3)), method="encode"),
            ours(normal(1, 1, 16, 24, 4), method="decode"),
        ]
    else:
        context, pooled = ours(token_ids())
        outputs = [context, pooled, ours(token_ids(), clip_skip=2, final_norm=False)[0]]
    return [oracle.error(output, reference) for output, reference in zip(outputs, expected, strict=True)]


def lora_errors(config, folder, expected):
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    inputs, wanted = unet_inputs(config), normal(4, *unet_inputs(config)[0].shape)
    return peft_gradients.errors(oracle.read_model(folder), folder, inputs, wanted, expected)


def alone(function, *args):
    """The result of a function, computed in a process that ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("text", name) for name in TEXTS), *(("vae", name) for name in VAES), *(("unet", name) for name in UNETS)],
)
def test_full_size(tmp_path, kind, name):
    run, configs = {"unet": (run_unet, UNETS), "vae": (run_vae, VAES), "text": (run_text, TEXTS)}[kind]
    config = configs[name]
    expected = alone(run, config, tmp_path)
    try:
        for dtype, bound in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            errors = alone(our_errors, kind, config, tmp_path, expected, dtype)
            print(f"{kind} {name} {dtype}: {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
            assert max(errors) <= bound
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()


@pytest.mark.parametrize("name", UNETS)
def test_gradients_at_full_size(tmp_path, name):
    """Of a LoRA on the attention layers, and of the context, through which a new word is trained."""
    expected = alone(run_lora, UNETS[name], tmp_path)
    try:
        errors = alone(lora_errors, UNETS[name], tmp_path, expected)
        print(f"lora {name}: {', '.join(f'{part} {error:.1e}' for part, error in errors.items())}", flush=True)
        assert max(errors["loss"], errors["out"]) <= FLOAT32
        assert max(errors["by_context"], errors["by_adapter"]) <= GRADIENT
    finally:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
