"""Chips that sdjax can compile for, whether or not this machine has them.

The compiler of a TPU is in the package libtpu, that of an NVIDIA GPU in JAX's CUDA plugin. Both compile for a device
that is only described; nothing can run on it.
"""

import importlib.util
import os
import types
from typing import Any, NamedTuple

import jax

from sdjax.errors import ConfigError


class Chip(NamedTuple):
    """What the data sheet of a chip says. For TPU v3 and v4 one core, which JAX takes for a device."""

    flops: float
    """Operations a second in half precision with float32 sums, at most."""
    bandwidth: float
    """Bytes a second from and to the memory of the device, at most."""
    memory: float
    """Bytes of memory that programs can use."""
    clock: float | None = None
    """Cycles a second, for the cycles that the compiler estimates."""


GIB = 1 << 30

TPUS = {
    "v3": Chip(61e12, 450e9, 15.48 * GIB, 0.94e9),
    "v4": Chip(137e12, 600e9, 15.25 * GIB, 1.05e9),
    "v5e": Chip(197e12, 819e9, 15.75 * GIB, 1.5e9),
    "v5p": Chip(459e12, 2765e9, 95.74 * GIB, 1.75e9),
    "v6e": Chip(918e12, 1640e9, 31.25 * GIB),
}
"""The memory is the part of it that the compiler lets a program use."""

GPUS = {
    "t4": Chip(65e12, 320e9, 15.8e9),
    "l4": Chip(121e12, 300e9, 23.6e9),
    "a100": Chip(312e12, 1555e9, 42.3e9),
    "h100": Chip(989e12, 3352e9, 84.9e9),
}


class Streaming(NamedTuple):
    """The multiprocessors of a GPU, as NVIDIA's tables of compute capabilities have them."""

    name: str
    capability: tuple[int, int]
    count: int
    lanes: int
    """float32 units of each."""
    threads: int
    """Most resident threads of each."""
    shared: int
    """Bytes of shared memory of each. One block can use 1 KiB less, on the T4 all."""
    clock: float
    cache: int
    """Bytes of the second-level cache, which all share."""


