"""Upscalers for tests: random weights, their names in other programs, and the networks as PyTorch computes them.

Imports torch inside its functions, so that tests without the `parity` mark run without it.
"""

import numpy as np

from sdjax.formats.safetensors_file import save_safetensors

RRDB = {"features": 6, "growth": 4, "blocks": 2, "doublings": 2, "unshuffle": 1}


def random_rrdb(*, features, growth, blocks, doublings, unshuffle, seed=0, gain=1.0):
    """BasicSR's name -> array of an RRDBNet."""
    layers = {"conv_first": (features, 3 * unshuffle**2), "conv_body": (features, features)}
    for block in range(blocks):
        for dense in (1, 2, 3):
            for i in range(1, 6):
                out = growth if i < 5 else features
                layers[f"body.{block}.rdb{dense}.conv{i}"] = (out, features + (i - 1) * growth)
    layers |= {f"conv_up{i}": (features, features) for i in range(1, doublings + 1)}
    layers |= {"conv_hr": (features, features), "conv_last": (3, features)}
    return _random(layers, seed, gain)


def random_compact(*, features=6, layers=2, scale=4, seed=0, gain=1.0):
    """BasicSR's name -> array of an SRVGGNetCompact."""
    widths = [3, *[features] * (layers + 1), 3 * scale**2]
    sizes = {f"body.{2 * i}": (widths[i + 1], widths[i]) for i in range(layers + 2)}
    slopes = np.random.default_rng(seed + 1).uniform(-0.2, 0.5, (layers + 1, features)).astype(np.float32)
    return _random(sizes, seed, gain) | {f"body.{2 * i + 1}.weight": slope for i, slope in enumerate(slopes)}


def _random(layers, seed, gain):
    random, tensors = np.random.default_rng(seed), {}
    for name, (out, channels) in layers.items():
        kernel = gain * random.normal(size=(out, channels, 3, 3)) / (3 * channels**0.5)
        tensors[f"{name}.weight"] = kernel.astype(np.float32)
        tensors[f"{name}.bias"] = (0.1 * random.normal(size=out)).astype(np.float32)
    return tensors


def kair_names(tensors):
    """The tensors of an RRDBNet as ESRGAN's second release, BSRGAN and KAIR name them."""
    parts = {"conv_body": "trunk_conv", "conv_hr": "HRconv", "conv_up": "upconv", "body.": "RRDB_trunk.", "rdb": "RDB"}
    for ours, theirs in parts.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    return tensors


def first_names(tensors):
    """The tensors of an RRDBNet as ESRGAN's first release names them, by their place in a sequence of layers."""
    doublings = sum("conv_up" in name for name in tensors) // 2
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("body.")})
    # Enlarging takes two places, convolution and activation follow; the last layers have one activation between them.
    place = {"conv_first": "0", "conv_body": f"1.sub.{blocks}"}
    place |= {f"conv_up{i}": str(3 * i) for i in range(1, doublings + 1)}
    place |= {"conv_hr": str(3 * doublings + 2), "conv_last": str(3 * doublings + 4)}

    def renamed(name):
        module, leaf = name.rsplit(".", 1)
        if module.startswith("body."):
            _, block, dense, conv = module.split(".")
            return f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{leaf}"
        return f"model.{place[module]}.{leaf}"

    return {renamed(name): tensor for name, tensor in tensors.items()}


def save_compact(path, **structure):
    """Writes a random SRVGGNetCompact as a safetensors file, and returns its path."""
    save_safetensors(path, random_compact(**structure))
    return path


def in_torch(tensors, pixels, *, doublings=2, unshuffle=1, scale=4):
    """The picture [B, H, W, 3] that PyTorch makes with BasicSR's tensors, from the definitions in the papers."""
    import torch
    from torch.nn import functional

    weights = {name: torch.from_numpy(np.array(tensor, np.float32)) for name, tensor in tensors.items()}
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, -1, 1)))
    conv = lambda name, x: functional.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)
    relu = lambda x: functional.leaky_relu(x, 0.2)
    nearest = lambda x, factor: functional.interpolate(x, scale_factor=factor, mode="nearest")

    def dense(name, x):
        maps = [x]
        for i in range(1, 5):
            maps.append(relu(conv(f"{name}.conv{i}", torch.cat(maps, 1))))
        return x + 0.2 * conv(f"{name}.conv5", torch.cat(maps, 1))

    with torch.no_grad():
        if "conv_first.weight" in weights:
            height, width = x.shape[2:]
            down, right = -height % unshuffle, -width % unshuffle
            padded = functional.pad(x, (0, right, 0, down), mode="replicate")
            first = x = conv("conv_first", functional.pixel_unshuffle(padded, unshuffle))
            for block in range(sum(name.endswith("rdb1.conv1.bias") for name in weights)):
                y = x
                for i in (1, 2, 3):
                    y = dense(f"body.{block}.rdb{i}", y)
                x = x + 0.2 * y
            x = first + conv("conv_body", x)
            for i in range(1, doublings + 1):
                x = relu(conv(f"conv_up{i}", nearest(x, 2)))
            x = conv("conv_last", relu(conv("conv_hr", x)))
            by = 2**doublings // unshuffle
            x = x[:, :, : height * by, : width * by]
        else:
            y, last = x, max(int(name.split(".")[1]) for name in weights)
            for i in range(0, last, 2):
                y = functional.prelu(conv(f"body.{i}", y), weights[f"body.{i + 1}.weight"])
            x = functional.pixel_shuffle(conv(f"body.{last}", y), scale) + nearest(x, scale)
    return np.moveaxis(x.numpy(), 1, -1)
