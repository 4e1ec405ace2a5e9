"""Adapters: the formulas of each operation, and forward passes and gradients against PyTorch with peft."""

import functools
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sdjax import lora, trees
from sdjax.errors import ConfigError
from sdjax.formats.lora_file import load_lora, save_lora
from sdjax.models import unet
from sdjax.models.layers import Compute
from sdjax.settings import RematPolicy
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
ATTENTION = r"(to_q|to_k|to_v|to_out_0)$"
CONVOLUTIONS = r"(conv1|conv_shortcut|downsamplers_0/conv|proj_in)$"


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs_of(config, batch=BATCH):
    added = None
    if config.get("addition_embed_type"):
        added = {"text_embeds": normal(4, batch, 6), "time_ids": np.full((batch, 6), 64, np.float32)}
    timesteps = np.linspace(3, 981, batch, dtype=np.float32)
    return normal(1, batch, 8, 8, 4), timesteps, normal(2, batch, 7, config["cross_attention_dim"]), added


@pytest.fixture(scope="module")
def base():
    """A small U-Net with random weights, norms and biases too, of about the size of trained ones."""
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


# A new adapter.


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"which": "all"}, {"which": "transformer", "alpha": 8.0}])
def test_a_new_adapter_changes_no_bit(base, options):
    config, params = base
    adapter = lora.init(jax.random.key(0), params, rank=2, **options)
    np.testing.assert_array_equal(apply(config, params, adapter), apply(config, params))


def test_a_new_dora_changes_nothing(base):
    """Up to rounding, since the norm is divided by itself."""
    config, params = base
    adapter = lora.init(jax.random.key(0), params, rank=2, which="all", dora=True)
    assert oracle.error(apply(config, params, adapter), apply(config, params)) < 1e-6


def test_down_is_normal_with_variance_one_over_rank(base):
    _, params = base
    adapter = lora.init(jax.random.key(0), params, rank=8, which="linear")
    downs = np.concatenate([np.ravel(layer["down"]) for _, layer in trees.layers(adapter, "down")])
    assert abs(downs.std() * math.sqrt(8) - 1) < 0.03
    assert abs(downs.mean()) < 0.02
    assert all((np.asarray(layer["up"]) == 0).all() for _, layer in trees.layers(adapter, "down"))
    again = lora.init(jax.random.key(1), params, rank=8, which="linear")
    first, other = (next(trees.layers(tree, "down"))[1]["down"] for tree in (adapter, again))
    assert not np.array_equal(first, other)


def test_loha_and_lokr_begin_as_in_lycoris():
    """Its distributions: normal with deviations 1, 0.1 and 1 in LoHa; in LoKr uniform within 1 / sqrt(inputs)."""
    params = {"conv": {"kernel": np.zeros((3, 3, 640, 320))}, "to_q": {"kernel": np.zeros((640, 320))}}
    loha = lora.init(jax.random.key(0), params, which="all", rank=16, kind="loha")
    assert {path: leaf.shape for path, leaf in leaves(loha) if path[0] == "conv"} == {
        ("conv", "down"): (3, 3, 640, 16), ("conv", "up"): (16, 320), ("conv", "scale"): (),
        ("conv", "down_2"): (3, 3, 640, 16), ("conv", "up_2"): (16, 320),
    }  # fmt: skip
    for layer in loha.values():
        for name, deviation in {"down": 1.0, "up": 0.1, "down_2": 1.0}.items():
            assert abs(float(layer[name].std()) / deviation - 1) < 0.05
        assert not layer["up_2"].any() and not lora.delta(layer).any() and layer["scale"] == 1
    lokr = lora.init(jax.random.key(0), params, which="all", rank=12, alpha=3.0, kind="lokr", factor=10)
    assert {path: leaf.shape for path, leaf in leaves(lokr) if path[0] == "conv"} == {
        ("conv", "w1"): (10, 10), ("conv", "w2_down"): (3, 3, 64, 12), ("conv", "w2_up"): (12, 32),
        ("conv", "scale"): (),
    }  # fmt: skip
    for layer in lokr.values():
        for name, bound in {"w1": 10**-0.5, "w2_up": 12**-0.5}.items():
            assert 0.9 * bound < float(jnp.abs(layer[name]).max()) <= bound
            assert abs(float(layer[name].std()) / bound * 3**0.5 - 1) < 0.1
        assert not layer["w2_down"].any() and not lora.delta(layer).any() and layer["scale"] == 0.25
    # At half the length of the second factor or more it is whole, and has no scale.
    for rank, whole in {31: False, 32: True}.items():
        layer = lora.init(jax.random.key(0), params, which="all", rank=rank, alpha=1.0, kind="lokr", factor=10)["to_q"]
        assert ("w2" in layer) == whole and (layer["scale"] == 1) == whole
        assert lora.rank(layer) == (None if whole else rank) and lora.form(layer) == lora.kind(layer) == "LoKr"


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (None, {1: (1, 1), 127: (1, 127), 128: (8, 16), 360: (18, 20), 640: (20, 32), 2048: (32, 64)}),
        (8, {127: (1, 127), 250: (5, 50), 320: (8, 40), 768: (8, 96), 6: (2, 3), 4: (2, 2)}),
        (16, {360: (15, 24), 24: (4, 6), 32: (2, 16)}),
    ],
)
def test_the_factors_of_lokr_are_lycoriss(factor, expected):
    """What `factorization` of LyCORIS 4.1.3 returns; it was compared for all sizes up to 3000."""
    assert {size: lora.factors(size, factor) for size in expected} == expected


