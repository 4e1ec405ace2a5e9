"""The character of the examples: its drawings are those of the script, and its captions have its word."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tiny_character
from PIL import Image

import sdjax

PLANA = Path(sdjax.__file__).parent / "tiny" / "plana"


def test_the_drawings_in_the_package_are_those_of_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_character.tiny_sets, "render", lambda svg: svg.encode())
    assert tiny_character.main([str(tmp_path)]) == 0
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == sorted(path.name for path in PLANA.glob("*.svg")) and len(drawn) == 6
    for name in drawn:
        ElementTree.fromstring((tmp_path / name).read_text())
        assert (tmp_path / name).read_text() == (PLANA / name).read_text()


def test_each_pose_has_a_picture_of_its_own_and_a_caption_with_the_word():
    entries = [json.loads(line) for line in (PLANA / "metadata.jsonl").read_text().splitlines()]
    assert {entry["file_name"] for entry in entries} == {path.name for path in PLANA.glob("*.png")}
    assert len({entry["text"] for entry in entries}) == 6 and all("<plana>" in entry["text"] for entry in entries)
    pictures = [np.asarray(Image.open(PLANA / entry["file_name"]).convert("RGBA"), int) for entry in entries]
    assert {picture.shape for picture in pictures} == {(128, 128, 4)}
    for i, picture in enumerate(pictures):
        assert picture[0, 0, 3] == 0  # transparent around the figure
        assert all(np.abs(picture - other).mean() > 1 for other in pictures[:i])
