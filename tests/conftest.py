"""Strictness for every test: eight virtual CPU devices, strict dtype promotion, no hub. Fixtures that files share."""

import contextlib
import functools
import logging
import os
from pathlib import Path

import pytest

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", autouse=True)
def arrays_of_any_size_are_split():
    """The models of the tests have no array that `train.partition` would split over fsdp for its size."""
    from sdjax.train import partition

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "SMALLEST", 0)
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """kind -> (diffusers' pipeline, ours) of the same weights; see `pictures.pair`."""
    import pictures

    return functools.cache(lambda kind: pictures.pair(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def final_latents(monkeypatch):
    """`final_latents()` -> the latents of our last picture, as they reach the decoder."""
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
def base_unet():
    """The configuration and parameters of a small U-Net with random weights, which tests adapt."""
    import adapters

    return adapters.base_unet()


@pytest.fixture(scope="session")
def tiny():
    """The embedded model."""
    import sdjax

    return sdjax.load("tiny")


@pytest.fixture(scope="session")
def outline():
    """The embedded model without its weights."""
    from sdjax.outline import Outline

    return Outline.load("tiny")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def quick_compilation():
    """See `micro.quick_compilation`."""
    import micro

    yield from micro.quick_compilation()


@pytest.fixture(scope="session")
def micro_models(tmp_path_factory):
    """`micro_models(**options)` -> the folder of a model that all tests share; see `micro.make_model`."""
    import micro

    return functools.cache(lambda **options: micro.make_model(tmp_path_factory.mktemp("model") / "model", **options))


@pytest.fixture
def stand_in(micro_models, monkeypatch):
    """A very small model takes the place of the embedded one; its folder."""
    folder = micro_models(stand_in=True)
    monkeypatch.setattr("sdjax.outline._EMBEDDED", folder)
    return folder


@pytest.fixture(scope="session")
def micro_images(tmp_path_factory):
    """The folder of the images that all tests share; see `micro.make_images`."""
    import micro

    return micro.make_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="session")
def micro_cache(tmp_path_factory):
    """The folder in which runs with `settings` keep encoded images and captions."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings(micro_models, micro_images, micro_cache, tmp_path):
    """`settings(**changes)` -> a run in a folder of the test; see `micro.settings`. `data` adds to the usual table."""
    import micro

    def make(**changes):
        data = {"path": str(micro_images), "resolution": 16, "batch_size": 4, "validation_count": 4}
        data |= {"cache": str(micro_cache), **changes.pop("data", {})}
        return micro.settings(micro_models(), micro_images, tmp_path / "run", data=data, **changes)

    return make


@pytest.fixture(scope="session")
def finished(micro_models, micro_images, tmp_path_factory):
    """The folder of a finished run of `micro.settings`, and JAX's message for each program that the run compiled."""
    import micro

    from sdjax.train.loop import train

    config = micro.settings(micro_models(), micro_images, tmp_path_factory.mktemp("finished") / "run")
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("jax._src.interpreters.pxla")
    logger.addHandler(handler)
    logger.propagate = False
    jax.clear_caches()  # another test may have compiled some of the programs
    with contextlib.contextmanager(micro.quick_compilation)(), jax.log_compiles(True):
        assert train(config) == 0
    logger.removeHandler(handler)
    logger.propagate = True
    return Path(config.output), [message.split(" with ")[0] for message in records if "Compiling" in message]


@pytest.fixture(scope="session")
def everything(micro_models, micro_images, tmp_path_factory):
    """The configuration of a finished run of `micro.EVERYTHING`."""
    import micro

    from sdjax.train.loop import train

    config = micro.settings(
        micro_models(),
        micro_images,
        tmp_path_factory.mktemp("everything") / "run",
        stages=[{"steps": 2, "learning_rate": 1e-2, **stage} for stage in micro.EVERYTHING],
        validation={"prompts": ["a <plana> and <sky>"], "steps": 1},
        checkpoint={"every": 1, "keep": 100},
    )
    with contextlib.contextmanager(micro.quick_compilation)():
        assert train(config) == 0
    return config


@pytest.fixture(scope="session")
def micro_base(micro_models):
    """The loaded model of `micro.make_model`."""
    import sdjax

    return sdjax.load(micro_models())


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if weights are loaded."""

    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("sdjax.outline.load_params", load)
