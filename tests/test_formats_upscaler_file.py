"""Files of upscalers: every set of names and wrapping gives the structure and the picture that PyTorch makes."""

import jax
import numpy as np
import oracle
import pytest
from upscalers import RRDB, first_names, in_torch, kair_names, random_compact, random_rrdb

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.formats.upscaler_file import read_upscaler
from sdjax.models.layers import Compute
from sdjax.models.upscaler import CompactConfig, RRDBConfig, make_network

same = dict
X4, X2, X1 = RRDB, RRDB | {"blocks": 1, "unshuffle": 2}, RRDB | {"blocks": 1, "unshuffle": 4}
WRAPPINGS = {
    "alone": same,
    "params": lambda tensors: {"params": tensors},
    "params_ema": lambda tensors: {"params": {"other": np.zeros(1, np.float32)}, "params_ema": tensors},
    "state_dict": lambda tensors: {"state_dict": tensors},
    "prefix": lambda tensors: {f"params_ema.{name}": tensor for name, tensor in tensors.items()},
}


def write(path, tensors, wrapping="alone"):
    """Writes a file with torch.save or, for a name in .safetensors, without torch."""
    content = WRAPPINGS[wrapping](tensors)
    if path.suffix == ".safetensors":
        save_safetensors(path, content)
        return path
    import torch

    torch.save(jax.tree.map(torch.from_numpy, content), path)
    return path


def output(config, params, pixels):
    network = make_network(config, Compute(platform="cpu"))
    return oracle.quick_jit(lambda params, pixels: network.apply({"params": params}, pixels))(params, pixels)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("structure", "names", "file", "wrapping"),
    [
        (X4, first_names, "a.pth", "alone"),
        (X4, kair_names, "a.safetensors", "alone"),
        (X4, same, "a.pth", "params_ema"),
        (X2, same, "a.pth", "params"),
        (X1, same, "a.safetensors", "prefix"),
        (RRDB | {"doublings": 1, "blocks": 1}, first_names, "a.pt", "state_dict"),
        (RRDB | {"doublings": 3, "blocks": 1}, first_names, "a.safetensors", "alone"),
        (RRDB | {"doublings": 0, "blocks": 1}, first_names, "a.pth", "alone"),
        (RRDB | {"doublings": 1, "blocks": 1}, kair_names, "a.pth", "alone"),
    ],
)
def test_an_rrdbnet_is_that_of_pytorch(structure, names, file, wrapping, tmp_path):
    """float32, within 1e-5 of the norm. The sides of the picture are no multiples of 2 or 4."""
    tensors = random_rrdb(**structure)
    config, params = read_upscaler(write(tmp_path / file, names(tensors), wrapping))
    assert config == RRDBConfig(**structure)
    pixels = np.random.default_rng(1).random((1, 13, 10, 3), np.float32)
    ours = output(config, params, pixels)
    assert ours.shape == (1, 13 * config.scale, 10 * config.scale, 3)
    theirs = in_torch(tensors, pixels, doublings=structure["doublings"], unshuffle=structure["unshuffle"])
    assert oracle.error(ours, theirs) < 1e-5


@pytest.mark.parity
@pytest.mark.parametrize(("scale", "file", "wrapping"), [(4, "a.pth", "params"), (1, "a.safetensors", "alone")])
def test_a_compact_network_is_that_of_pytorch(scale, file, wrapping, tmp_path):
    """float32, within 1e-5 of the norm."""
    tensors = random_compact(layers=3, scale=scale)
    config, params = read_upscaler(write(tmp_path / file, tensors, wrapping))
    assert config == CompactConfig(features=6, layers=3, scale=scale)
    pixels = np.random.default_rng(1).random((2, 9, 12, 3), np.float32)
    assert oracle.error(output(config, params, pixels), in_torch(tensors, pixels, scale=scale)) < 1e-5


def test_all_names_give_the_same_parameters(tmp_path):
    tensors = random_rrdb(**X4)
    first = read_upscaler(write(tmp_path / "a.safetensors", tensors))
    for names in (kair_names, first_names):
        config, params = read_upscaler(write(tmp_path / f"{names.__name__}.safetensors", names(tensors)))
        assert config == first[0]
        jax.tree.map(np.testing.assert_array_equal, params, first[1])


def without(tensors, part):
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def changed(tensors, name, tensor):
    assert name in tensors
    return tensors | {name: tensor}


zeros = lambda *shape: np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.conv_in.weight": zeros(8, 4, 3, 3)}, "not an upscaler of the ESRGAN family .* it holds unet.conv_in"),
        ({"conv_first.weight": zeros(8, 3, 3, 3), "layers.0.norm.weight": zeros(8)}, "not an upscaler of the ESRGAN"),
        ({"model.0.weight": zeros(8, 3, 3, 3), "model.2.weight": zeros(8)}, "not an upscaler of the ESRGAN"),
        ({"conv_first.weight": zeros(8)}, "not an upscaler of the ESRGAN"),
        (without(random_rrdb(**X4), "rdb2.conv3"), r"does not fit the model: 4 missing: body\.0\.rdb2\.conv3\.bias"),
        (without(random_rrdb(**X4), "conv_hr"), "2 missing: conv_hr"),
        (random_rrdb(**X4) | {"conv1x1.weight": zeros(1, 1, 1, 1)}, "1 not expected: conv1x1.weight"),
        (changed(random_rrdb(**X4), "conv_first.weight", zeros(6, 4, 3, 3)), "its first layer takes 4 channels"),
        (random_rrdb(**X4 | {"doublings": 0, "unshuffle": 2}), "divides sides by 2, then doubles them 0 times"),
        (random_rrdb(**X4 | {"doublings": 5, "blocks": 1}), "enlarges 32 times; expected 1 to 16"),
        (changed(random_compact(), "body.6.weight", zeros(867, 6, 3, 3)), "enlarges 17 times; expected 1 to 16"),
        (changed(random_compact(), "body.0.weight", zeros(0, 3, 3, 3)), "not an upscaler of the ESRGAN family"),
        (changed(random_rrdb(**X4), "conv_hr.bias", zeros(6) + np.nan), "conv_hr.bias holds NaN or Inf"),
        (changed(random_rrdb(**X4), "conv_hr.bias", np.zeros(6, np.int8)), "holds integer weights"),
        (changed(random_compact(), "body.0.weight", zeros(6, 1, 3, 3)), "its first layer takes 1 channels, not 3"),
        (changed(random_compact(), "body.6.weight", zeros(20, 6, 3, 3)), "its last layer gives 20 channels"),
        (without(random_compact(), "body.3"), r"1 missing: body\.3\.weight"),
        (without(random_compact(), "body.1."), "not an upscaler of the ESRGAN family"),
    ],
)
def test_a_file_of_something_else_is_named_in_one_line(tensors, message, tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, tensors)
    with pytest.raises(DataError, match=message) as raised:
        read_upscaler(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"<html>", "not a PyTorch file"),
        ("a.pth", b"", "the file is empty"),
        ("a.onnx", b"x", "not a kind of weight file"),
        ("a.safetensors", b"<html>404", "is a web page"),
    ],
)
def test_a_file_of_another_kind_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_upscaler(tmp_path / name)
