"""The images of a stage: what is trained on, what is held out, and which captions each shows."""

import dataclasses

import pytest
from micro import WORDS

from sdjax.errors import ConfigError, DataError
from sdjax.outline import Outline
from sdjax.train import stage_images
from sdjax.train.loop import train


@pytest.fixture
def find(settings, tmp_path):
    """`find(stage, **data)` -> the images of a stage, whose other settings are those of `settings`."""

    def found(stage, **data):
        config = settings(stages=[stage], data=data)
        (stage,) = config.stages
        own = config.data_of(stage)
        return stage_images.find(own, stage, "stages.0", config.seed, stage_images.scan_folder, tmp_path)

    return found


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "/nowhere"}, "/nowhere"),
        ({"validation_count": 12}, "nothing left to train on"),
        ({"validation_count": 0, "validation_path": "/nowhere"}, "validation_path.*nowhere"),
    ],
)
def test_missing_images_are_refused(settings, no_weights, data, message):
    with pytest.raises(DataError, match=message):
        train(settings(data=data))


def test_training_images_show_all_versions_of_a_caption_and_held_out_images_one(find):
    images = find({}, caption_variants=3, shuffle_tags=True)
    assert (len(images.training), len(images.held_out)) == (8, 4)
    assert {len(record.captions) for record in images.training} == {3}
    assert {len(record.captions) for record in images.held_out} == {1}
    assert len(images.fingerprint) == 12

    words = find({**WORDS, "template": ["a {}", "the {}"]})
    assert {record.captions for record in words.training} == {("a <plana> <sky>", "the <plana> <sky>")}
    assert {record.captions for record in words.held_out} == {("a <plana> <sky>",)}


def test_buckets_that_the_autoencoder_cannot_encode_are_refused(find, settings, micro_models):
    """A setting from a file is a multiple of 8, which suits every published autoencoder: 3 stands for a misfit."""
    data = dataclasses.replace(settings(data={"buckets": True}).data, bucket_step=3)
    with pytest.raises(ConfigError, match=r"stages\.0: data\.bucket_step = 3 must be a multiple of 2"):
        stage_images.assign(data, find({}).training, "stages.0", Outline.load(micro_models()))
