"""From the images of a stage, through a real model, to the batches of its steps."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import micro
import numpy as np
import pytest
from PIL import Image
from test_data_tar import write_tar

from sdjax.data.dataset import make_batch
from sdjax.data.images import Crop, Size, read_image, to_float
from sdjax.errors import DataError
from sdjax.text import textual_inversion
from sdjax.train import loop, stages
from sdjax.train.config_file import compare_runs
from sdjax.train.encoding import class_images, encode
from sdjax.train.results import NOTHING

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def model(micro_models):
    return micro_models()


@pytest.fixture
def images(tmp_path):
    """A folder of 6 images that a test may change."""
    return micro.make_images(tmp_path / "images", 6)


def plan_run(model, images, data=None, **stage):
    data = {"path": str(images), "resolution": 16, "batch_size": 2, **(data or {})}
    return stages.plan_run(micro.settings(model, images, images.parent / "run", data=data, stages=[stage]))


def encoded(run, earlier=NOTHING):
    return encode(run, run.stages[0], earlier)


def batches(run, dataset, count):
    order = run.stages[0].order(dataset.repeats, run.config.seed)
    return [make_batch(dataset, order, number) for number in range(count)]


def moments_of(run, pixels):
    vae = run.outline.vae
    return np.asarray(vae.apply({"params": run.outline.load_weights("vae")}, to_float(pixels), method="encode"))


def test_the_autoencoder_gets_pixels_and_no_text(model, images):
    data = {"flip": True, "validation_count": 2}
    run = plan_run(model, images, data, train=["vae"], learning_rate=1e-3)
    dataset, held_out = encoded(run)
    (bucket,) = dataset.buckets
    assert bucket.arrays["pixels"].shape == (4, 2, 16, 16, 3)
    for row, record in enumerate(run.stages[0].records):
        (expected,) = read_image(record.file, Size(16, 16))
        np.testing.assert_array_equal(bucket.arrays["pixels"][row], [expected, expected[:, ::-1]])
    assert held_out is not None
    assert held_out.buckets[0].arrays["pixels"].shape == (2, 1, 16, 16, 3)
    for batch in batches(run, dataset, 3):
        assert set(batch) == {"pixels", "index"}
        assert batch["pixels"].dtype == np.uint8


def test_what_is_cached_needs_no_weights(model, images, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    run = plan_run(copy, images, {"flip": True, "random_crops": 2, "validation_count": 1})
    first = encoded(run)
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    again = encoded(run)
    for before, after in zip(first, again, strict=True):
        assert [bucket.records for bucket in before.buckets] == [bucket.records for bucket in after.buckets]
        arrays = [
            (dataset.texts, [(bucket.arrays, bucket.text_rows) for bucket in dataset.buckets])
            for dataset in (before, after)
        ]
        jax.tree.map(np.testing.assert_array_equal, *arrays)
    (images / "00.png").write_bytes((images / "01.png").read_bytes())
    with pytest.raises((DataError, OSError)):
        encoded(run)


def test_shards_train_as_the_folder_does(model, images, tmp_path):
    """The same batches from a tar, and no picture of it is encoded again. A changed shard is noticed on resume."""
    listed = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    captions = {entry["file_name"]: entry["text"] for entry in listed}
    shards = tmp_path / "shards"
    shards.mkdir()

    def write(names):
        members = {}
        for name in names:
            members |= {name: (images / name).read_bytes(), f"{name[:-4]}.txt": captions[name].encode()}
        write_tar(shards / "0.tar", members)

    write(sorted(captions))
    data = {"cache": str(tmp_path / "cache"), "validation_count": 0}
    folder, tar = plan_run(model, images, data), plan_run(model, shards, data)
    first = encoded(folder)[0]
    latents = set((tmp_path / "cache").glob("latents-*"))
    second = encoded(tar)[0]
    assert set((tmp_path / "cache").glob("latents-*")) == latents
    for ours, theirs in zip(batches(tar, second, 4), batches(folder, first, 4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert list(tar.identity["fingerprint.data.style"]) == [f"0.tar/{name}" for name in sorted(captions)]
    write(sorted(captions)[1:])
    with pytest.raises(DataError, match=r"images or captions of data.style: 1 missing \(0.tar/00.png\)"):
        compare_runs(tar.identity, plan_run(model, shards, data).identity, tar.config)


def test_another_autoencoder_makes_other_latents(model, images):
    run = plan_run(model, images)
    trained = jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(1.1), run.outline.load_weights("vae"))
    first, other = (encoded(run, earlier)[0] for earlier in (NOTHING, NOTHING._replace(weights={"vae": trained})))
    assert np.abs(first.buckets[0].arrays["moments"] - other.buckets[0].arrays["moments"]).max() > 0.01


@pytest.fixture
def shapes(tmp_path):
    """Two square, three wide and one tall image, each half of one colour and half of another."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    sizes = {"a": (16, 16), "b": (30, 34), "c": (64, 16), "d": (72, 16), "e": (80, 20), "f": (16, 64)}
    for i, (name, size) in enumerate(sizes.items()):
        image = Image.new("RGB", size, (40 * i, 0, 255))
        image.paste((0, 255 - 40 * i, 0), (size[0] // 2, 0, *size))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


BUCKETS = {"buckets": True, "bucket_step": 8, "bucket_max_aspect": 4.0}


def test_each_image_at_its_own_shape(model, shapes, caplog):
    with caplog.at_level(logging.INFO):
        run = plan_run(model, shapes, {**BUCKETS, "repeats": {"a*": 3}, "validation_count": 0})
    assert "6 images (8 with repeats), 2 a batch: 1.5 epochs; 3 shapes: 1 at 8x32, 2 at 16x16, 3 at 32x8" in caplog.text
    assert "fewer images than a batch holds at 8x32" in caplog.text
    dataset, _ = encoded(run)
    assert [each.tolist() for each in dataset.repeats] == [[1], [3, 1], [1, 1, 1]]
    assert [bucket.arrays["moments"].shape for bucket in dataset.buckets] == [
        (1, 1, 16, 4, 8),
        (2, 1, 8, 8, 8),
        (3, 1, 4, 16, 8),
    ]
    (wide,) = read_image(shapes / "d.png", Size(8, 32))
    expected = moments_of(run, wide[None])[0]
    np.testing.assert_allclose(dataset.buckets[2].arrays["moments"][1, 0], expected, atol=1e-4)
    counts: dict[tuple[int, ...], int] = {}
    for batch in batches(run, dataset, 8):
        shape = batch["moments"].shape
        counts[shape] = counts.get(shape, 0) + 1
    assert counts == {(2, 16, 4, 8): 1, (2, 8, 8, 8): 4, (2, 4, 16, 8): 3}


def test_random_crops_are_fixed_by_the_seed(model, shapes):
    data = {"random_crops": 3, "flip": True}
    run = plan_run(model, shapes, data, train=["vae"], learning_rate=1e-3)
    dataset, _ = encoded(run)
    pixels = dataset.buckets[0].arrays["pixels"]
    assert pixels.shape == (6, 6, 16, 16, 3)
    names = [record.name for record in run.stages[0].records]
    wide = pixels[names.index("d.png"), ::2]
    crops = [Crop(x) for x in np.linspace(0, 1, 57)]
    everywhere = {crop.tobytes() for crop in read_image(shapes / "d.png", Size(16, 16), crops=crops)}
    assert all(crop.tobytes() in everywhere for crop in wide)
    # Another folder, fewer images: the same crops of the same names.
    other = shapes.parent / "other"
    other.mkdir()
    for name in ("d.png", "d.txt"):
        shutil.copy(shapes / name, other / name)
    again, _ = encoded(plan_run(model, other, data, train=["vae"], learning_rate=1e-3))
    np.testing.assert_array_equal(again.buckets[0].arrays["pixels"][0, ::2], wide)


def mask(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("L", (5, 5), value).save(folder / name)


def test_masks_have_the_size_of_the_latents(model, shapes):
    masks = shapes.parent / "masks"
    for i, name in enumerate("abcdef"):
        mask(masks, f"{name}.png", 51 * i)
    data = {**BUCKETS, "mask_path": str(masks), "flip": True}
    run = plan_run(model, shapes, data, masked_loss=True)
    with pytest.raises(DataError, match=r"a.png: the mask is all black"):
        encoded(run)
    mask(masks, "a.png", 255)
    dataset, _ = encoded(run)
    tall, square, wide = (bucket.arrays["mask"][:, :, 0, 0, 0] for bucket in dataset.buckets)
    np.testing.assert_allclose(tall, [[1, 1]], atol=1e-6)
    np.testing.assert_allclose(square, [[1, 1], [0.2, 0.2]], atol=1e-6)
    np.testing.assert_allclose(wide, [[0.4, 0.4], [0.6, 0.6], [0.8, 0.8]], atol=1e-6)
    for bucket in dataset.buckets:
        assert bucket.arrays["mask"].shape[:-1] == bucket.arrays["moments"].shape[:-1]
    for batch in batches(run, dataset, 4):
        assert batch["mask"].shape == (*batch["moments"].shape[:-1], 1)
        assert batch["mask"].dtype == np.float32
    (masks / "b.png").unlink()
    with pytest.raises(DataError, match=r"no mask for b.png"):
        plan_run(model, shapes, data, masked_loss=True)
    with pytest.raises(DataError, match=r"a.png: has no alpha channel"):
        encoded(plan_run(model, shapes, {"mask_path": ""}, masked_loss=True))
    # Another stage on the same data needs no masks.
    run = plan_run(model, shapes, data)
    assert "mask" not in encoded(run)[0].buckets[0].arrays


WORDS = {"train": ["textual_inversion"], "placeholder_tokens": ["<disc>"], "init_tokens": ["red"]}


def ids_of(run, texts):
    return run.stages[0].recipe.outline.tokenize(texts, chunks=run.stages[0].chunks)["text_encoder"]


@pytest.mark.parametrize("template", ["object", ["a {} here", "see {}"]], ids=str)
def test_templates_take_the_place_of_captions(model, images, template, caplog):
    (images / "metadata.jsonl").unlink()  # no captions are needed, and none is missed
    run = plan_run(model, images, {"validation_count": 1}, template=template, **WORDS)
    dataset, held_out = encoded(run)
    texts = [text.replace("{}", "<disc>") for text in textual_inversion.templates(template)]
    ids = dataset.texts["text_encoder"]
    assert dataset.buckets[0].text_rows.shape == (5, len(texts))
    for rows in dataset.buckets[0].text_rows:
        np.testing.assert_array_equal(ids[rows], ids_of(run, texts))
    assert held_out is not None
    np.testing.assert_array_equal(ids[held_out.buckets[0].text_rows], ids_of(run, texts[:1])[None])
    seen = {row.tobytes() for batch in batches(run, dataset, 100) for row in batch["text_encoder"]}
    assert seen == {row.tobytes() for row in ids_of(run, texts)}
    assert "caption" not in caplog.text


def test_words_join_captions_that_lack_them(model, images):
    lines = (images / "metadata.jsonl").read_text().replace("red circle", "a round <disc> in red")
    (images / "metadata.jsonl").write_text(lines)
    run = plan_run(model, images, {"validation_count": 0}, **WORDS)
    captions = {record.name: record.captions for record in run.stages[0].records}
    assert captions["00.png"] == ("a round <disc> in red",)
    assert captions["01.png"] == ("<disc> green circle",)
    dataset, _ = encoded(run)
    (row,) = dataset.buckets[0].text_rows[1]
    np.testing.assert_array_equal(dataset.texts["text_encoder"][row], ids_of(run, ["<disc> green circle"])[0])


def test_tags_are_shuffled_and_dropped_ahead_of_time(model, images):
    lines = (images / "metadata.jsonl").read_text().replace("circle", "circle, round, small, filled")
    (images / "metadata.jsonl").write_text(lines)
    data = {"shuffle_tags": True, "keep_tags": 1, "tag_dropout": 0.2, "caption_variants": 5, "validation_count": 1}
    run = plan_run(model, images, data)
    plan = run.stages[0]
    assert all(len(record.captions) == 5 for record in plan.records)
    assert all(
        version.startswith(record.caption.split(",")[0]) for record in plan.records for version in record.captions
    )
    assert plan.held_out[0].captions == (plan.held_out[0].caption,)
    dataset, _ = encoded(run)
    assert dataset.buckets[0].text_rows.shape == (5, 5)
    distinct = {version for record in (*plan.records, *plan.held_out) for version in record.captions} | {""}
    assert len(dataset.texts["context"]) == len(distinct)


def test_a_file_that_vanishes_after_planning(model, shapes, caplog):
    run = plan_run(model, shapes, BUCKETS)
    (shapes / "f.png").unlink()
    with pytest.raises(DataError, match=r"f.png: cannot be read .*on_bad_image = 'skip'"):
        encoded(run)
    skipping = plan_run(model, shapes, {**BUCKETS, "on_bad_image": "skip"})
    (shapes / "c.png").write_bytes(b"")
    dataset, _ = encoded(skipping)
    assert [each.tolist() for each in dataset.repeats] == [[1, 1], [1, 1]]  # the tall shape has nothing left
    assert "1 of 3 images skipped" in caplog.text
    assert {batch["moments"].shape for batch in batches(skipping, dataset, 6)} == {(2, 8, 8, 8), (2, 4, 16, 8)}
    for path in shapes.glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"none of \d images can be used; the first: .*cannot be read"):
        encoded(skipping)


def test_class_images_are_read_from_a_folder(model, shapes):
    folder = shapes.parent / "class"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 20), (80 * i, 0, 0)).save(folder / f"{i}.png")
    (folder / "0.txt").write_text("not this one")
    prior = {"prior_prompt": "a circle", "prior_path": str(folder), "prior_count": 2, "prior_weight": 0.25}
    data = {**BUCKETS, "mask_path": "", "accumulation": 2, "caption_dropout": 1.0}
    run = plan_run(model, shapes, data, **prior)
    assert run.stages[0].examples == 8
    dataset, _ = encoded(run)
    assert dataset.prior is not None
    assert [bucket.repeats.tolist() for bucket in dataset.prior.buckets] == [[1, 1, 1]] * 3
    assert len(list(folder.glob("*.png"))) == 3
    plain = dataset._replace(prior=None)
    order = run.stages[0].order(dataset.repeats, run.config.seed)
    for number in range(6):
        batch, alone = make_batch(dataset, order, number), make_batch(plain, order, number)
        assert batch["index"].tolist() == list(range(8))
        assert batch["weight"].tolist() == [2.0] * 4 + [0.5] * 4
        np.testing.assert_array_equal(batch["moments"][:4], alone["moments"])
        assert batch["moments"].shape[1:] == alone["moments"].shape[1:]
    texts = dataset.texts["context"]
    np.testing.assert_array_equal(batch["context"][:4], texts[[dataset.empty_row] * 4])
    assert len(texts) == 6 + 2  # the captions, the class prompt and the empty one
    np.testing.assert_array_equal(batch["context"][4:], texts[dataset.prior.buckets[0].text_rows[[0] * 4, 0]])


