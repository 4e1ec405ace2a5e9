"""Parquet files as the Hugging Face hub has them, good and bad."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdjax.data.parquet import ParquetReader
from sdjax.errors import ConfigError, DataError


def write_parquet(path, columns, **settings):
    pq.write_table(pa.table(columns), path, **settings)
    return path


def structs(*contents):
    return [{"bytes": content, "path": f"{i}.jpg"} for i, content in enumerate(contents)]


def listed(path, *columns):
    return [(found.key, found.caption, found.content) for found in ParquetReader(path, *columns).pictures()]


def test_pictures_and_captions_are_found_by_the_usual_names(tmp_path):
    columns = {"text": ["one", None, " two "], "image": structs(b"a", b"b", None), "other": [1, 2, 3]}
    columns["image"][2]["path"] = None
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert listed(path) == [("000000", "one", b"a"), ("000001", "", b"b"), ("000002", "two", b"")]


def test_columns_may_be_named(tmp_path):
    columns = {"image": structs(b"a"), "photo": [b"b"], "text": ["one"], "long": pa.array(["two"], pa.large_string())}
    path = write_parquet(tmp_path / "a.parquet", columns)
    assert listed(path, "photo", "long") == [("000000", "two", b"b")]
    alone = write_parquet(tmp_path / "b.parquet", {"photo": [b"c"], "prompt": pa.array(["x"]).dictionary_encode()})
    assert listed(alone) == [("000000", "x", b"c")]
    assert listed(write_parquet(tmp_path / "c.parquet", {"image": structs(b"d")})) == [("000000", "", b"d")]


def test_any_picture_can_be_read_in_any_order(tmp_path):
    contents = [str(i).encode() * 100 for i in range(500)]
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(*contents)}, row_group_size=150)
    reader = ParquetReader(path)
    places = [found.place for found in reader.pictures()]
    for row in (0, 1, 149, 150, 499, 3, 3, 2, 400, 410):
        assert reader.read(places[row]) == contents[row]


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"text": ["x"]}, (), "no column of pictures; it has text .data.image_column names one"),
        ({"a": [b"x"], "b": [b"y"]}, (), "no column of pictures; it has a, b"),
        ({"image": [b"x"]}, ("picture",), "no column of 'picture'; it has image .data.image_column"),
        ({"image": [b"x"]}, ("", "label"), "no column of 'label'; it has image .data.caption_column"),
        ({"image": ["a.jpg"]}, (), "column image holds string; expected the bytes of pictures"),
        ({"image": [b"x"], "text": [["a", "b"]]}, (), r"column text holds list<.*; expected text"),
        ({"image": [{"bytes": None, "path": "a.jpg"}]}, (), "column image holds .*; expected the bytes"),
        ({"image": structs(b"x", None)}, (), "names pictures .1.jpg. but does not hold them"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, columns, names, message):
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=message):
        listed(path, *names)


def test_a_caption_that_is_no_text_is_named(tmp_path):
    text = pa.array([b"na\xefve"]).view(pa.string())
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(b"x"), "text": text})
    with pytest.raises(DataError, match=r"a.parquet is no readable parquet file: 'utf-8' codec"):
        listed(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 9),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_text("a text"),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:2000] + path.read_bytes()[5000:]),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    contents = [os.urandom(100) for _ in range(200)]
    path = write_parquet(tmp_path / "a.parquet", {"image": structs(*contents)})
    damage(path)
    with pytest.raises(DataError, match=r"a.parquet is no readable parquet file"):
        listed(path)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'a.parquet is read by pyarrow: pip install "sdjax\[data\]"'):
        ParquetReader(tmp_path / "a.parquet")