def test_alpha_and_rslora_set_the_scale(base):
    _, params = base

    def scale(**options):
        return float(next(trees.layers(lora.init(jax.random.key(0), params, rank=4, **options), "down"))[1]["scale"])

    assert scale() == 1.0
    assert scale(alpha=2.0) == 0.5
    assert scale(rslora=True) == 2.0
    assert scale(alpha=3.0, rslora=True) == 1.5


def test_presets_choose_the_layers_they_name(base):
    _, params = base
    chosen = {which: set(lora.targets(params, which)) for which in lora.TARGETS}
    assert chosen["attention"] < chosen["attention+ff"] < chosen["transformer"] < chosen["locon"] < chosen["all"]
    assert chosen["attention+ff"] < chosen["linear"] < chosen["all"]
    assert len(chosen["attention"]) == 4 * 8  # four transformers: one down, one in the middle, two up
    assert all(path[-1].startswith("to_") for path in chosen["attention"])
    assert {path[-1] for path in chosen["transformer"] - chosen["attention+ff"]} == {"proj_in", "proj_out"}
    assert chosen["all"] == {path for path, _ in trees.layers(params, "kernel")}
    assert all(params_at(params, path)["kernel"].ndim == 2 for path in chosen["linear"])


def params_at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def test_kohyas_default_set_on_the_published_model():
    """kohya's set has 192 layers in the U-Net of SD1.5, 128 of them in attention."""
    config = unet.UNetConfig.from_dict({"cross_attention_dim": 768, "in_channels": 4})
    params = unet.abstract_params(config)
    assert len(lora.targets(params, "attention")) == 128
    assert len(lora.targets(params, "transformer")) == 192


def test_layers_of_other_ranks(base):
    _, params = base
    ranks = {"mid_block": 0, "up_blocks_1/.*attn2": 5, "up_blocks": 1}
    adapter = dict(trees.layers(lora.init(jax.random.key(0), params, rank=2, ranks=ranks), "down"))
    assert not any(path[0] == "mid_block" for path in adapter)
    for path, layer in adapter.items():
        expected = 2 if path[0] == "down_blocks_0" else 5 if "attn2" in path else 1
        assert layer["down"].shape[-1] == layer["up"].shape[0] == expected
        assert float(layer["scale"]) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": "attentions"}, "one of attention, attention.ff, transformer, locon, linear, all"),
        ({"which": "conv"}, "'conv': expected 'all', which has the layers that 'conv' had, or 'locon'"),
        ({"which": ["nothing_here$"]}, "matches no layer"),
        ({"which": ["("]}, "no regular expression"),
        ({"ranks": {"mid": -1}}, "rank -1 for mid_block"),
    ],
)
def test_wrong_targets_and_ranks_are_refused(base, options, message):
    with pytest.raises(ConfigError, match=message):
        lora.init(jax.random.key(0), base[1], rank=2, **options)


