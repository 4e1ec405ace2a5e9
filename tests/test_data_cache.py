"""The cache: latents and embeddings are computed once, kept on disk, and computed again if they are damaged."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax.data import cache
from sdjax.data.cache import Views, cache_holes, cache_images, cache_masks, cache_sizes, cache_texts
from sdjax.data.holes import random_hole
from sdjax.data.images import Size
from sdjax.data.records import Record, fingerprint, scan
from sdjax.errors import DataError


class Encoder:
    """Stands for the VAE: returns the mean colour of each image's left half and keeps the shapes of its batches."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(images.shape)
        left = images[:, :, :4].astype(np.float32).mean((1, 2), keepdims=True)
        return jnp.concatenate([left, -left[..., :1]], axis=-1)


def never(images):
    raise AssertionError("computed again")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(7):
        image = Image.new("RGB", (8, 8), (30 * i, 0, 0))
        image.paste((0, 255, 0), (4, 0, 8, 8))
        image.save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"number {i % 3}")
    return root


def latents(folder, encode, **changes):
    views = {name: changes.pop(name) for name in Views._fields if name in changes}
    settings = {"folder": folder.parent / "cache", "model": "m", "batch_size": 3, **changes}
    return cache_images(scan(folder), Views(**{"size": Size(8, 8), **views}), encode, **settings)


def moments(folder, encode, **changes):
    return latents(folder, encode, **changes).arrays["moments"]


def test_encoded_once_in_full_batches(folder):
    encode, seen = Encoder(), []
    first = latents(folder, encode, progress=lambda done, total: seen.append((done, total)))
    assert encode.shapes == [(3, 8, 8, 3)] * 3
    assert seen == [(3, 7), (6, 7), (7, 7)]
    array = first.arrays["moments"]
    assert isinstance(array, np.memmap)
    assert array.shape == (7, 1, 1, 1, 4)
    np.testing.assert_allclose(array[:, 0, 0, 0, 0], [30 * i for i in range(7)])
    assert [r.name for r in first.records] == [f"{i}.png" for i in range(7)]
    again = latents(folder, encode)
    assert len(encode.shapes) == 3
    np.testing.assert_array_equal(again.arrays["moments"], array)


def test_a_large_set_lies_in_several_entries(folder, monkeypatch):
    whole = latents(folder, Encoder())
    encode, seen = Encoder(), []
    monkeypatch.setattr(cache, "LARGEST", 3)
    parts = latents(folder, encode, progress=lambda done, total: seen.append((done, total)), model="other")
    assert seen == [(3, 7), (6, 7), (7, 7)] and len(encode.shapes) == 3
    np.testing.assert_array_equal(parts.arrays["moments"], whole.arrays["moments"])
    assert parts.records == whole.records
    (folder / "4.png").write_bytes(b"")
    encode.shapes.clear()
    skipped = latents(folder, encode, model="other", on_bad_image="skip")
    assert len(encode.shapes) == 1 and len(skipped.skipped) == 1  # the other two entries are as they were
    kept = [0, 1, 2, 3, 5, 6]
    np.testing.assert_array_equal(skipped.arrays["moments"], whole.arrays["moments"][kept])
    assert skipped.records == tuple(whole.records[i] for i in kept)


def test_both_flips_are_encoded(folder):
    encode = Encoder()
    array = moments(folder, encode, flip=True)
    assert encode.shapes == [(3, 8, 8, 3)] * 6
    assert array.shape == (7, 2, 1, 1, 4)
    assert (array[:, 0, 0, 0, 1] == 0).all()
    assert (array[:, 1, 0, 0, 1] == 255).all()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"size": Size(16, 8)},
        {"background": "black"},
        {"flip": True},
        {"crops": 2},
        {"crops": 1},
        {"crops": 1, "seed": 1},
    ],
    ids=str,
)
def test_other_settings_are_another_entry(folder, change):
    encode = Encoder()
    latents(folder, encode)
    latents(folder, encode, **change)
    assert len(encode.shapes) > 3
    asked = len(encode.shapes)
    latents(folder, encode)  # the first entry is still there
    assert len(encode.shapes) == asked


def test_another_picture_under_the_same_name_is_noticed(folder):
    encode = Encoder()
    latents(folder, encode)
    times = os.stat(folder / "0.png")
    Image.new("RGB", (8, 8), (99, 0, 0)).save(folder / "0.png")
    os.utime(folder / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert moments(folder, encode)[0, 0, 0, 0, 0] == 99


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_bit(entry / "moments.bin"),
        lambda entry: os.truncate(entry / "moments.bin", 10),
        lambda entry: (entry / "moments.bin").unlink(),
        lambda entry: (entry / "index.json").write_text("{"),
        lambda entry: (entry / "index.json").write_text("{}"),
        lambda entry: (entry / "index.json").unlink(),
    ],
    ids=["flipped", "truncated", "deleted", "not json", "not an index", "no index"],
)
def test_a_damaged_entry_is_computed_again(folder, damage, caplog):
    encode = Encoder()
    before = np.array(moments(folder, encode))
    (entry,) = (folder.parent / "cache").iterdir()
    damage(entry)
    after = moments(folder, encode)
    assert len(encode.shapes) == 6
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(after, before)


