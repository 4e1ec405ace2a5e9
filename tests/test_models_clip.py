"""Text models of random small configurations against transformers.

PyTorch's library saves every model, and our reader reads it.
"""

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_configs import FLOAT32, HALF, examples

pytestmark = pytest.mark.parity


@st.composite
def text_configs(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    window = draw(st.sampled_from([16, 77]))
    return {
        "vocab_size": 60,
        "hidden_size": heads * draw(st.sampled_from([4, 8])),
        "intermediate_size": draw(st.sampled_from([12, 32])),
        "num_hidden_layers": draw(st.sampled_from([1, 2, 3])),
        "num_attention_heads": heads,
        "max_position_embeddings": window,
        "hidden_act": draw(st.sampled_from(["quick_gelu", "gelu"])),
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "projection_dim": draw(st.sampled_from([6, 16])),
        # In configs written before 2023, 2 means the largest id.
        "eos_token_id": draw(st.sampled_from([2, 59, 1])),
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def build_text_model(config, projects, seed=0):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projects else CLIPTextModel
    return oracle.randomised(kind(CLIPTextConfig(**config)), seed)


def token_ids(config, seed, batch=3):
    """Returns random words, an end token at another position in each row, then padding."""
    window, end = config["max_position_embeddings"], config["eos_token_id"]
    end = config["vocab_size"] - 1 if end == 2 else end
    ids = np.random.default_rng(seed).integers(3, config["vocab_size"] - 1, (batch, window), dtype=np.int32)
    for row in range(batch):
        ids[row, 4 + 3 * row :] = end  # SD1 pads with the end token, of which only the first counts
    return ids


@examples(12)
@given(config=text_configs(), projects=st.booleans(), seed=st.integers(0, 1000), data=st.data())
def test_text_models(config, projects, seed, data):
    model = build_text_model(config, projects, seed)
    ids = token_ids(config, seed)
    clip_skip = data.draw(st.integers(1, config["num_hidden_layers"]))
    final_norm = data.draw(st.booleans())
    with tempfile.TemporaryDirectory() as folder:
        ours = oracle.saved(model, Path(folder))
    context, pooled = ours(ids, clip_skip=clip_skip, final_norm=final_norm)
    theirs = model(oracle.tensor(ids).long(), output_hidden_states=True)
    hidden = theirs.hidden_states[-clip_skip]
    if final_norm:
        hidden = getattr(model, "text_model", model).final_layer_norm(hidden)
    assert oracle.error(context, hidden) <= FLOAT32
    assert oracle.error(pooled, theirs.text_embeds if projects else theirs.pooler_output) <= FLOAT32


@pytest.mark.parametrize("projects", [False, True])
def test_a_text_model_in_half_precision(tmp_path, projects):
    config = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "eos_token_id": 59, "projection_dim": 16, "max_position_embeddings": 77,
    }  # fmt: skip
    model = build_text_model(config, projects)
    model.save_pretrained(tmp_path)
    ids = token_ids(config, 0)
    theirs = model(oracle.tensor(ids).long())
    for dtype, bound in HALF.items():
        context, pooled = oracle.read_model(tmp_path, dtype=dtype)(ids)
        assert context.dtype == pooled.dtype == dtype
        assert oracle.error(context.astype(jnp.float32), theirs.last_hidden_state) <= bound
        expected = theirs.text_embeds if projects else theirs.pooler_output
        assert oracle.error(pooled.astype(jnp.float32), expected) <= bound
