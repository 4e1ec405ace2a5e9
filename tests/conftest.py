"""Strictness for every test: eight virtual CPU devices, strict dtype promotion, checked shapes."""

import functools
import os

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, ours) of the same weights, as of `pictures.pair`."""
    import pictures

    return functools.cache(lambda kind: pictures.pair(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def final_latents(monkeypatch):
    """The latents of our last picture, as they are when they reach the decoder."""
    import numpy as np

    from sdjax.model import Model

    seen = []
    decode = Model.decode_latents

    def spy(self, latents):
        seen.append(np.asarray(latents))
        return decode(self, latents)

    monkeypatch.setattr(Model, "decode_latents", spy)
    return lambda: seen[-1]


@pytest.fixture(scope="session")
def tiny():
    """The embedded model."""
    import sdjax

    return sdjax.load("tiny")
