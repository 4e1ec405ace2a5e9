"""Every way of the CPU's attention against the definition in float64; gradients too."""

import re

import jax
import numpy as np
import pytest

from sdjax.models.kernels import attention_cpu as attention

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 64, 40, 6, 8
HEAD = QUERIES * KEYS
WAYS = {  # scores a block holds -> the loops that makes, innermost first
    "all at once": (BATCH * HEADS * HEAD, []),
    "some heads at a time": (3 * HEAD, ["4"]),
    "some queries at a time": (HEAD // 2, ["2", "12"]),
    "blocks smaller than the least taken": (4 * KEYS, ["1", "12"]),
}


def by_definition(q, k, v):
    """(result, gradients by q, k and v as a function of the result's gradient), heads on the third axis."""
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bsnd,btnd->bnst", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def pull(gradient):
        d_weights = np.einsum("bsnd,btnd->bnst", gradient, v)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
        by_q, by_k = np.einsum("bnst,btnd->bsnd", d_scores, k), np.einsum("bnst,bsnd->btnd", d_scores, q)
        return by_q, by_k, np.einsum("bnst,bsnd->btnd", weights, gradient)

    return np.einsum("bnst,btnd->bsnd", weights, v), pull


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_attention(way, dtype, tolerance, monkeypatch):
    block, loops = WAYS[way]
    monkeypatch.setattr(attention, "BLOCK", block)
    random = np.random.default_rng(0)
    lengths = (QUERIES, KEYS, KEYS, QUERIES)
    arrays = [np.asarray(3 * random.normal(size=(BATCH, n, HEADS, SIZE)), dtype) for n in lengths]
    *qkv, gradient = (jax.numpy.asarray(x) for x in arrays)

    def attend(q, k, v):
        return attention.attention(q, k, v, target="cpu")

    assert re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(attend)(*qkv))) == loops
    got, pull = jax.vjp(attend, *qkv)
    want, pull_exactly = by_definition(*(np.asarray(x, np.float64) for x in qkv))
    exact = (want, *pull_exactly(np.asarray(gradient, np.float64)))
    for ours, theirs in zip((got, *pull(gradient)), exact, strict=True):
        assert ours.dtype == dtype
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs) < tolerance
