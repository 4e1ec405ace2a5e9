"""New adapters: how they begin, and which layers get one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adapters import apply, params_at

from sdjax import lora, trees
from sdjax.errors import ConfigError
from sdjax.models import unet
from sdjax.trees import leaves


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"which": "all"}, {"which": "transformer", "alpha": 8.0}])
def test_a_new_adapter_changes_no_bit(base_unet, options):
    config, params = base_unet
    adapter = lora.init(jax.random.key(0), params, rank=2, **options)
    np.testing.assert_array_equal(apply(config, params, adapter), apply(config, params))


def test_a_new_dora_changes_nothing(base_unet):
    """Up to rounding, since the norm is divided by itself."""
    config, params = base_unet
    adapter = lora.init(jax.random.key(0), params, rank=2, which="all", dora=True)
    assert oracle.error(apply(config, params, adapter), apply(config, params)) < 1e-6


def test_down_is_normal_with_variance_one_over_rank(base_unet):
    _, params = base_unet
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


def test_alpha_and_rslora_set_the_scale(base_unet):
    _, params = base_unet

    def scale(**options):
        return float(next(trees.layers(lora.init(jax.random.key(0), params, rank=4, **options), "down"))[1]["scale"])

    assert scale() == 1.0
    assert scale(alpha=2.0) == 0.5
    assert scale(rslora=True) == 2.0
    assert scale(alpha=3.0, rslora=True) == 1.5


def test_presets_choose_the_layers_they_name(base_unet):
    _, params = base_unet
    chosen = {which: set(lora.targets(params, which)) for which in lora.TARGETS}
    assert chosen["attention"] < chosen["attention+ff"] < chosen["transformer"] < chosen["locon"] < chosen["all"]
    assert chosen["attention+ff"] < chosen["linear"] < chosen["all"]
    assert len(chosen["attention"]) == 4 * 8  # four transformers: one down, one in the middle, two up
    assert all(path[-1].startswith("to_") for path in chosen["attention"])
    assert {path[-1] for path in chosen["transformer"] - chosen["attention+ff"]} == {"proj_in", "proj_out"}
    assert chosen["all"] == {path for path, _ in trees.layers(params, "kernel")}
    assert all(params_at(params, path)["kernel"].ndim == 2 for path in chosen["linear"])


def test_kohyas_default_set_on_the_published_model():
    """kohya's set has 192 layers in the U-Net of SD1.5, 128 of them in attention."""
    config = unet.UNetConfig.from_dict({"cross_attention_dim": 768, "in_channels": 4})
    params = unet.abstract_params(config)
    assert len(lora.targets(params, "attention")) == 128
    assert len(lora.targets(params, "transformer")) == 192


def test_layers_of_other_ranks(base_unet):
    _, params = base_unet
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
def test_wrong_targets_and_ranks_are_refused(base_unet, options, message):
    with pytest.raises(ConfigError, match=message):
        lora.init(jax.random.key(0), base_unet[1], rank=2, **options)
