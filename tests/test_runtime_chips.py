"""Chips that programs are compiled for, and the number type for the chip that is there."""

import types

import jax
import pytest

from sdjax.errors import ConfigError
from sdjax.outline import Outline
from sdjax.runtime import chips


@pytest.mark.parametrize(
    ("backend", "capability", "dtype"),
    [
        ("cpu", "", "float32"),
        ("tpu", "", "bfloat16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),
    ],
)
def test_the_fast_number_type(monkeypatch, backend, capability, dtype):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert chips.fast_dtype() == dtype


def test_a_gpu_without_bfloat16_says_so(monkeypatch):
    with pytest.raises(ConfigError, match="this GPU is older than Ampere and has no bfloat16; use 'float16'"):
        monkeypatch.setattr(chips, "compute_capability", lambda: (7, 5))
        Outline.load("tiny", "bfloat16", platform="gpu", weights=False)
    Outline.load("tiny", "float16", platform="gpu", weights=False)
    Outline.load("tiny", "bfloat16", platform="cpu", weights=False)


def test_this_machine():
    target = chips.present()
    assert (target.chip, target.described, len(target.devices)) == (None, False, len(jax.devices()))
    assert 1e8 < target.memory * len(target.devices) < 1e14


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("TPU v5 lite", chips.TPUS["v5e"]), ("Tesla T4", chips.GPUS["t4"]), ("NVIDIA A100-SXM4-40GB", chips.GPUS["a100"])],
)
def test_a_known_chip_is_found_by_its_name(monkeypatch, kind, chip):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)])
    assert chips.present()[1:] == (chip, jax.devices(), False, chip.memory)


def test_a_gpu_is_described_to_the_compiler():
    text = chips._target_config("t4")
    assert text.count("{") == text.count("}") == 3
    for line in ("core_count: 40", "cuda_compute_capability { major: 7 minor: 5 }", 'name: "Tesla T4"'):
        assert line in text
