"""The formulas of each kind, merging, and gradients: against NumPy, and against PyTorch with peft."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import peft_gradients
import pytest
from adapters import BATCH, FAMILIES, SD1, apply, gradients, inputs_of, normal, params_at, random_adapter

from sdjax import lora, trees
from sdjax.errors import ConfigError
from sdjax.models import unet
from sdjax.settings import RematPolicy
from sdjax.trees import leaves

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
def test_the_bypass_equals_the_merged_kernel(base_unet, options):
    config, params = base_unet
    adapter = random_adapter(params, **options)
    bypass, merged = apply(config, params, adapter), apply(config, lora.merge(params, adapter))
    assert oracle.error(bypass, apply(config, params)) > 0.03
    assert oracle.error(bypass, merged) < 1e-5


def test_merging_is_exact_and_weighted(base_unet):
    _, params = base_unet
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


def test_merging_keeps_the_dtype_and_refuses_layers_of_another_model(base_unet):
    _, params = base_unet
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge(half, random_adapter(params))
    assert all(leaf.dtype == jnp.bfloat16 for _, leaf in leaves(merged))
    with pytest.raises(ConfigError, match="layer the model lacks: elsewhere/to_q"):
        lora.merge(params, {"elsewhere": {"to_q": {"down": 0, "up": 0, "scale": 0}}})


def test_dora_against_numpy(base_unet):
    """Liu et al. 2024, equation 5: each column of W + delta is scaled to its magnitude."""
    _, params = base_unet
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


def test_remat_changes_no_gradient(base_unet):
    config, params = base_unet
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


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_match_peft(tmp_path, family, kind):
    from diffusers import UNet2DConditionModel

    config = FAMILIES[family]
    model = oracle.randomised(UNet2DConditionModel(**config))
    read = oracle.saved(model, tmp_path)
    asked = inputs_of(config), normal(9, BATCH, 8, 8, 4)
    expected = peft_gradients.by_torch(model, tmp_path, *asked, **KINDS[kind])
    errors = peft_gradients.errors(read, tmp_path, *asked, expected)
    assert max(errors["loss"], errors["out"]) <= 1e-4
    assert max(errors["by_context"], errors["by_adapter"]) <= 1e-3
