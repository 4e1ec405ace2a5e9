"""How weights and what is trained are split over a mesh: a table of rules over the paths of arrays.

The mesh has three axes (`runtime.devices.mesh_of`). A batch is split over `data` and `fsdp`, and the arrays here over
`fsdp` and `tensor`. Over `fsdp` arrays are only stored in parts, and a layer's weights are put together where it uses
them (`models.split`). Over `tensor` each device computes a part of a layer, and the layers go in pairs (Shoeybi et al.
2019, section 3): the first gives a part of the outputs, such as some heads or channels; the second takes them as its
inputs, and what it gives is summed over the devices.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sdjax.errors import ConfigError

LONGEST = None
# Not ff/net_0/proj: its outputs are a value and a gate, of which a device computes the same places (`unet.GEGLU`). So
# it needs columns from both halves of the kernel, and holds the whole kernel.
_FIRST = r"(attn\d/to_[qkv]|[qkv]_proj|mlp/fc1|resnets_\d+/(conv1|time_emb_proj))"
_SECOND = r"(attn\d/to_out_0|out_proj|ff/net_2|mlp/fc2|resnets_\d+/conv2)"

RULES: tuple[tuple[str, int | None, str], ...] = (
    (_FIRST + r"/(.*/)?(kernel|kernel_step|bias|up|up_2|magnitude)$", -1, "tensor"),
    (r"resnets_\d+/norm2/.*(scale|bias)$", -1, "tensor"),
    (_SECOND + r"/(.*/)?(kernel|down|down_2)$", -2, "tensor"),
    (r"", LONGEST, "fsdp"),
)
"""Regular expression that searches a path, axis of the array, axis of the mesh. Every rule that matches is applied, in
this order, to an axis that is not split yet and that the axis of the mesh divides. LONGEST: the longest such axis.

The expressions allow for the arrays of an optimizer, whose paths have a prefix and perhaps the last name twice. The
axes count from the end: the arrays of several copies have one more in front."""

SMALLEST = 1 << 16
"""Elements of the smallest array that is split over fsdp. A smaller one takes longer to put together than it saves."""
_JOINED = r"/(matrix|vector)/"
"""The optimizer's arrays for small ones, laid end to end (`optimizers._gathered`). They lie whole on the devices of
fsdp, or their pieces would be exchanged one by one. On a mesh with an axis tensor as well they are split, because XLA's
compiler for the CPU (jax 0.10.2) then gave wrong numbers."""


def spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """Returns how an array is split. path: written `a/b/c`. What no rule splits is copied to every device.

    >>> spec("unet/attn1/to_q/kernel", (320, 640), mesh_of(devices, fsdp=2, tensor=2))
    PartitionSpec("fsdp", "tensor")
    """
    split: dict[int, str] = {}
    joined = mesh.shape["tensor"] == 1 and re.search(_JOINED, path)
    small = math.prod(shape) < SMALLEST or joined
    for pattern, axis, name in RULES:
        parts = mesh.shape[name]
        fitting = [a for a, length in enumerate(shape) if a not in split and length % parts == 0]
        if axis is not LONGEST:
            fitting = [a for a in fitting if a - len(shape) == axis]
        if parts > 1 and fitting and re.search(pattern, path) and not (small and name == "fsdp"):
            split[max(fitting, key=lambda a: shape[a])] = name
    return P(*(split.get(axis) for axis in range(max(split, default=-1) + 1)))


def written(path: Sequence[Any]) -> str:
    """Returns the path of a leaf, as JAX gives it, written `a/b/c`."""
    return "/".join(re.findall(r"\w+", jax.tree_util.keystr(tuple(path))))


def mesh_sizes(devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes, of which one may be -1: the devices that the others leave.

    Raises ConfigError if there are too few devices, or if the others do not divide their number.
    """
    sizes = data, fsdp, tensor
    given = math.prod(size for size in sizes if size != -1)
    if given > devices:
        wanted = " x ".join(str(abs(size)) for size in sizes)
        raise ConfigError(f"parallel.mesh wants {wanted} devices, but there are {devices}")
    if -1 in sizes and devices % given:
        raise ConfigError(f"parallel.mesh: {given} does not divide the {devices} devices, so no axis can be -1")
    data, fsdp, tensor = (devices // given if size == -1 else size for size in sizes)
    return data, fsdp, tensor