# Bypass and merge.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"which": "all", "alpha": 1.0},
        {"which": "transformer", "rslora": True},
        {"which": "all", "dora": True},
        {"which": "all", "kind": "loha", "alpha": 6.0},
        {"which": "all", "kind": "lokr", "factor": 2, "rank": 1, "alpha": 3.0, "dora": True},  # factored and whole
    ],
    ids=["attention", "all", "transformer", "dora", "loha", "dora of lokr"],
)
def test_the_bypass_equals_the_merged_kernel(base, options):
    config, params = base
    adapter = random_adapter(params, **options)
    bypass, merged = apply(config, params, adapter), apply(config, lora.merge(params, adapter))
    assert oracle.error(bypass, apply(config, params)) > 0.03
    assert oracle.error(bypass, merged) < 1e-5


def test_merging_is_exact_and_weighted(base):
    _, params = base
    adapter = random_adapter(params, which="all", alpha=1.0)
    merged = lora.merge(params, adapter, 0.5)
    for path, layer in trees.layers(adapter, "down"):
        kernel, down, up = (
            np.asarray(array, np.float64) for array in (params_at(params, path)["kernel"], layer["down"], layer["up"])
        )
        expected = kernel + 0.5 * float(layer["scale"]) * (down.reshape(-1, down.shape[-1]) @ up).reshape(kernel.shape)
        np.testing.assert_allclose(params_at(merged, path)["kernel"], expected, rtol=1e-5, atol=1e-6)
    untouched = dict(leaves(lora.merge(params, adapter, 0.0)))
    for path, leaf in leaves(params):
        np.testing.assert_array_equal(leaf, untouched[path])


def test_merging_keeps_the_dtype_and_refuses_layers_of_another_model(base):
    _, params = base
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge(half, random_adapter(params))
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in leaves(merged))
    with pytest.raises(ConfigError, match="layer the model lacks: elsewhere/to_q"):
        lora.merge(params, {"elsewhere": {"to_q": {"down": 0, "up": 0, "scale": 0}}})


def test_dora_against_numpy(base):
    """Liu et al. 2024, equation 5: each column of W + delta is scaled to its magnitude."""
    _, params = base
    adapter = random_adapter(params, which="all", dora=True, alpha=3.0)
    merged = lora.merge(params, adapter)
    for path, layer in trees.layers(adapter, "down"):
        kernel, down, up = (
            np.asarray(array, np.float64) for array in (params_at(params, path)["kernel"], layer["down"], layer["up"])
        )
        moved = kernel.reshape(-1, kernel.shape[-1]) + float(layer["scale"]) * down.reshape(-1, down.shape[-1]) @ up
        expected = np.asarray(layer["magnitude"]) * moved / np.linalg.norm(moved, axis=0)
        np.testing.assert_allclose(
            np.reshape(params_at(merged, path)["kernel"], moved.shape), expected, rtol=1e-4, atol=1e-6
        )
    start = lora.init(jax.random.key(0), params, rank=2, dora=True)
    for path, layer in trees.layers(start, "down"):
        np.testing.assert_allclose(
            layer["magnitude"], np.linalg.norm(params_at(params, path)["kernel"], axis=0), rtol=1e-5
        )


# Several adapters.


def test_adding_equals_the_sum_of_merges(base):
    config, params = base
    one = random_adapter(params, 1, alpha=1.0)
    two = random_adapter(params, 2, rank=3, which="all")
    both = lora.add([(one, 0.7), (two, -0.4)])
    expected = lora.merge(lora.merge(params, one, 0.7), two, -0.4)
    merged = dict(leaves(lora.merge(params, both)))
    for path, leaf in leaves(expected):
        np.testing.assert_allclose(merged[path], leaf, rtol=1e-5, atol=1e-6)
    assert oracle.error(apply(config, params, both), apply(config, expected)) < 1e-5


def test_dora_layers_add_only_to_trees_without_these_layers(base):
    _, params = base
    dora = random_adapter(params, which=["attn1/to_q$"], dora=True)
    other = random_adapter(params, which=["attn2/to_q$"])
    both = lora.merge(params, lora.add([(dora, 1.0), (other, 0.5)]))
    expected = dict(leaves(lora.merge(lora.merge(params, dora), other, 0.5)))
    for path, leaf in leaves(both):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be added to another adapter"):
        lora.add([(dora, 1.0), (random_adapter(params), 1.0)])
    with pytest.raises(ConfigError, match="cannot be weighted"):
        lora.add([(dora, 0.5)])


