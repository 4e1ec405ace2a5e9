"""Where each array of a model lies on a mesh."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sdjax import lora
from sdjax.outline import Outline
from sdjax.runtime.devices import mesh_of
from sdjax.train import partition
from sdjax.train.partition import spec, written


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(jax.devices()[:8], fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def shapes(micro_models):
    return Outline.load(micro_models(), weights=False).shapes


def specs(tree, mesh):
    return {written(path): spec(written(path), leaf.shape, mesh) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("unet/attn1/to_q/kernel", (320, 640), P("fsdp", "tensor")),
        ("unet/attn1/to_q/kernel", (8, 320, 640), P(None, "fsdp", "tensor")),  # of copies
        ("unet/attn2/to_out_0/kernel", (320, 640), P("tensor", "fsdp")),
        ("unet/attn1/to_q/up_2", (4, 640), P("fsdp", "tensor")),
        ("unet/attn2/to_out_0/down_2", (320, 4), P("tensor", "fsdp")),
        ("unet/attn1/to_q/w2_up", (4, 32), P(None, "fsdp")),  # whose columns are not the layer's outputs
        ("unet/attn2/to_out_0/bias", (640,), P("fsdp")),
        ("text_encoder/layers_0/self_attn/out_proj/kernel", (64, 64), P("tensor", "fsdp")),
        ("unet/ff/net_0/proj/kernel", (64, 640), P(None, "fsdp")),
        ("unet/down_blocks_0/resnets_0/conv1/kernel", (3, 3, 64, 64), P(None, None, "fsdp", "tensor")),
        ("unet/down_blocks_0/resnets_0/conv2/kernel", (3, 3, 64, 64), P(None, None, "tensor", "fsdp")),
        ("unet/down_blocks_0/resnets_0/norm1/scale", (64,), P("fsdp")),
        ("unet/down_blocks_0/resnets_0/norm2/scale", (64,), P("tensor")),
        ("unet/attentions_0/transformer_blocks_0/norm2/scale", (64,), P("fsdp")),
        ("unet/conv_in/kernel", (3, 3, 4, 63), P(None, None, "fsdp")),
        ("vae/mid_block/attentions_0/to_q/kernel", (512, 512), P("fsdp")),  # one head
        ("text_encoder", (3, 5), P()),
    ],
)
def test_a_layer(mesh, path, shape, expected):
    assert spec(path, shape, mesh) == expected


def test_small_arrays_lie_whole_on_the_devices_of_fsdp(mesh, monkeypatch):
    """Also what the optimizer joins of them, of any size."""
    monkeypatch.setattr(partition, "SMALLEST", 1 << 16)
    assert spec("unet/proj_in/kernel", (256, 256), mesh) == P("fsdp")
    assert spec("unet/proj_in/kernel", (128, 256), mesh) == P()
    assert spec("unet/attn1/to_q/kernel", (128, 256), mesh) == P(None, "tensor")
    assert spec("optimizer/unet/0/mu/matrix/kernel", (1, 1 << 20), mesh_of(jax.devices()[:2], fsdp=2)) == P()


def test_an_axis_of_one_device_splits_nothing():
    mesh = mesh_of(jax.devices()[:2])
    assert spec("unet/attn1/to_q/kernel", (320, 640), mesh) == P()


FIRST = {"to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "fc1", "conv1", "time_emb_proj"}
SECOND = {"to_out_0", "out_proj", "net_2", "fc2", "conv2"}


def of_tensor(tree, mesh):
    """(layer, name) of each array that is split over the axis tensor."""
    return {tuple(path.split("/")[-2:]) for path, where in specs(tree, mesh).items() if "tensor" in where}


def test_the_layers_of_a_model(mesh, shapes):
    expected = {(name, "kernel") for name in FIRST | SECOND} | {(name, "bias") for name in FIRST}
    expected |= {("norm2", "scale"), ("norm2", "bias")}
    assert of_tensor(shapes, mesh) == expected - {(f"to_{name}", "bias") for name in "qkv"}  # which have none
    moments = jax.eval_shape(optax.adam(1e-3).init, shapes)[0].mu
    assert specs(moments, mesh) == specs(shapes, mesh)


def test_an_adapter_lies_where_its_layer_does(mesh, shapes):
    """One half lies with the side of the layer that is split, the other half on all devices."""
    for part in ("unet", "text_encoder"):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[part])
        adapter = jax.eval_shape(
            lambda zeros=zeros: lora.init(jax.random.key(0), zeros, rank=4, which="all", dora=True)
        )
        layers = {name for name, leaf in of_tensor(shapes[part], mesh) if leaf == "kernel"}
        expected = {(name, leaf) for name in layers & FIRST for leaf in ("up", "magnitude")}
        assert of_tensor(adapter, mesh) == expected | {(name, "down") for name in layers & SECOND}