def test_two_runs_that_compute_an_entry_at_once_share_the_first(folder):
    """The entry that is there first is never removed: the other run may be hashing or reading it."""
    places = []

    class Slower(Encoder):
        def __call__(self, images):
            if not self.shapes:  # another run begins later and ends earlier
                places.append(moments(folder, Encoder()).filename)
                places.append(os.stat(places[0]).st_ino)
            return super().__call__(images)

    mine = moments(folder, Slower())
    assert [mine.filename, os.stat(mine.filename).st_ino] == places
    assert len(list((folder.parent / "cache").iterdir())) == 1


def test_bad_images_are_skipped_counted_and_remembered(folder, caplog):
    (folder / "2.png").write_bytes(b"text")
    (folder / "6.png").write_bytes(b"")
    encode = Encoder()
    with pytest.raises(DataError, match=r"2.png: cannot be read .*on_bad_image = 'skip'"):
        latents(folder, encode)
    assert not list((folder.parent / "cache").iterdir())
    first = latents(folder, encode, on_bad_image="skip")
    assert "2 of 7 images skipped" in caplog.text
    for result in (first, latents(folder, never, on_bad_image="skip")):
        assert [r.name for r in result.records] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
        np.testing.assert_allclose(result.arrays["moments"][:, 0, 0, 0, 0], [0, 30, 90, 120, 150])
        assert len(result.skipped) == 2
    assert set(encode.shapes) == {(3, 8, 8, 3)}
    with pytest.raises(DataError, match=r"2.png"):
        latents(folder, never)


def test_nothing_but_bad_images(tmp_path):
    """No error, since other shapes may have good images: the caller decides."""
    records = (Record("gone.png", tmp_path / "gone.png", "x"),)
    for encode in (Encoder(), None):
        images = cache_images(records, Views(Size(8, 8)), encode, folder=tmp_path, model="m", on_bad_image="skip")
        assert images.records == ()
        assert len(images.skipped) == 1


def wide(path):
    """A picture three times as wide as high, which is also its mask: grey that gets lighter to the right."""
    grey = np.repeat(np.arange(48, dtype=np.uint8)[None] * 5, 16, axis=0)
    Image.fromarray(grey).save(path)
    return Record(path.name, path, "x", mask=path)


