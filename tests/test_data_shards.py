"""Shards as a source: their pictures are those of a folder, and they are read once."""

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_data_tar import write_tar

from sdjax.data import shards
from sdjax.data.buckets import assign
from sdjax.data.cache import Views, cache_images
from sdjax.data.files import file_digest, picture_size
from sdjax.data.images import Size
from sdjax.data.records import Record, fingerprint, scan, split, with_masks
from sdjax.errors import DataError


def picture(number, size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (20 * number, 0, 255)).save(file, "PNG")
    return file.getvalue()


PICTURES = {f"{i:03}": (picture(i, (16, 16) if i % 3 else (32, 16)), f"number {i}") for i in range(10)}


def aged(path):
    os.utime(path, (1e9, 1e9))
    return path


def folder(place):
    place.mkdir()
    for name, (content, caption) in PICTURES.items():
        (place / f"{name}.png").write_bytes(content)
        (place / f"{name}.txt").write_text(caption)
    return place


def tars(place, pictures=PICTURES, size=4):
    place.mkdir(exist_ok=True)
    names = sorted(pictures)
    for start in range(0, len(names), size):
        members = {}
        for name in names[start : start + size]:
            members |= {f"{name}.png": pictures[name][0], f"{name}.txt": pictures[name][1].encode()}
        aged(write_tar(place / f"{start // size}.tar", members))
    return place


def parquet(place):
    place.mkdir()
    images = [{"bytes": content, "path": None} for content, _ in PICTURES.values()]
    table = pa.table({"image": images, "text": [caption for _, caption in PICTURES.values()]})
    for start in range(0, len(images), 6):
        pq.write_table(table[start : start + 6], place / f"{start}.parquet", row_group_size=4)
        aged(place / f"{start}.parquet")
    return place


