"""CLIP's text transformer (Radford et al. 2021), for SD1, for SD2 (OpenCLIP) and for both text models of SDXL."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from sdjax.errors import ConfigError
from sdjax.models.kernels.attention import attention
from sdjax.models.layers import ACTIVATIONS, Compute, Dense, Embed, LayerNorm, remat


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The options of a text model's `config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2
    projection_dim: int | None = None  # width of the projected pooled vector; None: no projection

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "TextConfig":
        """Reads a transformers `config.json`. Raises ConfigError for an option that sdjax does not compute.

        Only the architecture `CLIPTextModelWithProjection` has a projection.
        """
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise ConfigError(
                f"text model config: model_type = {config['model_type']!r}; only clip_text_model is supported"
            )
        if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
            raise ConfigError(
                f"text model config: hidden_act = {config['hidden_act']!r}; choices: {', '.join(ACTIVATIONS)}"
            )
        values = {field.name: config[field.name] for field in dataclasses.fields(cls) if field.name in config}
        projects = "CLIPTextModelWithProjection" in (config.get("architectures") or ())
        values["projection_dim"] = config.get("projection_dim", 512) if projects else None
        return cls(**values)


class Embeddings(nn.Module):
    """The sum of token and position embeddings."""

    config: TextConfig
    compute: Compute

    @nn.compact
    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config = self.config
        tokens = Embed(config.vocab_size, config.hidden_size, self.compute, name="token_embedding")(ids)
        positions = Embed(config.max_position_embeddings, config.hidden_size, self.compute, name="position_embedding")
        return tokens + positions(jnp.arange(ids.shape[1]))


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Array:
        width = x.shape[-1]
        q, k, v = (
            Dense(width, self.compute, name=name)(x).reshape(*x.shape[:2], self.heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        out = attention(q, k, v, target=self.compute.target, causal=True).reshape(x.shape)
        return Dense(width, self.compute, name="out_proj")(out)


class MLP(nn.Module):
    """Two linear layers with the activation of the config between them."""

    config: TextConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Array:
        hidden = Dense(self.config.intermediate_size, self.compute, name="fc1")(x)
        return Dense(self.config.hidden_size, self.compute, name="fc2")(ACTIVATIONS[self.config.hidden_act](hidden))


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each after a norm and with a residual connection."""

    config: TextConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Array:
        norm = lambda name: LayerNorm(self.compute, self.config.layer_norm_eps, name=name)
        attend = remat(SelfAttention, self.compute, "attention")
        x = x + attend(self.config.num_attention_heads, self.compute, name="self_attn")(norm("layer_norm1")(x))
        return x + MLP(self.config, self.compute, name="mlp")(norm("layer_norm2")(x))


class Encoder(nn.Module):
    """All layers of the transformer. Returns every hidden state, beginning with the embeddings x."""

    config: TextConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], ...]:
        layer = remat(EncoderLayer, self.compute, "blocks", "levels")
        states = [x]
        for i in range(self.config.num_hidden_layers):
            states.append(layer(self.config, self.compute, name=f"layers_{i}")(states[-1]))
        return tuple(states)


class TextModel(nn.Module):
    """Turns token ids into the context that a U-Net attends to, and the pooled vector that SDXL takes besides."""

    config: TextConfig
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B T"], *, clip_skip: int = 1, final_norm: bool = True
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B P"]]:
        """Returns the context and the pooled vector.

        ids: with begin and end tokens; T at most the window. clip_skip: the hidden state that is the context, counted
        from the end: 1 is the last layer, 2 the one before it. final_norm: whether the context passes the final layer
        norm (in SD1 and SD2 it does, in SDXL not).
        The pooled vector is the last layer's state at the end token after the final norm, projected if the model has a
        projection.
        """
        config, compute = self.config, self.compute
        states = Encoder(config, compute, name="encoder")(Embeddings(config, compute, name="embeddings")(ids))
        norm = LayerNorm(compute, config.layer_norm_eps, name="final_layer_norm")
        last = norm(states[-1])
        context = last if clip_skip == 1 and final_norm else states[-clip_skip]
        if final_norm and clip_skip != 1:
            context = norm(context)
        # Configs written before 2023 have eos_token_id = 2, which is wrong: their end token has the largest id of the
        # table. The ids of new words are beyond the table, so they do not count.
        known = jnp.where(ids < config.vocab_size, ids, 0)
        ends = ids == (jnp.max(known, axis=1, keepdims=True) if config.eos_token_id == 2 else config.eos_token_id)
        pooled = jnp.take_along_axis(last, jnp.argmax(ends, axis=1)[:, None, None], axis=1)[:, 0]
        if config.projection_dim is not None:
            pooled = Dense(config.projection_dim, compute, use_bias=False, name="text_projection")(pooled)
        return context, pooled


@functools.cache
def abstract_params(config: TextConfig) -> dict:
    """Returns the shapes of the parameters of a text model, in their tree. Every call returns the same tree."""
    ids = jax.ShapeDtypeStruct((1, config.max_position_embeddings), jnp.int32)
    return jax.eval_shape(TextModel(config).init, jax.random.key(0), ids)["params"]