_STREAMING = {
    "t4": Streaming("Tesla T4", (7, 5), 40, 64, 1024, 64 << 10, 1.59, 4 << 20),
    "l4": Streaming("NVIDIA L4", (8, 9), 58, 128, 1536, 100 << 10, 2.04, 48 << 20),
    "a100": Streaming("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164 << 10, 1.41, 40 << 20),
    "h100": Streaming("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 << 10, 1.98, 50 << 20),
}


class Target(NamedTuple):
    """What programs are compiled for."""

    name: str
    chip: Chip | None
    """None if it is no chip that sdjax knows."""
    devices: list[Any]
    """JAX's devices."""
    described: bool
    """Whether the devices are only described."""
    memory: float
    """Bytes that programs can use on each device."""


_described_gpus: list[str] = []
"""The GPU that was described last."""


def compute_capability() -> tuple[int, int] | None:
    """Returns that of the GPU that programs are compiled for: the described one, or JAX's. None without NVIDIA's."""
    if _described_gpus:
        return _STREAMING[_described_gpus[-1]].capability
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = jax.devices()[0].compute_capability.partition(".")
    return (int(major), int(minor)) if minor else None  # the names of AMD's, such as gfx90a, have no dot


def fast_dtype() -> str:
    """Returns the number type that JAX's device computes fast: half precision, bfloat16 where there is a choice."""
    if jax.default_backend() == "cpu":
        return "float32"
    capability = compute_capability()
    return "float16" if capability is not None and capability < (8, 0) else "bfloat16"


def check_dtype(dtype: str, platform: str | None) -> None:
    """Raises ConfigError for bfloat16 on a GPU without it. platform: that computes; None: JAX's default backend."""
    if dtype == "bfloat16" and (platform or jax.default_backend()) in ("gpu", "cuda"):
        capability = compute_capability()
        if capability is not None and capability < (8, 0):
            raise ConfigError("dtype = 'bfloat16': this GPU is older than Ampere and has no bfloat16; use 'float16'")


def described(name: str) -> Target:
    """Returns a TPU slice such as "v5e:2x2" or "v5p:2x2x1", one chip such as "v5e", or one GPU such as "a100".

    Raises ConfigError for a chip or slice that there is not, and if the compiler is not installed.
    """
    kind, _, layout = name.partition(":")
    if kind in GPUS and not layout:
        return Target(name, GPUS[kind], _gpu(kind), True, GPUS[kind].memory)
    if kind in TPUS:
        return Target(name, TPUS[kind], _tpu(name, layout), True, TPUS[kind].memory)
    raise ConfigError(f"--for {name}: choices are {', '.join(GPUS)}, and TPU slices of {', '.join(TPUS)} (v5e:2x2)")


def present() -> Target:
    """Returns the devices of this machine."""
    devices = jax.devices()
    kind = devices[0].device_kind
    tpu = {"TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}.get(kind)
    gpu = next((name for name in GPUS if name in kind.lower().replace("-", " ").split()), None)
    if tpu or gpu:
        chip = TPUS[tpu] if tpu else GPUS[str(gpu)]
        return Target(kind, chip, devices, False, chip.memory)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Target(kind, None, devices, False, whole / len(devices))  # all devices of a CPU share its memory


def _tpu(target: str, layout: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--for {target} needs a TPU's compiler: pip install 'sdjax[tpu]'")
    # Without the first, libtpu asks the network on which TPU it is, for minutes. The second lets two processes compile.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if layout not in ("", "1", "1x1", "1x1x1"):
        return _topology(target, "tpu", target)
    return _topology(target, "tpu", f"{target.partition(':')[0]}:{'2x2x1' if target[:3] in ('v4', 'v5p') else '2x2'}")[
        :1
    ]


def _gpu(name: str) -> list[Any]:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        packages = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        raise ConfigError(f"--for {name} needs JAX's CUDA plugin: pip install --no-deps {packages}")
    # JAX asks the cuDNN that is installed for its version while it traces attention. The described GPU has this one.
    from jax._src.cudnn import fused_attention_stablehlo

    _described_gpus.append(name)
    version: Any = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
    fused_attention_stablehlo.cuda_versions = version  # pyright: ignore[reportPrivateImportUsage]
    return _topology(name, "cuda", "1x1x1", target_config=_target_config(name), topology="1x1x1")


def _topology(target: str, platform: str, name: str, **options: str) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices)
    except Exception as error:  # one of several types, such as JaxRuntimeError
        raise ConfigError(f"--for {target}: {str(error).splitlines()[0]}") from None


def _target_config(name: str) -> str:
    """The chip as XLA's message `stream_executor.GpuTargetConfigProto`, in the text format of protocol buffers."""
    chip, streaming = GPUS[name], _STREAMING[name]
    major, minor = streaming.capability
    block = streaming.shared - (0 if name == "t4" else 1 << 10)
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": streaming.shared,
        "shared_memory_per_block_optin": block,
        "threads_per_core_limit": streaming.threads,
        "core_count": streaming.count,
        "fpus_per_core": streaming.lanes,
        "block_dim_limit_x": (1 << 31) - 1,
        "block_dim_limit_y": (1 << 16) - 1,
        "block_dim_limit_z": (1 << 16) - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "registers_per_core_limit": 1 << 16,
        "registers_per_block_limit": 1 << 16,
        "memory_bandwidth": int(chip.bandwidth),
        "l2_cache_size": streaming.cache,
        "clock_rate_ghz": streaming.clock,
        "device_memory_size": int(chip.memory),
        "device_address_bits": 64,
        "device_vendor": "NVIDIA Corporation",
        "platform_version": f"Compute Capability {major}.{minor}",
        "name": streaming.name,
        "driver_version": "13.0.0",
        "runtime_version": "12.8.0",
        "compile_time_toolkit_version": "12.8.0",
        "dnn_version": "9.10.0",
    }
    fields = "\n".join(
        f'{key}: "{value}"' if isinstance(value, str) else f"{key}: {value}" for key, value in device.items()
    )
    return (
        f"gpu_device_info {{\n{fields}\ncuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 patch: 0 }}\n'
        f'device_description_str: "{streaming.name}"\n'
    )