def test_pictures_beside_keep_their_own_captions(model, images):
    folder = micro.make_images(images.parent / "others", 3)  # with captions in metadata.jsonl
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    run = plan_run(model, images, {"accumulation": 2}, prior_path=str(folder))
    assert [record.caption for record in run.stages[0].classes] == captions
    dataset, _ = encoded(run)
    (bucket,) = dataset.prior.buckets
    assert len({*bucket.text_rows[:, 0].tolist()}) == len(set(captions))
    (batch,) = batches(run, dataset, 1)
    half = len(batch["context"]) // 2
    known = dataset.texts["context"][bucket.text_rows[:, 0]]
    assert all(any((row == each).all() for each in known) for row in batch["context"][half:])
    assert not list((Path(run.config.output) / "prior").glob("*"))  # none is drawn
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match=r"prior_path: no caption for 00\.png; .*prior_prompt"):
        plan_run(model, images, prior_path=str(folder))


def test_class_images_are_learned_everywhere(model, images):
    masks = images.parent / "masks"
    for path in images.glob("*.png"):
        mask(masks, path.name, 102)
    folder = micro.make_images(images.parent / "class", 2)
    prior = {"prior_prompt": "a circle", "prior_path": str(folder), "prior_count": 2}
    run = plan_run(model, images, {"mask_path": str(masks)}, masked_loss=True, **prior)
    (batch,) = batches(run, encoded(run)[0], 1)
    np.testing.assert_allclose(batch["mask"][:, 0, 0, 0], [0.4, 0.4, 1, 1])


