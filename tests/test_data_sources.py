"""What data.path may name: a folder of pictures, shards, one shard or a pattern."""

import pytest
from test_data_parquet import structs, write_parquet
from test_data_records import image
from test_data_tar import write_tar

from sdjax.data.records import scan
from sdjax.errors import DataError


def tar(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, {"a.png": b"x", "a.txt": b"caption"})


def names(path):
    return [record.name for record in scan(path)]


def test_a_folder_a_shard_and_a_pattern(tmp_path, monkeypatch):
    for name in ("x/1.tar", "x/0.TAR", "y/2.tar", ".hidden/3.tar"):
        tar(tmp_path / "set" / name)
    assert names(tmp_path / "set") == ["x/0.TAR/a.png", "x/1.tar/a.png", "y/2.tar/a.png"]
    assert names(tmp_path / "set" / "x" / "1.tar") == ["1.tar/a.png"]
    assert names(f"{tmp_path}/set/*/[12].tar") == ["x/1.tar/a.png", "y/2.tar/a.png"]
    assert names(f"{tmp_path}/set/**/*.tar") == ["x/1.tar/a.png", "y/2.tar/a.png"]
    monkeypatch.chdir(tmp_path)
    assert names("set/x/*.tar") == ["1.tar/a.png"]


def test_a_folder_with_metadata_is_one_of_pictures(tmp_path):
    image(tmp_path / "a.png")
    tar(tmp_path / "backup.tar")
    with pytest.raises(DataError, match=r"holds pictures \(a.png\) and shards \(backup.tar\): name the shards by"):
        scan(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert names(tmp_path) == ["a.png"]


def test_the_parts_of_a_data_set_are_not_mixed(tmp_path):
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / f"{name}.parquet", {"image": structs(b"x"), "text": ["y"]})
    with pytest.raises(
        DataError, match=r"several parts of a data set \(test, train\): name one .*data/t\w+\*.parquet'"
    ):
        scan(tmp_path)
    assert names(f"{tmp_path}/data/train*.parquet") == [
        "train-00000-of-00002.parquet/000000",
        "train-00001-of-00002.parquet/000000",
    ]
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "data.path = .*nowhere' is not a folder, a .parquet or .tar file, or a pattern"),
        ("*.tar", r"data.path = .*\*.tar' matches no file"),
        ("a.zip", "a.zip is not a shard; expected .parquet or .tar"),
        ("*.*", "is not a shard|both .parquet and .tar"),
        ("mixed", "holds both .parquet and .tar files"),
    ],
)
def test_paths_that_are_no_source(tmp_path, path, message):
    (tmp_path / "a.zip").write_bytes(b"")
    tar(tmp_path / "mixed" / "a.tar")
    (tmp_path / "mixed" / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=message):
        scan(tmp_path / path)
