"""A small U-Net, its inputs, and random adapters of it, for the tests of LoRA."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle

from sdjax import lora, trees
from sdjax.models import unet
from sdjax.models.layers import Compute
from sdjax.trees import leaves

SD1 = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "in_channels": 4,
}
SDXL = SD1 | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 30,
}
FAMILIES = {"sd1": SD1, "sdxl": SDXL}
BATCH = 3


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs_of(config, batch=BATCH):
    added = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": normal(4, batch, 6), "time_ids": np.full((batch, 6), 64, np.float32)}
    timesteps = np.linspace(3, 981, batch, dtype=np.float32)
    return normal(1, batch, 8, 8, 4), timesteps, normal(2, batch, 7, config["cross_attention_dim"]), added


def base_unet():
    """The configuration and parameters of a small U-Net. Norms and biases are random too, not 1 and 0."""
    config = unet.UNetConfig.from_dict(SD1)
    shapes = unet.abstract_params(config)
    params = {}
    for i, (path, leaf) in enumerate(leaves(shapes)):
        drawn = normal(i, *leaf.shape)
        params[path] = jnp.asarray(
            drawn / math.sqrt(math.prod(leaf.shape[:-1]))
            if len(leaf.shape) > 1
            else (path[-1] == "scale") + 0.2 * drawn
        )
    return config, trees.nest(params)


@functools.cache
def program():
    """The forward pass. It is compiled once for all adapters of the same layers and ranks, so tests share those."""
    return oracle.quick_jit(lambda model, variables, inputs: model.apply(variables, *inputs), static_argnums=0)


def apply(config, params, adapter=None):
    variables = {"params": params} | ({} if adapter is None else {"lora": adapter})
    return program()(unet.UNet(config), variables, inputs_of(SD1))


def random_adapter(params, seed=0, **options):
    """An adapter that changes the model: what begins at 0 is random, and a magnitude differs from the base's norm."""
    start = lora.init(jax.random.key(seed), params, **({"rank": 2, "which": "attention"} | options))

    def filled(adapter):
        zeros = next(name for name in ("up_2", "w2", "w2_down", "up") if name in adapter)
        key = jax.random.fold_in(jax.random.key(seed + 1), adapter[zeros].size)
        filled = adapter | {zeros: 0.1 * jax.random.normal(key, adapter[zeros].shape, jnp.float32)}
        if "magnitude" in adapter:
            filled["magnitude"] = 1.3 * adapter["magnitude"] + 0.1
        return filled

    return lora.map_layers(filled, start)


def params_at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def gradients(read, adapter, inputs, wanted, *, remat=None):
    """Returns mean((out - wanted)^2), out, and its gradients by the adapter's trained leaves and by the context."""
    model = unet.UNet(read.module.config, Compute(remat=remat))
    trained, scales = lora.split(adapter)
    latents, timesteps, context, added = inputs

    def loss(trained, context, params):
        variables = {"params": params, "lora": lora.join(trained, scales)}
        out = model.apply(variables, latents, timesteps, context, added)
        return jnp.mean(jnp.square(out - wanted)), out

    program = oracle.quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, out), grads = program(trained, context, read.params)
    return value, out, *grads
