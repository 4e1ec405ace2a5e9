"""The command that draws the embedded model's own subjects writes a folder that a run takes."""

import own_pictures
from PIL import Image

from sdjax.data.records import scan


def test_the_pictures_have_their_subjects_as_captions(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(own_pictures, "AT_ONCE", 2)
    own_pictures.main([str(tmp_path / "pictures"), "--count", "3", "--steps", "1"])
    found = scan(tmp_path / "pictures")
    assert [record.caption for record in found] == ["grinning face", "grinning face with big eyes", found[2].caption]
    assert {Image.open(path).copy().size for path in (tmp_path / "pictures").glob("*.png")} == {(64, 64)}