@pytest.mark.parametrize("make", [tars, parquet])
@pytest.mark.parametrize("keep", [False, True])
def test_shards_hold_what_a_folder_holds(tmp_path, make, keep):
    """The cache does not know the difference: what a folder's pictures became is found again."""
    expected = scan(folder(tmp_path / "folder"))
    kept = tmp_path / "cache" if keep else None
    found = scan(make(tmp_path / "shards"), keep=kept)
    assert [record.caption for record in found] == [record.caption for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.file.open("rb").read() == theirs.file.read_bytes()
        assert file_digest(ours.file) == file_digest(theirs.file)
        assert picture_size(ours.file) == picture_size(theirs.file)
    choices = [Size(16, 16), Size(16, 32)]
    buckets = [assign(records, choices) for records in (found, expected)]
    assert [[record.caption for record in members] for members in buckets[0].values()] == [
        [record.caption for record in members] for members in buckets[1].values()
    ]
    arrays = [
        cache_images(records, Views(Size(16, 16)), None, folder=tmp_path / "cache", model="").arrays["pixels"]
        for records in (expected, found)
    ]
    assert len(list((tmp_path / "cache").glob("pixels-*"))) == 1
    np.testing.assert_array_equal(*arrays)


def test_names_lie_under_their_shard(tmp_path):
    tars(tmp_path / "shards")
    (tmp_path / "shards" / "sub").mkdir()
    (tmp_path / "shards" / "2.tar").rename(tmp_path / "shards" / "sub" / "2.tar")
    records = scan(tmp_path / "shards", repeats={"sub/*": 3, "1.tar/004*": 0})
    assert [record.name for record in records][3:] == [
        *("0.tar/003.png", "1.tar/005.png", "1.tar/006.png", "1.tar/007.png", "sub/2.tar/008.png", "sub/2.tar/009.png"),
    ]
    assert [record.repeats for record in records][-3:] == [1, 3, 3]
    training, held_out = split(records, count=3)
    assert sorted(record.name for record in (*training, *held_out)) == sorted(record.name for record in records)
    assert isinstance(held_out[0], Record)


def test_an_unchanged_shard_is_not_read_again(tmp_path, monkeypatch):
    place = tars(tmp_path / "shards")
    first = fingerprint(scan(place, keep=tmp_path / "cache"))
    read = []
    tar = shards.READERS[".tar"]
    monkeypatch.setitem(shards.READERS, ".tar", lambda path, columns: read.append(path.name) or tar(path, columns))
    assert fingerprint(scan(place, keep=tmp_path / "cache")) == first
    assert read == []
    changed = {**PICTURES, "005": (picture(9), "number 5")}
    tars(place, changed)
    os.utime(place / "1.tar", (1e9 + 1, 1e9 + 1))
    second = fingerprint(scan(place, keep=tmp_path / "cache"))
    assert read == ["1.tar"]
    assert {name for name in first if first[name] != second[name]} == {"1.tar/005.png"}


def test_a_shard_that_was_just_written_is_read_each_time(tmp_path, monkeypatch):
    """A second change within the same tick of the clock would not be seen."""
    place = tars(tmp_path / "shards")
    (place / "0.tar").touch()
    for _ in range(2):
        scan(place, keep=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_shard_that_changes_under_a_run_stops_it(tmp_path):
    """Even where bad images are skipped: otherwise they would be remembered as bad ones."""
    place = tars(tmp_path / "shards")
    records = scan(place, keep=tmp_path / "cache")
    os.utime(place / "2.tar", (2e9, 2e9))
    with pytest.raises(DataError, match=r"2.tar has changed since the run began"):
        cache_images(records, Views(Size(16, 16)), None, folder=tmp_path / "cache", model="", on_bad_image="skip")
    assert not list((tmp_path / "cache").glob("pixels-*"))


def test_bad_pictures_follow_the_policy(tmp_path):
    """Those of a folder and those of a shard are read by the same code, with the same guards."""
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    bad = {"a": (b"text", "x"), "b": (b"", "x"), "c": (bomb.getvalue(), "x"), "d": (picture(1)[:60], "x")}
    place = tars(tmp_path / "shards", {**PICTURES, **bad})
    records = scan(place, keep=tmp_path / "cache")
    with pytest.raises(DataError, match=r"3?.tar/a.png: cannot be read as an image.*on_bad_image = 'skip'"):
        cache_images(records, Views(Size(16, 16)), None, folder=tmp_path / "cache", model="")
    images = cache_images(records, Views(Size(16, 16)), None, folder=tmp_path / "cache", model="", on_bad_image="skip")
    assert [record.name for record in images.records] == [record.name for record in records][:10]
    assert len(images.skipped) == 4


def test_many_pictures_are_listed_in_pieces(tmp_path, monkeypatch):
    whole = [tuple(record)[:1] + tuple(record)[2:] for record in scan(tars(tmp_path / "shards", size=10))]
    monkeypatch.setattr(shards, "_AT_ONCE", 3)
    for keep in (None, tmp_path / "cache"):
        again = scan(tmp_path / "shards", keep=keep)
        assert [tuple(record)[:1] + tuple(record)[2:] for record in again] == whole


def test_masks_are_found_by_the_names_in_the_shard(tmp_path):
    place = tars(tmp_path / "shards", size=10)
    masks = tmp_path / "masks" / "0.tar"
    masks.mkdir(parents=True)
    for name in PICTURES:
        (masks / f"{name}.png").write_bytes(picture(1))
    records = with_masks(scan(place), tmp_path / "masks")
    assert records[3].mask == masks / "003.png" and records[3:][0].mask == masks / "003.png"


def test_a_large_set_has_a_fingerprint_for_each_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("sdjax.data.records.MOST_NAMED", 9)
    place = tars(tmp_path / "shards")
    first = fingerprint(scan(place))
    assert list(first) == ["0.tar", "1.tar", "2.tar"]
    tars(place, {**PICTURES, "005": (picture(5), "another caption")})
    second = fingerprint(scan(place))
    assert [name for name in first if first[name] != second[name]] == ["1.tar"]


def test_more_shards_than_a_process_may_open(tmp_path):
    resource = pytest.importorskip("resource")
    place = tars(tmp_path / "shards", {f"{i:03}": (picture(i % 12), "x") for i in range(120)}, size=1)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most[1]))
    try:
        for _ in range(2):
            records = scan(place, keep=tmp_path / "cache")
            assert len({record.file.open("rb").read() for record in records}) == 12
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
