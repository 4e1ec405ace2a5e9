"""Tars in the layout of WebDataset, good and bad."""

import io
import json
import os
import tarfile

import pytest

from sdjax.data.tar import TarReader
from sdjax.errors import DataError


def write_tar(path, members, mode="w"):
    """members: name -> contents, or pairs."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def listed(path, caption=""):
    return {found.key: (found.caption, found.content) for found in TarReader(path, caption).pictures()}


def test_pictures_with_captions_beside_them(tmp_path):
    members = {
        "b/0001.jpg": b"first",
        "b/0001.txt": "ein Bär\n".encode(),
        "./0002.PNG": b"second",
        "0002.json": json.dumps({"text": "two", "caption": "a pair", "own": "mine"}).encode(),
        "0003.json": b'{"caption": "not this"}',
        "0003.txt": b"three",
        "0003.webp": b"third",
        "0004.jpg": b"none",
        "0004.mask.png": b"of another kind",
        "0005.jpg": b"broken",
        "0005.txt": b"na\xefve",
        "._0001.jpg": b"hidden",
        "notes.md": b"",
    }
    path = write_tar(tmp_path / "a.tar", members)
    assert listed(path) == {
        "b/0001.jpg": ("ein Bär", b"first"),
        "0002.png": ("a pair", b"second"),
        "0003.webp": ("three", b"third"),
        "0004.jpg": ("", b"none"),
        "0005.jpg": ("", b"broken"),
    }
    assert listed(path, "own")["0002.png"] == ("mine", b"second")
    for found in TarReader(path).pictures():
        assert TarReader(path).read(found.place) == found.content


def test_names_that_lead_elsewhere_are_names_only(tmp_path, monkeypatch):
    """Nothing is extracted, and links are no pictures."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../../out.jpg", "/etc/out.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert listed(path) == {"../../out.jpg": ("", b"abc"), "/etc/out.jpg": ("", b"abc")}
    assert os.listdir(tmp_path) == ["a.tar"]


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def twice(path):
    path.write_bytes(path.read_bytes() * 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(path, 600), "a.tar .*unexpected end of data"),
        (lambda path: os.truncate(path, 1024), "cut off"),  # just between two members
        (lambda path: os.truncate(path, 1300), "a.tar"),  # within a header
        (lambda path: os.truncate(path, 0), "no readable tar"),
        (lambda path: flip(path, 0), "no readable tar"),
        (lambda path: flip(path, 1024), "damaged at byte 1024"),
        (twice, "damaged at byte .*joined"),
        (lambda path: write_tar(path, {"0001.jpg": b"x"}, "w:gz"), "compressed tars"),
        (lambda path: path.write_text("a text"), "no readable tar"),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: write_tar(path, [("1.jpg", b"x"), ("1.jpg", b"y")]), "holds 1 twice: 1.jpg and 1.jpg"),
        (lambda path: write_tar(path, {"1.jpg": b"x", "1.png": b"y"}), "holds 1 twice: 1.jpg and 1.png"),
        (lambda path: write_tar(path, {"1.json": b"{"}), "1.json is not JSON"),
        (lambda path: write_tar(path, {"1.json": b'{"text": ["a"]}'}), "the caption of 1.json is not text"),
    ],
)
def test_bad_tars_are_named(tmp_path, damage, message):
    path = write_tar(tmp_path / "a.tar", {"0001.jpg": b"first" * 50, "0002.jpg": b"second"})
    assert len(listed(path)) == 2
    damage(path)
    with pytest.raises(DataError, match=message):
        listed(path)
