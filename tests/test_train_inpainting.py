"""Training for inpainting, of models made for it and of standard models: what the loss sees, and whole runs."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import micro
import numpy as np
import pytest
from PIL import Image

from sdjax import diffusion, trees
from sdjax.data.dataset import make_batch
from sdjax.data.holes import make_holes
from sdjax.data.images import Crop, Size, read_image
from sdjax.draw import loop
from sdjax.formats.lora_file import load_lora
from sdjax.model import Model
from sdjax.outline import Outline
from sdjax.train import stages
from sdjax.train.encoding import encode
from sdjax.train.loop import train
from sdjax.train.results import NOTHING
from sdjax.train.step import Draws, distance

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = {"resolution": 16, "batch_size": 4, "validation_count": 4, "inpaint_masks": 3, "inpaint_full": 0.2}
MOVED = {"flip": True, "random_crops": 2}


@pytest.fixture(scope="module")
def settings(micro_models, micro_images, tmp_path_factory):
    """`settings(kind, output, data={...}, ...)` -> a run of a model made for inpainting ("nine") or a standard one."""
    folder = tmp_path_factory.mktemp("inpainting")
    masks = folder / "masks"
    masks.mkdir()
    for path in micro_images.glob("*.png"):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, 8:] = 255
        Image.fromarray(mask).save(masks / path.name)

    def make(kind, output="run", data=None, **changes):
        data = {"path": str(micro_images), "cache": str(folder / "cache"), **DATA, **(data or {})}
        model = micro_models(inpainting=kind == "nine")
        return micro.settings(model, micro_images, folder / output, data=data, **changes)

    make.folder = folder
    return make


@pytest.fixture(scope="module")
def prepared(settings):
    """Kind -> (run, its stage, data set of the training images, data set of the held-out images)."""

    def prepare(kind):
        run = stages.plan_run(settings(kind, data=MOVED))
        return run, run.stages[0], *encode(run, run.stages[0], NOTHING)

    return {kind: prepare(kind) for kind in ("nine", "four")}


def batch_of(run, dataset):
    return make_batch(dataset, run.stages[0].order(dataset.repeats, 0), 0)


# ------------------------------------------------------------------------------------------------- what is cached


def test_training_sees_what_drawing_sees(prepared):
    """For a held-out image, the mask and the masked latents are those that `inpaint` gives the U-Net."""
    run, _, _, held_out = prepared["nine"]
    (images,) = held_out.buckets
    assert set(images.arrays) == {"moments", "hole", "kept"}
    size = Size(16, 16)
    pixels = np.stack([read_image(record.file, size)[0] for record in images.records]) / np.float32(255)
    holes = np.stack([make_holes(r, size, [Crop()], count=1, full=0, seed=0)[0, 0] for r in images.records])
    seen = loop.mask_channels(Model.load(run.config.model), pixels, holes.astype(np.float32))
    np.testing.assert_array_equal(seen[..., :1], images.arrays["hole"][:, 0])
    # The scaling factor is 1.
    np.testing.assert_allclose(seen[..., 1:], images.arrays["kept"][:, 0], atol=1e-5)


def test_there_is_a_view_for_each_crop_mask_and_side(prepared):
    for kind, names in (("nine", {"moments", "hole", "kept"}), ("four", {"moments", "hole"})):
        _, plan, dataset, _ = prepared[kind]
        arrays = dataset.buckets[0].arrays
        assert {name: array.shape[1] for name, array in arrays.items()} == {
            name: 2 * 2 * (1 if name == "moments" else plan.holes) for name in names
        }
        np.testing.assert_array_equal(arrays["hole"][:, 1::2], arrays["hole"][:, ::2, :, ::-1])


# ------------------------------------------------------------------------------------------------------- the loss


class Answering:
    """Stands for a U-Net of a configuration: returns a fixed answer, and keeps its last input."""

    def __init__(self, config, answer):
        self.config, self.answer = config, answer

    def apply(self, variables, inputs, timesteps, context, added):
        self.inputs = inputs
        return self.answer


@pytest.fixture
def asked(prepared):
    """`asked(kind)` -> (errors, (answer, noisy latents, input of the U-Net), batch, squared errors of the answer).

    `errors(answer)` is the result of `distance` if the U-Net answers this.
    """

    def ask(kind, **changes):
        run, plan, dataset, _ = prepared[kind]
        batch = batch_of(run, dataset)
        random = np.random.default_rng(0)
        latents, noise, answer = jnp.asarray(random.normal(size=(3, 4, 8, 8, 4)), jnp.float32)
        draws = Draws(
            latents, noise, jnp.asarray([10, 300, 600, 900]), jnp.zeros(4), jnp.zeros_like(noise), jnp.zeros(4)
        )
        unet = Answering(run.outline.unet.config, answer)
        stage = dataclasses.replace(plan.stage, **changes)
        recipe = plan.recipe._replace(outline=dataclasses.replace(run.outline, unet=unet), stage=stage)

        def errors(answer, batch=batch, **options):
            unet.answer = answer
            return distance(recipe, {"unet": {}}, batch, draws, **options)

        target = diffusion.target(run.outline.schedule, latents, noise, draws.timesteps)
        errors(answer)
        noisy = diffusion.add_noise(run.outline.schedule, latents, noise, draws.timesteps)
        return errors, (answer, noisy, unet.inputs), batch, np.square(answer - target)

    return ask


def test_a_model_made_for_inpainting_sees_the_hole_and_learns_the_whole_picture(asked):
    errors, (answer, noisy, inputs), batch, squared = asked("nine")
    assert inputs.shape == (4, 8, 8, 9)
    np.testing.assert_array_equal(inputs[..., :4], noisy)
    np.testing.assert_array_equal(inputs[..., 4:5], batch["hole"])
    np.testing.assert_array_equal(inputs[..., 5:], batch["kept"])  # the scaling factor is 1
    for plain in (False, True):
        np.testing.assert_allclose(errors(answer, plain=plain), squared.mean((1, 2, 3)), rtol=1e-5)


def test_a_standard_model_learns_the_hole_alone(asked):
    errors, (answer, noisy, inputs), batch, squared = asked("four")
    np.testing.assert_array_equal(inputs, noisy)
    outside = np.broadcast_to(batch["hole"] == 0, answer.shape)
    assert 0 < outside.mean() < 1
    for plain in (False, True):
        expected = np.where(outside, 0, squared).mean((1, 2, 3))
        np.testing.assert_allclose(errors(answer, plain=plain), expected, rtol=1e-5)
        gradient = np.asarray(jax.grad(lambda answer, plain=plain: jnp.sum(errors(answer, plain=plain)))(answer))
        assert not gradient[outside].any() and gradient[~outside].all()
    masked = {**batch, "mask": 1 - batch["hole"]}  # of masked_loss: both must be white
    assert not errors(answer, masked).any()
    half, _, _, _ = asked("four", unmasked_weight=0.5)
    np.testing.assert_allclose(half(answer), np.where(outside, 0.5 * squared, squared).mean((1, 2, 3)), rtol=1e-5)


# -------------------------------------------------------------------------------------------------------- whole runs


BOTH = {
    "train": ["lora", "textual_inversion"],
    "steps": 3,
    "learning_rate": 1e-2,
    "placeholder_tokens": ["<disc>"],
    "init_tokens": ["circle"],
    "ema_decay": 0.9,
}


@pytest.mark.parametrize("kind", ["nine", "four"])
def test_lora_and_words_are_trained_exported_and_resumed_to_the_same_bits(settings, kind):
    prompts = {"prompts": ["a <disc>"], "steps": 1}
    config = settings(kind, kind, stages=[BOTH], validation=prompts, checkpoint={"every": 1, "keep": 9}, data=MOVED)
    assert train(config) == 0
    output = Path(config.output)
    adapter = load_lora(output / "export" / "style" / "lora.safetensors", Outline.load(config.model).shapes)
    assert all(np.abs(layer["up"]).max() > 0 for _, layer in trees.layers(adapter["unet"], "up"))
    losses = [line["held_out_loss"] for line in micro.metric_lines(output, "held_out_loss")]
    assert len(losses) == 2 and losses[0] != losses[1]
    # One row for the prompt and one for each of four held-out images, whose kept part stays as it is. The columns: what
    # is given, the base model, and the LoRA at three weights.
    sheet = Image.open(output / "samples" / "style-before-after.png")
    assert sheet.size == (6 + 5 * (192 + 6), 6 + 5 * (192 + 22 + 6))
    held_out = encode(plan := stages.plan_run(config), plan.stages[0], NOTHING)[1]
    lefts = range(6, sheet.width, 192 + 6)
    given, *drawn = (np.asarray(sheet.crop((x, 226, x + 192, 418)).convert("RGB"))[6::12, 6::12] for x in lefts)
    hidden = np.kron(held_out.buckets[0].arrays["hole"][0, 0, ..., 0], np.ones((2, 2))) > 0
    assert (given[hidden] == 128).all()
    for picture in drawn:
        np.testing.assert_array_equal(picture[~hidden], given[~hidden])
        assert (picture[hidden] != given[hidden]).any()

    before = micro.exported(output)
    micro.remove_checkpoints_after(output, 1)
    shutil.rmtree(output / "export")
    assert train(config, resume=True) == 0
    assert micro.exported(output) == before


def test_given_masks_and_class_images(settings):
    """Held-out images have given masks as well. Class images, which have none, get random ones."""
    given = {"inpaint_masks": 0, "inpaint_mask_path": str(settings.folder / "masks"), "flip": True}
    classes = micro.make_images(settings.folder / "classes", 6)
    stage = {"prior_prompt": "circle", "prior_path": str(classes), "prior_count": 6, "masked_loss": True}
    run = stages.plan_run(settings("nine", data={**given, "mask_path": given["inpaint_mask_path"]}, stages=[stage]))
    dataset, held_out = encode(run, run.stages[0], NOTHING)
    right = np.zeros((8, 8, 1), np.float32)
    right[:, 4:] = 1
    np.testing.assert_array_equal(held_out.buckets[0].arrays["hole"], np.broadcast_to(right, (4, 1, 8, 8, 1)))
    batch = batch_of(run, dataset)
    assert set(batch) == {"moments", "mask", "hole", "kept", "context", "index", "weight"}
    assert all(len(array) == 8 for array in batch.values())
    for hole, mask in zip(batch["hole"][:4], batch["mask"][:4], strict=True):
        assert (hole == right).all() or (hole == right[:, ::-1]).all()
        np.testing.assert_array_equal(hole, mask)
    assert len({hole.tobytes() for hole in batch["hole"][4:]}) > 1


def test_without_masks_nothing_is_hidden(settings):
    """Neither a standard model's plain training nor the autoencoder of one made for inpainting knows of holes."""
    plain = stages.plan_run(settings("four", data={"inpaint_masks": 0}))
    autoencoder = stages.plan_run(settings("nine", stages=[{"train": ["vae"]}]))
    for run in (plain, autoencoder):
        dataset, _ = encode(run, run.stages[0], NOTHING)
        assert run.stages[0].holes == 0 and not {"hole", "kept"} & set(batch_of(run, dataset))