DRAW = """
import sys
sys.path.insert(0, {tests!r})
import jax, micro, test_train_encoding
jax.config.update("jax_disable_most_optimizations", True)
from sdjax.train.encoding import class_images
from sdjax.train.results import NOTHING
from pathlib import Path
run = test_train_encoding.plan_run(Path({model!r}), Path({images!r}), prior_prompt="a circle", prior_count=400)
class_images(run, run.stages[0], NOTHING)
"""


def test_drawing_class_images_goes_on_after_a_kill(model, images):
    """kill -9 between or within files. The images drawn later are those that would have been drawn then."""
    code = DRAW.format(tests=os.path.dirname(__file__), model=str(model), images=str(images))
    prior = images.parent / "run" / "prior" / "style"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(prior.glob("drawn-*.png"))) < 2:
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    drawn = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in prior.glob("drawn-*.png")}
    assert 2 <= len(drawn) < 400
    total = len(drawn) + 2
    Image.new("RGB", (16, 16)).save(prior / "own.png")  # counts too
    run = plan_run(model, images, prior_prompt="a circle", prior_count=total)
    jax.clear_caches()  # a program that another file compiled with optimizations may round differently from the child's
    records = class_images(run, run.stages[0], NOTHING)
    names = sorted(path.name for path in prior.glob("drawn-*.png"))
    assert [name[-10:] for name in names] == [f"-{n:05d}.png"[-10:] for n in range(total - 1)]
    assert [Path(record.file).name for record in records] == [*names, "own.png"]
    # Random masks depend on names, which must not change with the rounding of earlier stages.
    assert [record.name for record in records] == [*(f"drawn-{n:05d}.png" for n in range(total - 1)), "own.png"]
    assert {record.caption for record in records} == {"a circle"}
    for name, (mtime, content) in drawn.items():
        assert ((prior / name).stat().st_mtime_ns, (prior / name).read_bytes()) == (mtime, content)
    # A whole run from the start draws the same pictures.
    first = (prior / names[0]).read_bytes()
    (prior / names[0]).unlink()
    class_images(run, run.stages[0], NOTHING)
    assert (prior / names[0]).read_bytes() == first
    # Another prompt draws other pictures. Those of the first prompt stay, but are not its class images.
    other = plan_run(model, images, prior_prompt="a square", prior_count=2)
    records = class_images(other, other.stages[0], NOTHING)
    assert len(records) == 2 and not {Path(record.file).name for record in records} & set(names)
    assert set(names) <= {path.name for path in prior.iterdir()}


def test_everything_at_once_resumes_to_the_bit(model, shapes):
    """Buckets, crops, flips, tags, masks and class images in one run, whose last step is repeated from a checkpoint."""
    masks = shapes.parent / "masks"
    for i, name in enumerate("abcdef"):
        mask(masks, f"{name}.png", 100 + 30 * i)
    data = {
        **{"path": str(shapes), "resolution": 16, "batch_size": 2, "flip": True, "random_crops": 2},
        **{**BUCKETS, "repeats": {"f.png": 0}, "mask_path": str(masks), "shuffle_tags": True, "tag_dropout": 0.3},
    }
    folder = micro.make_images(shapes.parent / "class", 2)
    stage = {"steps": 3, "masked_loss": True, "unmasked_weight": 0.1}
    stage |= {"prior_prompt": "a picture", "prior_path": str(folder), "prior_count": 2}
    output = shapes.parent / "run"
    config = micro.settings(model, shapes, output, data=data, stages=[stage], validation={})
    assert loop.train(config) == 0
    first = micro.exported(output)
    shutil.rmtree(output / "export")
    assert loop.train(config, resume=True, resume_step=2) == 0
    assert micro.exported(output) == first
