"""The steps of sampler and trainer at the full size of SD1.5 lower for GPUs and TPUs, on a machine without them.

Nothing is computed. Shapes are traced, and the tests look at the text of the program that would run.
"""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import pytest

from sdjax import lora
from sdjax.diffusion import NoiseSchedule
from sdjax.draw import loop, sampling
from sdjax.draw.conditioning import Condition
from sdjax.model import Model
from sdjax.models import clip, unet, vae
from sdjax.models.layers import Compute
from sdjax.outline import Outline
from sdjax.text.encoding import HiddenState, encode_ids
from sdjax.train.config import Stage
from sdjax.train.optimizers import make_optimizer
from sdjax.train.step import Recipe, init_state, make_train_step

SD15 = unet.UNetConfig.from_dict({"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64})
PLATFORMS = {"cuda": "gpu", "tpu": "tpu"}  # the platform to lower for -> the target of `Compute`
CUDNN, CUDNN_BACKWARD, MOSAIC = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward", "tpu_custom_call"


@pytest.fixture(autouse=True)
def without_devices(monkeypatch):
    """Gives a version of cuDNN, which tracing asks for, and allows JAX's attention to mix dtypes."""
    from jax._src.cudnn import fused_attention_stablehlo

    library = types.SimpleNamespace(cudnn_get_version=lambda: 90800)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", library)
    with jax.numpy_dtype_promotion("standard"):
        yield


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def of_dtype(tree, dtype):
    return jax.tree.map(lambda leaf: shape(*leaf.shape, dtype=dtype), tree)


@functools.cache
def model(platform, dtype):
    """SD1.5 with shapes in place of weights."""
    compute = Compute(dtype=jnp.dtype(dtype), platform=PLATFORMS[platform])
    text = clip.TextConfig(eos_token_id=49407)
    params = {"unet": unet.abstract_params(SD15), "text_encoder": clip.abstract_params(text)}
    outline = Outline(
        unet=unet.UNet(SD15, compute),
        vae=vae.AutoencoderKL(vae.VAEConfig(), compute),
        text_models={"text_encoder": clip.TextModel(text, compute)},
        shapes=of_dtype(params, dtype),
        tokenizers={},
        schedule=NoiseSchedule.from_config({}),
        folder=None,
        name="sd15",
    )
    return Model(outline, outline.shapes)


def kernels(traced, platform):
    """Returns the names of the custom kernels in the program lowered for a platform."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert len(text) > 100_000
    return set(re.findall(r"custom_call @([\w$]+)", text))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_sampler_step_lowers(platform, dtype):
    """512 x 512 pixels, two pictures with guidance."""
    sd = model(platform, dtype)
    batch = 2
    latents = shape(batch, 64, 64, 4)

    def step(variables, state, i, table, keys, guidance):
        denoise = functools.partial(loop.guided_denoise, sd.outline.unet, "epsilon", variables, **guidance)
        return sampling.step(denoise, state, i, table, keys)

    traced = jax.jit(step).trace(
        sd.variables("unet"),
        sampling.State(latents, shape(sampling.HISTORY, *latents.shape)),
        shape(dtype=jnp.int32),
        sampling.tabulate(sd.outline.schedule, "dpmpp_2m", 20),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
        {
            "conditions": (Condition(shape(2 * batch, 77, 768, dtype=dtype), None),),
            "weights": shape(batch, 1),
            "guidance": shape(),
            "rescale": shape(),
        },
    )
    found = kernels(traced, platform)
    if platform == "tpu":
        assert found == {MOSAIC}
    else:
        assert found == ({CUDNN} if dtype == "bfloat16" else set())


@pytest.mark.parametrize(
    ("platform", "dtype"), [*itertools.product(PLATFORMS, ["bfloat16", "float32"]), ("cuda", "float16")]
)
def test_the_train_step_lowers(platform, dtype):
    """A LoRA of the U-Net and the text model with dropout and min-SNR weights; two images of 512 x 512 pixels."""
    sd = model(platform, dtype)
    parts = ("unet", "text_encoder")
    stage = Stage(
        name="style", train=("lora",), steps=10, learning_rate=1e-4, lora_parts=parts, lora_dropout=0.1, min_snr_gamma=5
    )
    recipe = Recipe(sd.outline, stage, make_optimizer(stage, stage.parts), HiddenState(1, final_norm=True))

    def start():
        params = {part: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), sd.params[part]) for part in parts}
        adapters = {part: lora.init(jax.random.key(0), params[part], rank=4) for part in parts}
        trained, scales = ({part: lora.split(tree)[i] for part, tree in adapters.items()} for i in (0, 1))
        return init_state(recipe, trained), {"params": params, "scales": scales, "rows": {}, "numbers": {}}

    state, frozen = jax.eval_shape(start)
    batch = {
        "moments": shape(2, 64, 64, 8),
        "index": shape(2, dtype=jnp.int32),
        "text_encoder": shape(2, 1, 77, dtype=jnp.int32),
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = kernels(jax.jit(make_train_step(recipe)).trace(state, frozen, batch, key), platform)
    if platform == "tpu":
        assert found == {MOSAIC}
    else:
        assert found == (set() if dtype == "float32" else {CUDNN, CUDNN_BACKWARD})


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_other_parts_lower(platform):
    """Encoding prompts and pictures and decoding latents, in bfloat16."""
    sd = model(platform, "bfloat16")
    hidden = HiddenState(1, final_norm=True)
    ids = {"text_encoder": shape(2, 1, 77, dtype=jnp.int32)}
    variables = {name: sd.variables(name) for name in sd.outline.text_models}
    encode = jax.jit(lambda variables, ids: encode_ids(sd.outline.text_models, variables, ids, hidden))
    kernels(encode.trace(variables, ids), platform)
    params = {"vae": of_dtype(vae.abstract_params(sd.outline.vae.config), jnp.bfloat16)}
    with_params = lambda params: dataclasses.replace(sd, params=params)
    encode = jax.jit(lambda params, images: with_params(params).encode_image(images))
    kernels(encode.trace(params, shape(1, 512, 512, 3)), platform)
    decode = jax.jit(lambda params, latents: with_params(params).decode_latents(latents))
    kernels(decode.trace(params, shape(1, 64, 64, 4)), platform)
