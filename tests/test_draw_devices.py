"""Several devices that share the pictures of a call: the same pictures as on one, by the library and the command."""

import jax
import numpy as np
import pytest
from pictures import compilations, pixels_of
from PIL import Image

import sdjax
from sdjax import generate
from sdjax.draw.programs import drawing_with
from sdjax.errors import ConfigError
from sdjax.runtime import chips, compiled

pytestmark = pytest.mark.usefixtures("quick_compilation")
how = {"steps": 2, "guidance": 3.0, "seed": 7, "progress": False, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def one(micro_models):
    return sdjax.load(micro_models())


@pytest.fixture(scope="module")
def eight(one):
    return one.on_devices(8)


def furthest(pictures, others):
    assert len(pictures) == len(others)
    return np.abs(pixels_of(pictures) - pixels_of(others)).max()


def test_sixty_four_pictures(one, eight):
    prompts = ["red circle", "blue square"] * 32
    expected = one.text2image(prompts, "green", **how)
    drawn = []
    draw = lambda **more: drawn.append(eight.text2image(prompts, "green", **{**how, **more}))
    draw()
    assert compilations(lambda: draw(steps=5)) == 0
    assert furthest(drawn[0], expected) <= 1
    for leaf in jax.tree.leaves(eight.params):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.shape}
        assert len(leaf.sharding.device_set) == 8


def test_each_way_of_drawing(one, eight):
    images = one.text2image("red circle", num_images=8, **how)
    mask = Image.fromarray(np.uint8([[0, 255]] * 2)).resize((16, 16), 0)
    for draw in (
        lambda sd: sd.img2img(["blue circle"] * 8, images, strength=0.5, **how),
        lambda sd: sd.inpaint(["blue circle"] * 8, images, mask, **how),
        lambda sd: sd.with_tiled_vae(64, 8).text2image("red circle", num_images=8, **how),
    ):
        assert furthest(draw(eight), draw(one)) <= 1


def test_pictures_that_the_devices_do_not_divide(one, eight):
    assert furthest(eight.text2image("red", num_images=3, **how), one.text2image("red", num_images=3, **how)) <= 1


def test_more_devices_than_there_are(one, no_weights, capsys):
    with pytest.raises(ConfigError, match=r"99 devices: JAX has \d+"):
        one.on_devices(99)
    assert generate.main(["--model", "tiny", "--prompt", "a", "--devices", "99"]) == 2
    assert "99 devices: JAX has" in capsys.readouterr().err


def test_the_command(one, micro_models, tmp_path, monkeypatch):
    monkeypatch.setattr("sdjax.runtime.compilation_cache.enable", lambda: None)
    flags = ["--prompt", "red", "--num-images", "4", "--steps", "2", "--guidance", "3", "--seed", "7", "--devices", "4"]
    assert generate.main(["--model", str(micro_models()), *flags, "--out", str(tmp_path)]) == 0
    drawn = [Image.open(path) for path in sorted(tmp_path.glob("0*.png"))]
    assert furthest(drawn, one.text2image("red", num_images=4, **how)) <= 1


def test_it_is_planned(micro_models):
    target = chips.present()
    planned = {
        count: compiled.compile_for(
            target,
            drawing_with(str(micro_models()), "float32", jax.devices()[:count], side=16, count=8, steps=2),
        )
        for count in (1, 8)
    }
    for alone, shared in zip(planned[1], planned[8], strict=True):
        assert (alone.program.devices, shared.program.devices) == (1, 8)
    step = {count: planned[count][1] for count in planned}
    assert step[8].figures.flops < 0.2 * step[1].figures.flops
    assert step[8].memory < 0.7 * step[1].memory
    assert [planned[count][2].program.runs for count in (1, 8)] == [8, 1]