def test_images_and_masks_move_together(tmp_path):
    """The picture is also its mask, so every crop and mirror image of it must show the same as the mask."""
    records = [wide(tmp_path / f"{i}.png") for i in range(3)]
    views = Views(Size(16, 16), flip=True, crops=3, seed=4)
    images = cache_images(records, views, None, folder=tmp_path / "cache", model="")
    images = cache_masks(images, views, 4, folder=tmp_path / "cache")
    pixels, mask = images.arrays["pixels"], images.arrays["mask"]
    assert pixels.shape == (3, 6, 16, 16, 3)
    assert pixels.dtype == np.uint8
    assert mask.shape == (3, 6, 4, 4, 1)
    averaged = pixels[..., :1].reshape(3, 6, 4, 4, 4, 4, 1).mean((3, 5)) / 255
    np.testing.assert_allclose(mask, averaged, atol=3 / 255)  # half a pixel: only crops of images begin at whole pixels
    np.testing.assert_array_equal(pixels[:, 1::2], pixels[:, ::2, :, ::-1])
    assert len({crop.tobytes() for image in pixels for crop in image[::2]}) > 6
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_masks_have_a_separate_entry(folder, tmp_path):
    """Another mask file, or the alpha channel instead, does not make the latents computed again."""
    views = Views(Size(8, 8))
    settings = {"folder": tmp_path / "cache", "model": "m"}
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "grey.png")
    encode = Encoder()
    for name, value in (("white.png", 1), ("grey.png", 0.2)):
        records = [record._replace(mask=tmp_path / name) for record in scan(folder)]
        images = cache_masks(cache_images(records, views, encode, **settings), views, 8, folder=tmp_path / "cache")
        np.testing.assert_allclose(images.arrays["mask"], np.full((7, 1, 1, 1, 1), value), atol=1e-6)
        assert len(encode.shapes) == 2
    with pytest.raises(DataError, match="no alpha channel"):
        cache_masks(cache_images(scan(folder), views, encode, **settings), views, 8, folder=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def hidden(images, holes):
    """Stands for the VAE: the hole and the rest of the image, at full size."""
    return {"hole": holes[..., None].astype(np.float32), "kept": np.where(holes[..., None], 0, images)}


@pytest.mark.parametrize("mask_files", [False, True])
def test_images_and_holes_move_together(tmp_path, mask_files):
    """Each hole is cut out of its crop and mirrored with the crop. An image that is also its mask shows where."""
    records = [wide(tmp_path / f"{i}.png")._replace(mask=None) for i in range(3)]
    records = [record._replace(hole=record.file if mask_files else None) for record in records]
    count = 1 if mask_files else 2
    views = Views(Size(16, 16), flip=True, crops=3, seed=4, holes=count, full=0.2)
    images = cache_images(records, views, None, folder=tmp_path / "cache", model="")
    with_holes = cache_holes(images, views, hidden, folder=tmp_path / "cache", model="m", batch_size=2)
    assert with_holes.arrays["pixels"] is images.arrays["pixels"]
    hole, kept = with_holes.arrays["hole"], with_holes.arrays["kept"]
    assert hole.shape == (3, 3 * count * 2, 16, 16, 1) and kept.shape == (3, 3 * count * 2, 16, 16, 3)
    np.testing.assert_array_equal(hole[:, 1::2], hole[:, ::2, :, ::-1])
    assert hole.any((1, 2, 3, 4)).all()
    for i, record in enumerate(records):
        for crop in range(3):
            for k in range(count):
                for mirrored in range(2):
                    at = (crop * count + k) * 2 + mirrored
                    pixels = images.arrays["pixels"][i, crop * 2 + mirrored]
                    np.testing.assert_array_equal(kept[i, at], np.where(hole[i, at] == 1, 0, pixels))
                if mask_files:  # half a pixel: only crops of images begin at whole pixels
                    edge = np.abs(pixels[..., :1].astype(int) - 127) <= 3
                    np.testing.assert_array_equal((hole[i, at] == 1) | edge, (pixels[..., :1] > 127) | edge)
                else:
                    expected = random_hole(views.size, 0.2, seed=4, name=record.name, crop=crop, number=k)
                    np.testing.assert_array_equal(hole[i, at - 1, ..., 0], expected)


def test_holes_have_a_separate_entry(folder, tmp_path):
    """The entry depends on everything that makes the holes. The latents are not computed again."""
    views = Views(Size(8, 8), holes=2)
    Image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    Image.new("L", (4, 4), 99).save(tmp_path / "grey.png")
    images = cache_images(scan(folder), views, Encoder(), folder=tmp_path / "cache", model="m")
    batches = []

    def encode(images, holes):
        batches.append(len(images))
        return hidden(images, holes)

    def cached(records=images.records, model="m", **changes):
        changed = views._replace(**changes)
        folder = tmp_path / "cache"
        return cache_holes(images._replace(records=records), changed, encode, folder=folder, model=model).arrays["hole"]

    first = cached()
    assert batches == [4] * 4  # 7 images in full batches, twice
    np.testing.assert_array_equal(cached(), first)
    assert batches == [4] * 4
    white = [record._replace(hole=tmp_path / "white.png") for record in images.records]
    assert cached(white, holes=1).all()
    for changes in ({"model": "n"}, {"seed": 1}, {"full": 1.0}, {"holes": 3}, {"flip": True}, {"background": "red"}):
        before = len(batches)
        changed = cached(**changes)
        assert len(batches) > before, changes
        assert changed.all() == ("full" in changes)
    with pytest.raises(DataError, match=r"grey.png: the mask is nowhere white"):
        cached([record._replace(hole=tmp_path / "grey.png") for record in images.records], holes=1)
    assert len(list((tmp_path / "cache").glob("latents-*"))) == 1


def test_each_picture_is_hashed_once(tmp_path, monkeypatch):
    """The fingerprint of the data set and the cache entries of images, masks and holes share the digests."""
    records = [wide(tmp_path / f"{i}.png") for i in range(3)]
    Image.new("L", (48, 16), 255).save(tmp_path / "hole.png")
    records = [record._replace(hole=tmp_path / "hole.png") for record in records]
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: hashed.append(Path(file.name)) or digest(file, kind))

    def everything():
        identity = fingerprint(records)
        views = Views(Size(16, 16), holes=1)
        images = cache_images(records, views, None, folder=tmp_path / "cache", model="")
        images = cache_masks(images, views, 4, folder=tmp_path / "cache")
        cache_holes(images, views, hidden, folder=tmp_path / "cache", model="m")
        return identity, sorted(path.relative_to(tmp_path).as_posix() for path in hashed if path.suffix == ".png")

    first, names = everything()
    assert names == ["0.png", "1.png", "2.png", "hole.png"]
    assert everything() == (first, names)
    Image.new("L", (48, 16), 7).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", (1e9 + 1, 1e9 + 1))
    second, names = everything()
    assert second != first
    assert names == ["0.png", "1.png", "1.png", "2.png", "hole.png"]
    assert len(list((tmp_path / "cache").iterdir())) == 6  # two of images, two of masks, two of holes