def test_a_stack_equals_its_adapters_one_by_one(base):
    """The adapters differ in ranks, targets and scales."""
    config, params = base
    adapters = [
        random_adapter(params, 1, rank=3, alpha=1.0),
        random_adapter(params, 2, which="all"),
        random_adapter(params, 3, rank=1, which=["attn2"]),
    ]
    together = apply(config, params, lora.stack(adapters))
    for i, adapter in enumerate(adapters):
        assert oracle.error(together[i], apply(config, params, adapter)[i]) < 1e-5
    with pytest.raises(ConfigError, match="DoRA layers cannot be stacked"):
        lora.stack([random_adapter(params, dora=True), adapters[0]])


def test_many_adapters_by_vmap(base):
    """One input with a batch of adapter trees, by `jax.vmap`."""
    config, params = base
    adapters = [random_adapter(params, seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    inputs = inputs_of(SD1)
    model = unet.UNet(config)
    out = oracle.quick_jit(jax.vmap(lambda adapter: model.apply({"params": params, "lora": adapter}, *inputs)))(stacked)
    for i, adapter in enumerate(adapters):
        assert oracle.error(out[i], apply(config, params, adapter)) < 1e-5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("lora", {"down", "up", "magnitude"}),
        ("loha", {"down", "up", "down_2", "up_2", "magnitude"}),
        ("lokr", {"w1", "w2", "w2_down", "w2_up", "magnitude"}),
    ],
)
def test_split_and_join_are_inverse(kind, names):
    params = {"mid": {"to_q": {"kernel": jnp.zeros((4, 4))}, "conv": {"kernel": jnp.zeros((3, 3, 32, 32))}}}
    adapter = random_adapter(params, which="all", dora=True, kind=kind, rank=1)
    trained, scales = lora.split(adapter)
    assert {path[-1] for path, _ in leaves(trained)} == names
    assert {path[-1] for path, _ in leaves(scales)} == {"scale"}
    joined = dict(leaves(lora.join(trained, scales)))
    assert joined.keys() == dict(leaves(adapter)).keys()
    for path, leaf in leaves(adapter):
        np.testing.assert_array_equal(joined[path], leaf)


