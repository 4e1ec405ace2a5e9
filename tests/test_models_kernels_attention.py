"""Attention and its gradients against the definition in float64: ways of the CPU, the TPU kernel, and plain ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from sdjax.models.kernels import attention_cpu, attention_gpu, attention_tpu
from sdjax.models.kernels.attention import attention, by_example, definition
from sdjax.runtime.devices import copies, mesh_of, within

BATCH, QUERIES, KEYS, HEADS, SIZE = 2, 64, 40, 6, 8
HEAD = QUERIES * KEYS
WAYS = {  # scores in a block -> lengths of the loops in the program, innermost first
    "all at once": (BATCH * HEADS * HEAD, []),
    "some heads at a time": (3 * HEAD, ["4"]),
    "some queries at a time": (HEAD // 2, ["2", "12"]),
    "blocks smaller than the smallest allowed": (4 * KEYS, ["1", "12"]),
}


def by_definition(q, k, v, causal=False):
    """Returns the attention, and a function from its gradient to the gradients by q, k and v."""
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bsnd,btnd->bnst", q, k) * scale
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)

    def pull(gradient):
        d_weights = np.einsum("bsnd,btnd->bnst", gradient, v)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
        by_q, by_k = np.einsum("bnst,btnd->bsnd", d_scores, k), np.einsum("bnst,bsnd->btnd", d_scores, q)
        return by_q, by_k, np.einsum("bnst,bsnd->btnd", weights, gradient)

    return np.einsum("bnst,btnd->bsnd", weights, v), pull


def assert_is_attention(attend, dtype, tolerance, loops=None, shape=(BATCH, QUERIES, KEYS, HEADS, SIZE), **options):
    """Compares `attend(q, k, v)` and its gradients with the definition, and the lengths of its loops with `loops`."""
    random = np.random.default_rng(0)
    batch, queries, keys, heads, size = shape
    lengths = (queries, keys, keys, queries)
    arrays = [np.asarray(3 * random.normal(size=(batch, n, heads, size)), dtype) for n in lengths]
    *qkv, gradient = (jax.numpy.asarray(x) for x in arrays)
    if loops is not None:
        assert re.findall(r"\blength=(\d+)", str(jax.make_jaxpr(attend)(*qkv))) == loops
    got, pull = jax.vjp(attend, *qkv)
    expected, pull_exactly = by_definition(*(np.asarray(x, np.float64) for x in qkv), **options)
    exact = (expected, *pull_exactly(np.asarray(gradient, np.float64)))
    for ours, theirs in zip((got, *pull(gradient)), exact, strict=True):
        assert ours.dtype == dtype
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_the_cpu_is_attention(way, dtype, tolerance, monkeypatch):
    block, loops = WAYS[way]
    monkeypatch.setattr(attention_cpu, "BLOCK", block)
    assert_is_attention(lambda q, k, v: attention(q, k, v, target="cpu"), dtype, tolerance, loops)


@pytest.mark.parametrize(("target", "causal"), [("cpu", True), ("gpu", False), ("gpu", True), ("tpu", False)])
def test_attention_without_a_fast_path_is_attention(target, causal):
    assert_is_attention(
        lambda q, k, v: attention(q, k, v, target=target, causal=causal), "float32", 1e-6, [], causal=causal
    )


def test_cudnn_is_left_out_on_gpus_before_ampere(monkeypatch):
    q = jnp.zeros((1, 256, 2, 40), jnp.float16)
    for capability, taken in ((None, True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(attention_gpu, "compute_capability", lambda capability=capability: capability)
        assert attention_gpu.takes(q, q, False) == taken


@pytest.mark.parametrize(("queries", "keys", "causal"), [(64, 77, False), (81, 77, False), (77, 77, True)])
def test_cudnn_gets_even_lengths_and_the_true_ones(queries, keys, causal, monkeypatch):
    """cuDNN itself needs a GPU. JAX's own formula, with the same arguments, stands in for it."""
    attention = jax.nn.dot_product_attention

    def formula(q, k, v, **options):
        assert options.pop("implementation") == "cudnn"
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        return attention(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", formula)
    attend = lambda q, k, v: attention_gpu.attend(q, k, v, causal)
    assert_is_attention(attend, "float32", 5e-6, shape=(2, queries, keys, 2, 8), causal=causal)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "shape", [(1, 512, 512, 1, 160), (1, 512, 1536, 1, 80), (1, 1024, 2048, 1, 64), (2, 512, 512, 2, 40)]
)
def test_the_kernels_of_the_tpu_are_attention(shape, dtype, tolerance):
    """Interpreted; one iteration over the keys, and several of 2 or 4 blocks."""
    with pallas_tpu.force_tpu_interpret_mode():
        assert_is_attention(lambda q, k, v: attention(q, k, v, target="tpu"), dtype, tolerance, shape=shape)


@pytest.mark.parametrize(("batch", "heads", "part"), [(4, 6, (1, 3)), (4, 5, (1, 5)), (3, 6, (3, 3))])
def test_each_device_of_a_mesh_computes_its_examples_and_heads(batch, heads, part):
    mesh, shapes = mesh_of(jax.devices()[:8], fsdp=2, tensor=2), []

    def attend(q, k, v):
        shapes.append((q.shape[0], q.shape[2]))
        return definition(q, k, v, causal=False)

    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(batch, length, heads, SIZE)).astype(np.float32) for length in (8, 6, 6))
    with within(mesh):
        out = jax.jit(lambda *qkv: by_example(attend, *qkv))(*copies(mesh, (q, k, v)))
    assert shapes == [part]
    np.testing.assert_allclose(out, by_definition(q, k, v)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_the_kernels_of_the_tpu_hold_some_keys_at_a_time(parts, monkeypatch):
    """As heads of the size of the autoencoder's make them. A quarter is a single block."""
    monkeypatch.setattr(attention_tpu, "_held", lambda tokens, each: tokens // parts)
    with pallas_tpu.force_tpu_interpret_mode():
        assert_is_attention(
            lambda q, k, v: attention(q, k, v, target="tpu"), "float32", 5e-6, shape=(1, 512, 1024, 1, 40)
        )


@pytest.mark.parametrize("tokens", [512, 1536, 4096, 4608, 9216])
def test_the_keys_that_the_tpu_holds_divide_the_tokens(tokens):
    for each in (512, 3000, 24000):
        held = attention_tpu._held(tokens, each)
        assert tokens % held == held % attention_tpu.KEYS == 0 and held * each <= attention_tpu.HELD
