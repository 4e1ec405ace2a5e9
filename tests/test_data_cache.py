"""Latents and embeddings: computed once, kept on disk, and computed again when anything is wrong with them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax.data.cache import cache_latents, cache_texts
from sdjax.data.records import Record, scan
from sdjax.errors import DataError


class Encoder:
    """Stands for the VAE: each image's mean colour, and how often it was asked."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(images.shape)
        left = images[:, :, :4].astype(np.float32).mean((1, 2), keepdims=True)
        return jnp.concatenate([left, -left[..., :1]], axis=-1)


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
    settings = {"folder": folder.parent / "cache", "model": "m", "resolution": 8, "batch_size": 3, **changes}
    return cache_latents(scan(folder), encode, **settings)


def test_encoded_once_in_full_batches(folder):
    encode, seen = Encoder(), []
    first = latents(folder, encode, progress=lambda done, total: seen.append((done, total)))
    assert encode.shapes == [(3, 8, 8, 3)] * 3
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert isinstance(first.moments, np.memmap)
    assert first.moments.shape == (7, 1, 1, 1, 4)
    np.testing.assert_allclose(first.moments[:, 0, 0, 0, 0], [30 * i for i in range(7)])
    assert [r.name for r in first.records] == [f"{i}.png" for i in range(7)]
    again = latents(folder, encode)
    assert len(encode.shapes) == 3
    np.testing.assert_array_equal(again.moments, first.moments)


def test_both_flips_are_encoded(folder):
    moments = latents(folder, Encoder(), flip=True).moments
    assert moments.shape == (7, 2, 1, 1, 4)
    assert (moments[:, 0, 0, 0, 1] == 0).all()
    assert (moments[:, 1, 0, 0, 1] == 255).all()


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"resolution": 16}, {"background": "black"}, {"flip": True}], ids=str
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
    assert latents(folder, encode).moments[0, 0, 0, 0, 0] == 99


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
    before = np.array(latents(folder, encode).moments)
    (entry,) = (folder.parent / "cache").iterdir()
    damage(entry)
    after = latents(folder, encode).moments
    assert len(encode.shapes) == 6
    assert "is damaged" in caplog.text
    np.testing.assert_array_equal(after, before)


def test_bad_images_are_skipped_counted_and_remembered(folder, caplog):
    (folder / "2.png").write_bytes(b"text")
    (folder / "6.png").write_bytes(b"")
    encode = Encoder()
    with pytest.raises(DataError, match=r"2.png: cannot be read .*on_bad_image = 'skip'"):
        latents(folder, encode)
    assert not list((folder.parent / "cache").iterdir())
    first = latents(folder, encode, on_bad_image="skip")
    assert "2 of 7 images skipped" in caplog.text
    for result in (first, latents(folder, None, on_bad_image="skip")):
        assert [r.name for r in result.records] == ["0.png", "1.png", "3.png", "4.png", "5.png"]
        np.testing.assert_allclose(result.moments[:, 0, 0, 0, 0], [0, 30, 90, 120, 150])
        assert len(result.skipped) == 2
    assert set(encode.shapes) == {(3, 8, 8, 3)}
    with pytest.raises(DataError, match=r"2.png"):
        latents(folder, None)


def test_nothing_but_bad_images(tmp_path):
    records = (Record("gone.png", tmp_path / "gone.png", "x"),)
    with pytest.raises(DataError, match=r"none of 1 images can be used; the first: .*gone.png"):
        cache_latents(records, Encoder(), folder=tmp_path, model="m", resolution=8, on_bad_image="skip")


def test_a_cache_that_cannot_be_written_is_said(folder):
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
    """kill -9 in the middle of encoding, for real."""
    code = f"""
        import sys, time
        import numpy as np
        from sdjax.data.cache import cache_latents
        from sdjax.data.records import scan
        def encode(images):
            print("encoding", flush=True)
            time.sleep(0.2)
            return np.ones((len(images), 1, 1, 4), np.float32)
        cache_latents(scan({str(folder)!r}), encode, folder={str(folder.parent / "cache")!r},
                      model="m", resolution=8, batch_size=3)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    (leftover,) = (folder.parent / "cache").iterdir()
    assert leftover.name.startswith(".new-")
    assert latents(folder, Encoder()).moments[1, 0, 0, 0, 0] == 30
    assert leftover.exists()  # it might still be in use
    os.utime(leftover, (0, time.time() - 2 * 86400))
    latents(folder, Encoder(), model="other")
    assert not leftover.exists()


def test_the_index_says_what_the_arrays_are(folder):
    latents(folder, Encoder())
    (entry,) = (folder.parent / "cache").iterdir()
    index = json.loads((entry / "index.json").read_text())
    assert index["arrays"]["moments"]["shape"] == [7, 1, 1, 1, 4]
    assert index["arrays"]["moments"]["dtype"] == "float32"