def test_dora_adapters_of_each_example_equal_one_by_one():
    """`stack` refuses DoRA, but a tree with a leading axis works in a layer."""
    x, kernel = jnp.asarray(normal(0, 3, 5, 8)), jnp.asarray(normal(1, 8, 6))
    shapes = {"down": (8, 2), "up": (2, 6), "scale": (), "magnitude": (6,)}
    adapter = {name: jnp.asarray(normal(i, 3, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    together = lora.adapted(adapter, x, x @ kernel, kernel)
    for i in range(3):
        one = {name: leaf[i] for name, leaf in adapter.items()}
        expected = x[i] @ (kernel + lora.delta(one)) * one["magnitude"] / lora.dora_norm(kernel, one)
        assert oracle.error(lora.adapted(one, x[i : i + 1], x[i : i + 1] @ kernel, kernel)[0], expected) < 1e-5
        assert oracle.error(together[i], expected) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dora", [False, True])
def test_ranges_of_the_outputs_have_adapters(kind, dora):
    """LoKr's factors of 9 outputs do not divide into 3 ranges of them at their borders."""
    x, kernel = jnp.asarray(normal(0, 3, 5, 8)), jnp.asarray(normal(1, 8, 12))
    adapter = random_adapter({"to_q": {"kernel": kernel}}, kind=kind, dora=dora, rank=1)["to_q"]
    whole = lora.adapted(adapter, x, x @ kernel, kernel)
    cut = [
        lora.adapted(part, x, x @ piece, piece)
        for part, piece in zip(lora.outputs(adapter, 3), jnp.split(kernel, 3, axis=-1), strict=True)
    ]
    assert oracle.error(jnp.concatenate(cut, axis=-1), whole) < 1e-6
    assert oracle.error(whole, x @ kernel) > 0.01


# Dropout.


def test_dropout_drops_its_rate_and_keeps_the_mean():
    """The adapter of one linear layer passes its input through, so that the output shows what is dropped."""
    width, rate = 64, 0.3
    adapter = {"down": jnp.eye(width), "up": jnp.eye(width), "scale": jnp.float32(1.0)}
    x = jnp.ones((4, 100, width), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)

    def output(x, keys):
        dropped = lora.with_dropout({"layer": adapter}, rate, keys)["layer"]
        return np.asarray(lora.adapted(dropped, x, jnp.zeros_like(x), jnp.zeros((width, width))))

    y = output(x, keys)
    assert set(np.unique(y.round(5))) == {0.0, np.float32(1 / 0.7).round(5)}
    assert abs((y == 0).mean() - rate) < 0.01
    assert abs(y.mean() - 1) < 0.02
    # What is dropped from an example depends on its key only, not on the rest of the batch.
    assert not np.array_equal(y[0], y[1])
    np.testing.assert_array_equal(output(x[2:3], keys[2:3])[0], y[2])


def test_dropout_drops_from_the_adapters_only(base):
    config, params = base
    keys = jax.random.split(jax.random.key(0), BATCH)
    adapter = random_adapter(params)
    whole, none = apply(config, params, adapter), apply(config, params, lora.with_dropout(adapter, 0.0, keys))
    assert oracle.error(none, whole) < 1e-6
    some = apply(config, params, lora.with_dropout(adapter, 0.5, keys))
    assert oracle.error(some, whole) > 0.01
    # With a new adapter, which changes nothing, the output is that of the base model.
    fresh = lora.with_dropout(lora.init(jax.random.key(0), params, rank=2), 0.5, keys)
    np.testing.assert_array_equal(apply(config, params, fresh), apply(config, params))


# Gradients.


@pytest.mark.parametrize("options", [{"kind": "loha"}, {"kind": "lokr"}, {"kind": "lokr", "factor": 2, "rank": 1}])
@pytest.mark.parametrize("shape", [(8, 12), (3, 3, 8, 12)])
def test_gradients_of_other_kinds_are_those_of_the_merged_kernel(options, shape):
    """By central differences of a loss in float64, which NumPy computes from the formula, along random directions."""
    x, kernel, wanted = normal(0, 2, 6, 6, 8), normal(1, *shape), normal(2, 2, 6, 6, 12)
    adapter = random_adapter({"conv": {"kernel": jnp.asarray(kernel)}}, **({"which": "all"} | options))
    trained, scales = lora.split(adapter)

    def apply(x, kernel):
        return x @ kernel if kernel.ndim == 2 else jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )  # fmt: skip

    def loss(trained):
        y = lora.adapted(lora.join(trained, scales)["conv"], x, apply(x, kernel), kernel, apply)
        return jnp.mean(jnp.square(y - wanted))

    def change(parts):
        """LyCORIS' formula."""
        if options["kind"] == "loha":
            return parts["down"] @ parts["up"] * (parts["down_2"] @ parts["up_2"])
        w2 = parts["w2"] if "w2" in parts else parts["w2_down"] @ parts["w2_up"]
        return np.kron(parts["w1"].reshape((1,) * (w2.ndim - 2) + parts["w1"].shape), w2)

    def exact_loss(parts):
        w = kernel.astype(np.float64) + float(scales["conv"]["scale"]) * change(parts)
        if w.ndim == 2:
            y = x @ w
        else:
            padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
            y = sum(padded[:, i : i + 6, j : j + 6] @ w[i, j] for i in range(3) for j in range(3))
        return np.mean((y - wanted) ** 2)

    value, gradient = jax.value_and_grad(loss)(trained)
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in trained["conv"].items()}
    np.testing.assert_allclose(value, exact_loss(exact), rtol=1e-5)
    for i, (name, leaf) in enumerate(exact.items()):
        direction = normal(i, *leaf.shape)
        ends = [exact_loss({**exact, name: leaf + step * direction}) for step in (1e-4, -1e-4)]
        np.testing.assert_allclose(np.vdot(gradient["conv"][name], direction), (ends[0] - ends[1]) / 2e-4, rtol=1e-3)


def gradients(read, adapter, inputs, wanted, *, remat=None):
    """Returns mean((out - wanted)^2), out, and its gradients by the adapter's trained leaves and by the context."""
    model = unet.UNet(read.module.config, Compute(remat=remat))
    trained, scales = lora.split(adapter)
    latents, timesteps, context, added = inputs

    def loss(trained, context):
        out = model.apply(
            {"params": read.params, "lora": lora.join(trained, scales)}, latents, timesteps, context, added
        )
        return jnp.mean(jnp.square(out - wanted)), out

    (value, out), grads = oracle.quick_jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(trained, context)
    return value, out, *grads


def test_remat_changes_no_gradient(base):
    config, params = base
    adapter = random_adapter(params, which="all")
    read = oracle.Read(unet.UNet(config), params)
    compute = functools.partial(gradients, read, adapter, inputs_of(SD1), normal(9, BATCH, 8, 8, 4))
    kept = compute()
    for policy in get_args(RematPolicy):
        for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(compute(remat=policy)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6, err_msg=policy)


KINDS = {
    "attention": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "lora_alpha": 2},
    "convolutions": {"target_modules": ["conv1", "conv_shortcut", "downsamplers.0.conv", "proj_in", "conv_in"]},
    "dora": {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "use_dora": True, "lora_alpha": 6},
    "rslora": {"target_modules": ["to_k", "ff.net.0.proj"], "use_rslora": True},
}


