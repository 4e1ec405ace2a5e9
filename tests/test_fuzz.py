"""A few hundred inputs of the kind of `fuzz.run`: damaged files, configs and prompts for every reader."""

import logging
import random
import shutil

import pytest
from fuzz.targets import fault, make_targets, mutated
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.draw import jobs
from sdjax.errors import SdjaxError
from sdjax.settings import read_record
from sdjax.train.config import RunConfig, check

NAMES = ["safetensors", "torch", "embedding", "embedding.pt", "lora", "single file", "model_index", "picture"]
NAMES += ["training picture", "metadata", "caption", "tar", "parquet", "config", "jobs", "prompt", "grid"]


@pytest.fixture(scope="module")
def targets(micro_models, tmp_path_factory):
    logging.getLogger("sdjax").setLevel(logging.ERROR)
    marker = tmp_path_factory.mktemp("fuzz") / "code was run"
    yield make_targets(micro_models(), marker)
    logging.getLogger("sdjax").setLevel(logging.NOTSET)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_input_is_read_or_refused(targets, name, tmp_path):
    assert set(targets) == set(NAMES)
    target, draw = targets[name], random.Random(0)
    for content in (*target.seeds, *(mutated(draw.choice(target.seeds), draw) for _ in range(20))):
        assert fault(target, content, tmp_path) == "", content
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["lora", "unet", "a1111"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["prompt", "steps", "width", "sampler", "lora", "outpaint", "seed", "x"]), values)
)
def test_jobs_of_any_values_are_taken_or_refused(table):
    try:
        jobs.complete_job(table)
    except SdjaxError as error:
        assert len(str(error).splitlines()) <= 2


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "train", "steps", "learning_rate", "lora_ranks", "template"]), values))
def test_stages_of_any_values_are_taken_or_refused(stage):
    usual = {"name": "a", "train": ["lora"], "steps": 1, "learning_rate": 1e-3}
    table = {"model": "m", "output": "o", "data": {"path": "p"}, "stages": [usual | stage]}
    try:
        check(read_record(RunConfig, table))
    except SdjaxError as error:
        assert len(str(error).splitlines()) <= 2
