"""Resizing, summing and extracting: each result is the nearest adapter of its rank, by NumPy's own decomposition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.lora import low_rank
from sdjax.lora.low_rank import Limit
from sdjax.trees import layers, nest

SHAPES = {("unet", "a", "to_q"): (12, 8), ("unet", "b", "conv"): (3, 3, 4, 8), ("text_encoder", "c", "fc1"): (6, 24)}


def model(seed=0):
    random = np.random.default_rng(seed)
    flat = {(*path, "kernel"): random.normal(size=shape) for path, shape in SHAPES.items()}
    return jax.tree.map(lambda leaf: leaf.astype(np.float32), nest(flat))


def adapter(rank=3, *, seed=1, dora=False):
    """A random LoRA of every layer. Its scale is not 1."""
    random = np.random.default_rng(seed)
    flat = {}
    for path, shape in SHAPES.items():
        flat[*path, "down"] = random.normal(size=(*shape[:-1], rank)).astype(np.float32)
        flat[*path, "up"] = random.normal(size=(rank, shape[-1])).astype(np.float32)
        flat[*path, "scale"] = np.float32(0.7)
        if dora:
            flat[*path, "magnitude"] = random.uniform(0.5, 2, shape[-1]).astype(np.float32)
    return nest(flat)


def change(base, tree, weight=1.0):
    """Path of a layer -> what a LoRA of any kind changes, as a matrix in float64, by merging."""
    merged = dict(layers(lora.merge(jax.tree.map(jnp.asarray, base), tree, weight), "kernel"))
    kernels = dict(layers(base, "kernel"))
    matrix = lambda kernel: np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
    return {path: matrix(merged[path]["kernel"]) - matrix(kernels[path]["kernel"]) for path in kernels}


def product(layer):
    """The change of a plain LoRA, as a matrix in float64."""
    down, up = (np.asarray(layer[name], np.float64) for name in ("down", "up"))
    return float(layer["scale"]) * down.reshape(-1, down.shape[-1]) @ up


def assert_nearest(found, changes, rank):
    """Every layer has this rank and misses what NumPy's singular values say, and the errors state it."""
    lost = whole = 0.0
    for path, layer in layers(found.adapters, "down"):
        assert layer["down"].shape[-1] == min(rank, *changes[path].shape)
        left = np.square(np.linalg.svd(changes[path], compute_uv=False)[rank:]).sum()
        missing = np.square(changes[path] - product(layer)).sum()
        np.testing.assert_allclose(missing, left, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(found.lost[path], left, rtol=1e-4, atol=1e-8)
        lost, whole = lost + left, whole + np.square(changes[path]).sum()
    np.testing.assert_allclose(found.error, np.sqrt(lost / whole), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_resizing_gives_the_nearest_of_the_rank(rank):
    """Of a layer of rank 3: also a rank above it, which loses nothing."""
    tree = adapter()
    found = low_rank.combined(model(), [(tree, 1.0)], Limit(rank))
    changes = {path: product(layer) for path, layer in layers(tree, "down")}
    assert_nearest(found, changes, min(rank, 3))
    worst, share = found.worst
    assert share == max(np.sqrt(found.lost[p] / found.norms[p]) for p in changes) and worst in changes


def test_a_sum_of_loras_and_of_other_kinds_is_resized():
    """A DoRA and a full difference enter with the change that merging them makes."""
    base = model()
    one, two = adapter(2), adapter(2, seed=2, dora=True)
    random = np.random.default_rng(3)
    full = nest({
        (*path, name): random.normal(size=shape).astype(np.float32) if name == "diff" else np.float32(1)
        for path, shape in SHAPES.items() for name in ("diff", "scale")
    })  # fmt: skip
    weighted = [(one, 0.5), (two, -0.3), (full, 2.0)]
    found = low_rank.combined(base, weighted, Limit(2))
    parts = [change(base, tree, weight) for tree, weight in weighted]
    assert_nearest(found, {path: sum(part[path] for part in parts) for path in SHAPES}, 2)
    with pytest.raises(ConfigError, match="DoRA, full difference is no plain LoRA: give --rank"):
        low_rank.combined(base, weighted, None)


def test_a_sum_without_a_limit_is_exact():
    one, two = adapter(2), adapter(4, seed=2)
    found = low_rank.combined(model(), [(one, 0.5), (two, 1.5)], None)
    for path, layer in layers(found.adapters, "down"):
        assert layer["down"].shape[-1] == 6
        expected = 0.5 * product(dict(layers(one, "down"))[path]) + 1.5 * product(dict(layers(two, "down"))[path])
        np.testing.assert_allclose(product(layer), expected, rtol=1e-5, atol=1e-6)
    assert found.error == 0.0


def test_ratio_and_energy_choose_the_rank_of_each_layer():
    values = np.array([8.0, 4.0, 1.0, 0.5])
    assert Limit(ratio=2).choose(values) == 2
    assert Limit(ratio=1).choose(values) == 1
    assert Limit(ratio=100).choose(values) == 4
    assert Limit(ratio=100, rank=3).choose(values) == 3
    squares = np.square(values) / np.square(values).sum()
    assert Limit(energy=float(squares[:2].sum())).choose(values) == 2
    assert Limit(energy=float(squares[:2].sum()) + 1e-6).choose(values) == 3
    assert Limit(energy=1.0).choose(values) == 4
    assert Limit(energy=0.9).choose(np.zeros(3)) == 1


def test_merging_and_then_extracting_gives_the_lora_back():
    base, tree = model(), adapter(2)
    tuned = lora.merge(jax.tree.map(jnp.asarray, base), tree)
    found = low_rank.extract(tuned, base, Limit(2), which=["."])
    assert found.error < 1e-6  # what the sum with the base rounds away
    for path, layer in layers(found.adapters, "down"):
        np.testing.assert_allclose(product(layer), product(dict(layers(tree, "down"))[path]), atol=1e-5)


def test_extracting_at_a_lower_rank_gives_the_nearest_and_leaves_out_parts_that_are_the_same():
    base = model()
    tuned = {**base, "unet": jax.tree.map(lambda leaf: leaf + np.float32(0.1) * np.flip(leaf), base["unet"])}
    found = low_rank.extract(tuned, base, Limit(3), which=["."])
    assert list(found.adapters) == ["unet"]
    kernels, others = dict(layers(base, "kernel")), dict(layers(tuned, "kernel"))
    difference = lambda path: np.float64(others[path]["kernel"]) - np.float64(kernels[path]["kernel"])
    changes = {path: difference(path).reshape(-1, SHAPES[path][-1]) for path in SHAPES if path[0] == "unet"}
    assert_nearest(found, changes, 3)


def test_the_norm_of_a_lora():
    for path, layer in layers(adapter(), "down"):
        np.testing.assert_allclose(low_rank.norm(layer), np.linalg.norm(product(layer)), rtol=1e-6, err_msg=str(path))


def test_biases_and_norms_are_left_out_with_a_warning(caplog):
    base = model()
    base["unet"]["a"]["to_q"]["bias"] = np.zeros(8, np.float32)
    tree = adapter()
    tree["unet"]["a"]["to_q"]["bias"] = np.ones(8, np.float32)
    found = low_rank.combined(base, [(tree, 1.0)], Limit(3))
    assert "1 changes of biases and norms are left out" in caplog.text
    assert all(layer.keys() == {"down", "up", "scale"} for _, layer in layers(found.adapters, "down"))


@pytest.mark.parametrize(("decay", "excess"), [("noise", 0.03), ("slow", 1e-3), ("rank 5", 0.0)])
def test_of_a_large_layer_only_the_leading_part_is_decomposed(monkeypatch, decay, excess):
    random, size = np.random.default_rng(0), (96, 160)
    left, right = (np.linalg.qr(random.normal(size=(side, 96)))[0] for side in size)
    values = {"noise": random.uniform(0.9, 1.1, 96), "slow": np.arange(1, 97) ** -0.7, "rank 5": np.arange(96) < 5}
    kernel = ((left * values[decay]) @ right.T).astype(np.float32)
    tuned, base = ({"unet": {"to_q": {"kernel": each}}} for each in (kernel, np.zeros_like(kernel)))
    shapes, decompose = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda a, **how: shapes.append(a.shape) or decompose(a, **how))
    found = low_rank.extract(tuned, base, Limit(rank=8))
    assert shapes == [(8 + low_rank._MORE, 160)]
    path = ("unet", "to_q")
    missing = np.square(kernel - product(dict(layers(found.adapters, "down"))[path]), dtype=np.float64).sum()
    least = np.square(np.sort(values[decay])[:-8].astype(np.float64)).sum()
    assert least * (1 - 1e-4) - 1e-8 <= missing <= least * (1 + excess) + 1e-8
    assert found.lost[path] == pytest.approx(missing, rel=1e-4, abs=1e-5)
    monkeypatch.setattr(np.linalg, "svd", decompose)
    exact = low_rank.extract(tuned, base, Limit(rank=8, ratio=1e9))  # another limit, which needs all values
    np.testing.assert_allclose(exact.lost[path], least, rtol=1e-4, atol=1e-8)
