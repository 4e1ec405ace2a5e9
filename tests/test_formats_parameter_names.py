"""Names and layouts of PyTorch and of sdjax; loading lists every fault, and loads everything or nothing."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdjax.errors import DataError
from sdjax.formats.parameter_names import load_params, to_state_dict
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.trees import leaves, nest

# Models with every kind of leaf: path -> PyTorch's name, shape in sdjax, shape in PyTorch.

UNET = {
    ("conv_in", "kernel"): ("conv_in.weight", (3, 3, 4, 8), (8, 4, 3, 3)),
    ("conv_in", "bias"): ("conv_in.bias", (8,), (8,)),
    ("time_embedding", "linear_1", "kernel"): ("time_embedding.linear_1.weight", (8, 32), (32, 8)),
    ("down_blocks_0", "resnets_1", "norm1", "scale"): ("down_blocks.0.resnets.1.norm1.weight", (8,), (8,)),
    ("down_blocks_0", "downsamplers_0", "conv", "kernel"): (
        "down_blocks.0.downsamplers.0.conv.weight", (3, 3, 8, 6), (6, 8, 3, 3)),
    ("down_blocks_0", "attentions_0", "proj_in", "kernel"): (
        "down_blocks.0.attentions.0.proj_in.weight", (1, 1, 8, 8), (8, 8, 1, 1)),
    ("mid_block", "attentions_0", "proj_in", "kernel"): ("mid_block.attentions.0.proj_in.weight", (8, 6), (6, 8)),
    ("mid_block", "attentions_0", "transformer_blocks_10", "attn1", "to_out_0", "kernel"): (
        "mid_block.attentions.0.transformer_blocks.10.attn1.to_out.0.weight", (4, 5), (5, 4)),
    ("mid_block", "attentions_0", "transformer_blocks_10", "ff", "net_0", "proj", "kernel"): (
        "mid_block.attentions.0.transformer_blocks.10.ff.net.0.proj.weight", (4, 8), (8, 4)),
    ("mid_block", "attentions_0", "transformer_blocks_10", "ff", "net_2", "bias"): (
        "mid_block.attentions.0.transformer_blocks.10.ff.net.2.bias", (4,), (4,)),
    ("up_blocks_3", "upsamplers_0", "conv", "bias"): ("up_blocks.3.upsamplers.0.conv.bias", (3,), (3,)),
}  # fmt: skip
TEXT = {
    ("embeddings", "token_embedding", "embedding"): ("embeddings.token_embedding.weight", (10, 4), (10, 4)),
    ("encoder", "layers_11", "self_attn", "q_proj", "kernel"): (
        "encoder.layers.11.self_attn.q_proj.weight", (4, 3), (3, 4)),
    ("encoder", "layers_11", "layer_norm1", "scale"): ("encoder.layers.11.layer_norm1.weight", (4,), (4,)),
    ("final_layer_norm", "bias"): ("final_layer_norm.bias", (4,), (4,)),
    ("text_projection", "kernel"): ("text_projection.weight", (4, 2), (2, 4)),
}  # fmt: skip
VAE = {
    ("decoder", "mid_block", "attentions_0", name, leaf): (
        f"decoder.mid_block.attentions.0.{theirs}.{'weight' if leaf == 'kernel' else 'bias'}",
        (4, 4) if leaf == "kernel" else (4,),
        (4, 4) if leaf == "kernel" else (4,),
    )
    for name, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out_0", "to_out.0"))
    for leaf in ("kernel", "bias")
}
TABLES = {"unet": UNET, "text_encoder": TEXT, "vae": VAE}


def expected(table):
    return nest({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, (_, shape, _) in table.items()})


def state_dict(table, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(dtype) for name, _, shape in table.values()}


def load(tensors, table, dtype=jnp.float32, **options):
    return load_params(tensors, expected(table), dtype=dtype, what="x.safetensors", **options)


def torch_expected(model):
    """The tree of shapes of a torch model, derived from the types of its modules, without the code under test."""
    import torch

    flat = {}
    for name, module in model.named_modules():
        path = tuple(re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name.removeprefix("text_model.")).split("."))
        for leaf, tensor in module.named_parameters(recurse=False):
            shape, ours = tuple(tensor.shape), leaf
            if leaf == "weight" and isinstance(module, torch.nn.Linear):
                shape, ours = shape[::-1], "kernel"
            elif leaf == "weight" and isinstance(module, torch.nn.Conv2d):
                shape, ours = (*shape[2:], shape[1], shape[0]), "kernel"
            elif leaf == "weight":
                ours = "embedding" if isinstance(module, torch.nn.Embedding) else "scale"
            flat[(*path, ours)] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nest(flat)


# Names and layouts.


@pytest.mark.parametrize("kind", TABLES)
def test_names_and_layouts_both_ways(kind):
    table = TABLES[kind]
    tensors = state_dict(table)
    params = load(tensors, table)
    flat = dict(leaves(params))
    assert flat.keys() == table.keys()
    for path, (_, shape, _) in table.items():
        assert flat[path].shape == shape
        assert flat[path].dtype == jnp.float32
    back = to_state_dict(params)
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_transposes_are_the_right_ones():
    """Compares single elements, so that two mistakes cannot cancel out."""
    tensors = state_dict(UNET)
    params = load(tensors, UNET)
    conv, linear = tensors["conv_in.weight"], tensors["time_embedding.linear_1.weight"]
    for out, into, row, column in [(0, 1, 2, 0), (7, 3, 0, 1)]:
        assert params["conv_in"]["kernel"][row, column, into, out] == conv[out, into, row, column]
    assert params["time_embedding"]["linear_1"]["kernel"][3, 17] == linear[17, 3]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=hnp.array_shapes(min_dims=4, max_dims=4, max_side=4),
    linear=hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
    prefix=st.sampled_from(["", "text_model."]),
)
def test_round_trip_of_any_sizes(seed, shape, linear, prefix):
    generator = np.random.default_rng(seed)
    params = {
        "down_blocks_12": {"resnets_3": {"conv1": {"kernel": generator.normal(size=shape).astype(np.float32)}}},
        "encoder": {"layers_7": {"mlp": {"fc1": {"kernel": generator.normal(size=linear).astype(np.float32)}}}},
    }
    tensors = to_state_dict(params, prefix=prefix)
    assert tensors.keys() == {
        prefix + "down_blocks.12.resnets.3.conv1.weight",
        prefix + "encoder.layers.7.mlp.fc1.weight",
    }
    back = load_params(tensors, params, dtype=np.float32, what="x")
    for (path, ours), (_, theirs) in zip(leaves(params), leaves(back), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=str(path))


def test_text_keys_with_and_without_prefix_and_position_ids():
    tensors = state_dict(TEXT)
    prefixed = {name if "projection" in name else f"text_model.{name}": array for name, array in tensors.items()}
    prefixed["text_model.embeddings.position_ids"] = np.arange(77)[None]
    assert to_state_dict(load(tensors, TEXT), prefix="text_model.").keys() == prefixed.keys() - {
        "text_model.embeddings.position_ids"
    }
    for (_, plain), (_, other) in zip(leaves(load(tensors, TEXT)), leaves(load(prefixed, TEXT)), strict=True):
        np.testing.assert_array_equal(plain, other)
    both = tensors | {"text_model.final_layer_norm.bias": tensors["final_layer_norm.bias"]}
    with pytest.raises(DataError, match="same parameter twice"):
        load(both, TEXT)


@pytest.mark.parametrize("conv_shaped", [False, True])
def test_old_vae_attention(conv_shaped):
    """Names before diffusers 0.14. The oldest files hold convolutions of 1 x 1."""
    tensors = state_dict(VAE)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {re.sub(r"to_(q|k|v|out\.0)", lambda m: names[m[0]], name): array for name, array in tensors.items()}
    if conv_shaped:
        old = {name: array[:, :, None, None] if array.ndim == 2 else array for name, array in old.items()}
    assert not old.keys() & tensors.keys()
    for (_, new), (_, ours) in zip(leaves(load(tensors, VAE)), leaves(load(old, VAE)), strict=True):
        np.testing.assert_array_equal(new, ours)


def test_one_by_one_convolutions_and_linear_layers_pass_for_each_other():
    tensors = state_dict(UNET)
    swapped = dict(tensors)
    linear, conv = "mid_block.attentions.0.proj_in.weight", "down_blocks.0.attentions.0.proj_in.weight"
    swapped[linear] = tensors[linear][:, :, None, None]
    swapped[conv] = tensors[conv][:, :, 0, 0]
    for (_, one), (_, other) in zip(leaves(load(tensors, UNET)), leaves(load(swapped, UNET)), strict=True):
        np.testing.assert_array_equal(one, other)
    swapped[linear] = np.repeat(swapped[linear], 3, axis=2)
    with pytest.raises(DataError, match="misshapen"):
        load(swapped, UNET)


def test_faults_are_listed_together_before_anything_is_loaded():
    tensors = state_dict(UNET)
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :2]
    del tensors["conv_in.bias"]
    tensors["lora.up"] = np.zeros(1, np.float32)
    with pytest.raises(DataError) as caught:
        load(tensors, UNET)
    message = str(caught.value)
    assert message == (
        "x.safetensors does not fit the model: 1 missing: conv_in.bias; 1 not expected: lora.up; "
        "1 misshapen: conv_in.weight [8, 2, 3, 3] for [3, 3, 4, 8]"
    )


def test_long_lists_are_cut_with_a_count():
    with pytest.raises(DataError, match=r"25 not expected: .*extra9, \.\.\. \(25 in all\)") as caught:
        load(state_dict(UNET) | {f"extra{i}": np.zeros(1, np.float32) for i in range(25)}, UNET)
    assert "extra10" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_inf_are_refused(bad, dtype):
    tensors = state_dict(UNET, dtype=dtype)
    tensors["conv_in.weight"][3, 2, 1, 0] = bad
    with pytest.raises(DataError, match=r"x\.safetensors: conv_in\.weight holds NaN or Inf"):
        load(tensors, UNET)


def test_too_large_for_the_wanted_dtype_is_refused():
    tensors = state_dict(UNET)
    tensors["conv_in.weight"][0, 0, 0, 0] = 1e6
    load(tensors, UNET)
    with pytest.raises(DataError, match=r"NaN or Inf \(as float16\)"):
        load(tensors, UNET, jnp.float16)


def test_integer_weights_are_refused():
    tensors = state_dict(UNET)
    tensors["conv_in.bias"] = np.zeros(8, np.int8)
    with pytest.raises(DataError, match=r"integer weights .*: conv_in\.bias int8"):
        load(tensors, UNET)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_small_dtypes_load(tmp_path, stored, wanted):
    """bfloat16, float16 and float8 are read without torch."""
    tensors = state_dict(UNET, dtype=stored)
    save_safetensors(tmp_path / "a.safetensors", tensors)
    params = load(read_safetensors(tmp_path / "a.safetensors").tensors, UNET, wanted)
    kernel = params["time_embedding"]["linear_1"]["kernel"]
    assert kernel.dtype == wanted
    np.testing.assert_array_equal(kernel, tensors["time_embedding.linear_1.weight"].T.astype(np.float32).astype(wanted))


def test_placement():
    device = jax.devices()[3]
    params = load(state_dict(UNET), UNET, sharding=device)
    assert all(leaf.devices() == {device} for _, leaf in leaves(params))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "x"))
    places = nest({path: split if path == ("conv_in", "kernel") else whole for path in UNET})
    params = load(state_dict(UNET), UNET, sharding=places)
    assert params["conv_in"]["kernel"].sharding == split
    assert params["conv_in"]["kernel"].addressable_shards[2].data.shape == (3, 3, 4, 1)
    for (_, one), (_, other) in zip(leaves(params), leaves(load(state_dict(UNET), UNET)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_loaded_parameters_do_not_hang_on_the_file(tmp_path):
    """They do not use the pages of the file, which may be cut later, nor a host buffer that donation would reuse."""
    path = tmp_path / "a.safetensors"
    tensors = state_dict(UNET)
    save_safetensors(path, tensors)
    params = load(read_safetensors(path).tensors, UNET)
    os.truncate(path, 0)
    np.testing.assert_array_equal(params["conv_in"]["bias"], tensors["conv_in.bias"])
    doubled = jax.jit(lambda p: jax.tree.map(lambda x: x + x, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(doubled["conv_in"]["bias"], 2 * tensors["conv_in.bias"])


def test_host_memory_stays_near_one_copy(tmp_path):
    """100 MiB of float16 become 200 MiB of float32 on the device, here the CPU. One leaf more is 25 MiB."""
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {f"net.{i}.weight": np.ones((2560, 2560), np.float16) for i in range(8)})
    code = f"""
import jax, resource, numpy as np
from sdjax.formats.parameter_names import load_params
from sdjax.formats.safetensors_file import read_safetensors
expected = {{f"net_{{i}}": {{"kernel": jax.ShapeDtypeStruct((2560, 2560), np.float32)}} for i in range(8)}}
def private():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
small = {{"net_0": {{"kernel": jax.ShapeDtypeStruct((1, 1), np.float32)}}}}
load_params({{"net.0.weight": np.ones((1, 1), np.float32)}}, small, dtype=np.float32, what="warm-up")
before = private()
params = load_params(read_safetensors({str(path)!r}).tensors, expected, dtype=np.float32, what="x")
jax.block_until_ready(params)
print(private() - before)
"""
    environment = {**os.environ, "XLA_FLAGS": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert 195 < float(result.stdout) < 250
