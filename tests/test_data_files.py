"""What is known of files: found once, found again at the next start, and never of another file."""

import hashlib
import os

import pytest
from PIL import Image

from sdjax.data import files
from sdjax.data.files import Member, file_digest, learn, picture_size
from sdjax.data.images import Size
from sdjax.errors import DataError


@pytest.fixture
def pictures(tmp_path):
    """Ten pictures, of which one cannot be read, and one file that is not there."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Image.new("RGB", (8 + i, 8)).save(path)
    paths[3].write_bytes(b"no picture")
    for path in paths:
        os.utime(path, (1e9, 1e9))
    return [*paths, folder / "gone.png"]


@pytest.fixture
def restarted(monkeypatch):
    """Forgets what the process knows. Returns the function that does it, and the files that were opened since."""
    opened = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: opened.append(file.name) or digest(file, kind))
    monkeypatch.setattr(files, "_AT_ONCE", 4)

    def forget():
        opened.clear()
        monkeypatch.setattr(files, "_known", {})

    forget()
    return forget, opened


def facts(paths):
    sizes = []
    for path in paths:
        try:
            sizes.append(picture_size(path))
        except DataError:
            sizes.append(None)
    return [file_digest(path) for path in paths], sizes


def test_another_start_reads_no_picture(pictures, restarted, tmp_path, monkeypatch):
    forget, opened = restarted
    expected = facts(pictures)
    assert expected[0][-1] == "" and expected[1][3] is expected[1][-1] is None and expected[1][9] == Size(8, 17)
    forget()
    learn(pictures, tmp_path / "cache")
    pictures_opened = [name for name in opened if str(name).endswith(".png")]
    assert len(pictures_opened) == 10
    forget()
    learn(pictures, tmp_path / "cache")
    known = [path for path in pictures if path not in (pictures[3], pictures[-1])]
    monkeypatch.setattr(files, "read_size", None)
    assert [file_digest(path) for path in pictures] == expected[0]
    assert [picture_size(path) for path in known] == [size for size in expected[1] if size]
    assert not [name for name in opened if str(name).endswith(".png")]


def test_what_changed_is_read_again(pictures, restarted, tmp_path):
    forget, opened = restarted
    learn(pictures, tmp_path / "cache")
    Image.new("RGB", (33, 9)).save(pictures[0])
    os.utime(pictures[0], (1e9, 1e9))  # the time of the file is as before
    forget()
    learn(pictures, tmp_path / "cache")
    assert sorted(os.path.basename(name) for name in opened if str(name).endswith(".png")) == [
        *("0.png", "1.png", "2.png", "3.png")  # the entry of the changed file
    ]
    assert picture_size(pictures[0]) == Size(9, 33)
    assert file_digest(pictures[0]) == hashlib.sha256(pictures[0].read_bytes()).hexdigest()


def test_what_has_just_been_written_is_not_kept(pictures, restarted, tmp_path):
    forget, opened = restarted
    pictures[1].touch()
    learn(pictures[:2], tmp_path / "cache")
    forget()
    learn(pictures[:2], tmp_path / "cache")
    assert [file_digest(path) for path in pictures[:2]] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in pictures[:2]
    ]
    assert [os.path.basename(name) for name in opened if str(name).endswith(".png")] == ["1.png"]


def test_a_member_knows_itself():
    member = Member("a.tar/b.png", "ab", Size(3, 4), lambda: b"content")
    assert (file_digest(member), picture_size(member), str(member)) == ("ab", Size(3, 4), "a.tar/b.png")
    assert member.open("rb").read() == files.loaded(member).open("rb").read() == b"content"
    with pytest.raises(DataError, match=r"a.tar/b.png: cannot be read as an image"):
        picture_size(member._replace(size=files.NO_SIZE))