def peft_unet(folder, config, kind):
    """Returns a diffusers U-Net with a random peft adapter, our U-Net and adapter from their files, and `write`.

    write(folder, tensors): our adapter, from a file that diffusers writes of the tensors.
    """
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = oracle.randomised(UNet2DConditionModel(**config))
    read = oracle.saved(model, folder / "unet")
    options = {"r": 4, "lora_alpha": 4, "init_lora_weights": False} | KINDS[kind]
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.3).add_(0.1)
    model.eval()

    def write(folder, tensors):
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(tensors),
            unet_lora_adapter_metadata={key: value for key, value in options.items() if key != "init_lora_weights"},
        )
        return load_lora(folder, {"unet": read.params})["unet"]

    adapter = write(folder / "lora", get_peft_model_state_dict(model))
    return model, read, adapter, write


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_match_peft(tmp_path, family, kind):
    import torch
    from peft.utils import get_peft_model_state_dict

    config = FAMILIES[family]
    model, read, adapter, write = peft_unet(tmp_path, config, kind)
    latents, timesteps, context, added = inputs_of(config)
    wanted = normal(9, BATCH, 8, 8, 4)
    their_context = oracle.tensor(context).requires_grad_()
    out = model(
        oracle.channels_first(latents),
        oracle.tensor(timesteps),
        their_context,
        added_cond_kwargs={name: oracle.tensor(value) for name, value in (added or {}).items()},
    ).sample
    loss = torch.mean((out - oracle.channels_first(wanted)) ** 2)
    loss.backward()

    value, ours, by_adapter, by_context = gradients(read, adapter, (latents, timesteps, context, added), wanted)
    assert oracle.error(ours, oracle.channels_last(out)) <= 1e-4
    assert oracle.error(value, loss.detach()) <= 1e-4
    assert oracle.error(by_context, their_context.grad) <= 1e-3

    # The gradients of peft are written to an adapter file, which we read as one of our trees.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    expected = dict(leaves(lora.split(write(tmp_path / "grad", get_peft_model_state_dict(model)))[0]))
    ours = dict(leaves(by_adapter))
    assert ours.keys() == expected.keys()
    assert len(ours) >= 10
    largest = max(float(np.linalg.norm(leaf)) for leaf in expected.values())
    for path, leaf in expected.items():
        # Relative to the gradient of this layer, unless it is so small that it is rounding of the other gradients.
        difference = np.linalg.norm(np.asarray(ours[path]) - leaf)
        assert difference <= 1e-3 * max(float(np.linalg.norm(leaf)), 1e-4 * largest), "/".join(path)


# Files, through diffusers and back.


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


def test_alpha_survives_both_styles(tmp_path, base):
    """The change is the same with alpha as a tensor, in the metadata, or folded into the weights."""
    _, params = base
    adapter = random_adapter(params, alpha=1.0)
    for style in ("kohya", "peft"):
        save_lora(tmp_path / f"{style}.safetensors", {"unet": adapter}, {"unet": params}, style=style)
        again = load_lora(tmp_path / f"{style}.safetensors", {"unet": params})["unet"]
        changes = {path: lora.delta(layer) for path, layer in trees.layers(again, "down")}
        for path, layer in trees.layers(adapter, "down"):
            np.testing.assert_allclose(changes[path], lora.delta(layer), rtol=1e-5, atol=1e-7)