def test_a_cache_that_cannot_be_written_is_an_error(folder):
    (folder.parent / "cache").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the cache in .*set data.cache"):
        latents(folder, Encoder())


class TextEncoder:
    def __init__(self):
        self.asked = []

    def __call__(self, captions):
        self.asked.append(captions)
        lengths = np.array([len(c) for c in captions])
        return {
            "context": jnp.asarray(lengths[:, None, None] * np.ones((1, 2, 3)), jnp.bfloat16),
            "ids": lengths.astype(np.int32)[:, None],
        }


def test_each_caption_once_and_the_empty_one(tmp_path):
    encode = TextEncoder()
    captions = ["bb", "a", "bb", "ccc", "a"]
    for _ in range(2):
        texts = cache_texts(captions, encode, folder=tmp_path, model="m", batch_size=3)
        assert encode.asked == [["", "a", "bb"], ["ccc", "", ""]]
        assert sorted(texts.rows) == ["", "a", "bb", "ccc"]
        for caption, row in texts.rows.items():
            assert texts.arrays["ids"][row, 0] == len(caption)
            assert (texts.arrays["context"][row] == len(caption)).all()
        assert texts.arrays["context"].dtype == np.float32
    cache_texts(captions, encode, folder=tmp_path, model="m", settings={"clip_skip": 2}, batch_size=3)
    assert len(encode.asked) == 4


def test_rows_that_differ_in_shape_are_refused(tmp_path):
    def encode(captions):
        return {"context": np.ones((len(captions), max(map(len, captions)) + 1), np.float32)}

    with pytest.raises(DataError, match="rows must be alike"):
        cache_texts(["a", "bb"], encode, folder=tmp_path, model="m", batch_size=1)


def test_killed_while_writing_leaves_nothing_half_done(folder):
    """Really kills a process in the middle of encoding."""
    code = f"""
        import sys, time
        import numpy as np
        from sdjax.data.cache import Views, cache_images
        from sdjax.data.images import Size
        from sdjax.data.records import scan
        def encode(images):
            print("encoding", flush=True)
            time.sleep(0.2)
            return np.ones((len(images), 1, 1, 4), np.float32)
        cache_images(scan({str(folder)!r}), Views(Size(8, 8)), encode, folder={str(folder.parent / "cache")!r},
                     model="m", batch_size=3)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (leftover,) = (folder.parent / "cache").iterdir()
    assert leftover.name.startswith(".new-")
    assert moments(folder, Encoder())[1, 0, 0, 0, 0] == 30
    assert leftover.exists()  # another run might still write it
    os.utime(leftover, (0, time.time() - 2 * 86400))
    latents(folder, Encoder(), model="other")
    assert not leftover.exists()


def test_the_index_says_what_the_arrays_are(folder):
    latents(folder, Encoder())
    (entry,) = (folder.parent / "cache").iterdir()
    index = json.loads((entry / "index.json").read_text())
    assert index["arrays"]["moments"]["shape"] == [7, 1, 1, 1, 4]
    assert index["arrays"]["moments"]["dtype"] == "float32"


def test_many_captions_lie_in_several_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LARGEST", 3)
    captions = ["x" * length for length in range(7)]
    texts = cache_texts(captions, lambda texts: {"length": np.array([*map(len, texts)])}, folder=tmp_path, model="m")
    assert [int(texts.arrays["length"][texts.rows[caption]]) for caption in captions] == [*range(7)]
    assert len(list(tmp_path.glob("texts-*"))) == 3


def test_images_framed_on_their_subject_have_entries_and_size_conditions_of_their_own(tmp_path):
    image = Image.new("RGB", (64, 48), "white")
    image.paste("red", (10, 20, 29, 39))
    image.save(tmp_path / "a.png")
    record = Record("a.png", tmp_path / "a.png", "x")
    pixels = {}
    for on_subject in (False, True):
        views = Views(Size(16, 16), on_subject=on_subject)
        images = cache_images([record], views, None, folder=tmp_path / "cache", model="")
        (pixels[on_subject],) = images.arrays["pixels"][0]
        (conditions,) = cache_sizes(images, views, folder=tmp_path / "cache").arrays["sizes"][0]
        assert [*conditions] == ([20, 20, 0, 0, 16, 16] if on_subject else [48, 64, 0, 3, 16, 16])
    assert np.mean(pixels[True][..., 1] == 0) > 3 * np.mean(pixels[False][..., 1] == 0)
