"""Records of folders of captioned images, good and bad."""

import hashlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdjax.data.files import file_digest
from sdjax.data.records import Record, fingerprint, scan, split, with_masks
from sdjax.errors import DataError


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path)


def listed(folder, *entries):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")


def captions(records):
    return {record.name: record.caption for record in records}


def test_captions_beside_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "sub/c.webp", ".hidden/d.png"):
        image(tmp_path / name)
    (tmp_path / "a.txt").write_text("an apple\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\ufeffein Bär", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not an image")
    records = scan(tmp_path, caption="a thing")
    assert captions(records) == {"a.jpg": "an apple", "b.PNG": "ein Bär", "sub/c.webp": "a thing"}
    assert [r.name for r in records] == sorted(r.name for r in records)


def test_metadata_rules(tmp_path):
    for name in ("a.png", "sub/b.png", "unlisted.png"):
        image(tmp_path / name)
    (tmp_path / "a.txt").write_text("not this")
    listed(tmp_path, {"file_name": "a.png", "text": "an apple"}, {"file_name": "sub/../sub/b.png", "text": "a bear"})
    assert captions(scan(tmp_path)) == {"a.png": "an apple", "sub/b.png": "a bear"}


def test_a_caption_may_hold_any_character(tmp_path):
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    lines = [{"file_name": "a.png", "text": "one\u2028two\u0085three"}, {"file_name": "b.png", "text": "four"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    assert set(captions(scan(tmp_path)).values()) == {"one\u2028two\u0085three", "four"}


def test_missing_captions_follow_the_policy(tmp_path, caplog):
    for name in ("blank.png", "broken.png", "good.png", "none.png"):
        image(tmp_path / name)
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "broken.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match=r"no caption for blank.png, broken.png, none.png; .*missing_caption"):
        scan(tmp_path)
    assert captions(scan(tmp_path, missing_caption="skip")) == {"good.png": "good"}
    assert "broken.txt is not UTF-8" in caplog.text
    empty = scan(tmp_path, missing_caption="empty")
    assert captions(empty) == {"blank.png": "", "broken.png": "", "good.png": "good", "none.png": ""}
    assert captions(scan(tmp_path, caption="all"))["blank.png"] == "all"


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "link.png", "linked/out.png"])
def test_metadata_stays_inside_the_folder(tmp_path, name):
    image(tmp_path / "out.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "linked").symlink_to(tmp_path)
    listed(root, {"file_name": name, "text": "x"})
    with pytest.raises(DataError, match=r"line 1: 'out.png' leads out|line 1: 'link.png' leads out"):
        scan(root)


def test_links_stay_inside_the_folder(tmp_path):
    image(tmp_path / "out.png")
    root = tmp_path / "root"
    image(root / "in.png")
    (root / "alias.png").symlink_to(root / "in.png")
    assert captions(scan(root, caption="x")) == {"alias.png": "x", "in.png": "x"}
    (root / "link.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(DataError, match=r"'link.png' leads out of the folder"):
        scan(root, caption="x")
    (root / "link.png").unlink()
    (tmp_path / "secret").write_text("secret")
    (root / "in.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"'in.txt' leads out of the folder"):
        scan(root, caption="x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", "line 2: expected"),
        ('{"text": "x"}', "line 2: expected"),
        ('{"file_name": "b.png", "text": 3}', "line 2: text = 3"),
        ('{"file_name": "a.png", "text": "again"}', "line 2: a.png is listed twice"),
        ('{"file_name": "b\\u0000.png"}', r"line 2: 'b\\x00.png' is no name of a file"),
        ('{"file_name": "b\\ud83d.png"}', "line 2 is not JSON: holds half of a character"),
        ('{"file_name": "b.png", "text": "half \\ud83d"}', "line 2 is not JSON: holds half of a character"),
        ('{"file_name": "b.png", "text": ' + "[" * 100_000, "line 2 is not JSON: nested too deeply"),
        ('{"file_name": "b.png", "text": ' + "1" * 5000 + "}", "line 2 is not JSON: a number has too many digits"),
        ('{"file_name": "' + "b" * 5000 + '"}', "line 2: 'b+' is no name of a file"),
        ('{"file_name": "circle/b.png"}', "line 2: 'b.png' is no name of a file|leads out"),
    ],
    ids=lambda value: value[:40],
)
def test_malformed_metadata(tmp_path, line, message):
    image(tmp_path / "a.png")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(DataError, match=message):
        scan(tmp_path)


def test_folders_name_and_repeat_their_images(tmp_path):
    """As in kohya's scripts: 3_red cat/ holds pictures of a red cat, which an epoch shows three times each."""
    for name in ("3_red cat/a.png", "3_red cat/b.png", "2_/c.png", "dog/d.png", "0_none/e.png", "1_x/00010_y/f.png"):
        image(tmp_path / name)
    (tmp_path / "3_red cat" / "b.txt").write_text("its own")
    (tmp_path / "2_" / "c.txt").write_text("named")
    records = scan(tmp_path, missing_caption="folder")
    assert {record.name: (record.repeats, record.caption) for record in records} == {
        "1_x/00010_y/f.png": (10, "y"),
        "2_/c.png": (2, "named"),
        "3_red cat/a.png": (3, "red cat"),
        "3_red cat/b.png": (3, "its own"),
        "dog/d.png": (1, "dog"),
    }
    image(tmp_path / "g.png")
    with pytest.raises(DataError, match=r"no caption for g.png; .*in no sub-folder"):
        scan(tmp_path, missing_caption="folder")


def test_a_date_in_the_name_of_a_folder_is_no_number_of_repeats(tmp_path):
    image(tmp_path / "20240101_trip" / "a.png")
    with pytest.raises(DataError, match=r"'20240101_trip' asks for each image 20240101 times, at most 9999"):
        scan(tmp_path, missing_caption="folder")
    (record,) = scan(tmp_path, missing_caption="folder", repeats={"*": 2})
    assert (record.repeats, record.caption) == (2, "trip")


def test_the_pictures_of_the_package_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {record.file.is_file() for record in scan("sdjax/tiny/samples")} == {True}
    image(tmp_path / "sdjax" / "tiny" / "samples" / "mine.png")  # a folder that is there comes first
    assert [record.name for record in scan("sdjax/tiny/samples", caption="a picture")] == ["mine.png"]


def test_repeats_by_pattern(tmp_path, caplog):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png", "5_dog/b.png", "c.png"):
        image(tmp_path / name)
    repeats = {"cat/b*": 0, "cat/*": 4, "*dog/*": 2, "bird/*": 9}
    records = scan(tmp_path, caption="x", repeats=repeats)
    assert {r.name: r.repeats for r in records} == {"cat/a.png": 4, "dog/a.png": 2, "5_dog/b.png": 2, "c.png": 1}
    assert "data.repeats: no image in" in caplog.text
    assert "bird/*" in caplog.text
    assert caplog.text.count("data.repeats") == 1
    assert scan(tmp_path, missing_caption="folder", repeats={"c.png": 0, "5_dog/*": 2})[0].repeats == 2
    with pytest.raises(DataError, match="no images with captions"):
        scan(tmp_path, caption="x", repeats={"*": 0})


def test_an_image_left_out_needs_no_caption(tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("an apple")
    assert captions(scan(tmp_path, repeats={"b.png": 0})) == {"a.png": "an apple"}


def test_masks_have_the_names_of_their_images(tmp_path):
    for name in ("images/a.jpg", "images/sub/b.png", "masks/a.png", "masks/sub/b.webp", "masks/more.png"):
        image(tmp_path / name)
    records = with_masks(scan(tmp_path / "images", caption="x"), tmp_path / "masks")
    assert [r.mask for r in records] == [tmp_path / "masks" / "a.png", tmp_path / "masks" / "sub" / "b.webp"]
    first = fingerprint(records)
    assert first != fingerprint(scan(tmp_path / "images", caption="x"))
    Image.new("RGB", (8, 8), "white").save(tmp_path / "masks" / "a.png")
    assert fingerprint(records) != first
    (tmp_path / "masks" / "sub" / "b.webp").unlink()
    with pytest.raises(DataError, match=r"masks: no mask for sub/b.png; a white image"):
        with_masks(records, tmp_path / "masks")
    with pytest.raises(DataError, match=r"data.mask_path = .*nowhere' is not a folder"):
        with_masks(records, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data.inpaint_mask_path = .*nowhere' is not a folder"):
        with_masks(records, tmp_path / "nowhere", "hole")
    with pytest.raises(DataError, match=r"no mask for sub/b.png; a white image of that name paints all of it"):
        with_masks(records, tmp_path / "masks", "hole")
    (hole,) = with_masks(records[:1], tmp_path / "masks", "hole")
    assert hole.hole == hole.mask == tmp_path / "masks" / "a.png"
    assert len({str(fingerprint([r])) for r in (hole, records[0], hole._replace(mask=None))}) == 3
    image(tmp_path / "out.png")
    (tmp_path / "masks" / "sub" / "b.png").symlink_to(tmp_path / "out.png")
    with pytest.raises(DataError, match=r"'b.png' leads out of the folder"):
        with_masks(records, tmp_path / "masks")


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match=r"no images with captions; expected .avif"):
        scan(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        scan(tmp_path / "nowhere")
    image(tmp_path / "a.png")
    with pytest.raises(DataError, match="no images with captions"):
        scan(tmp_path, missing_caption="skip")


def test_an_image_that_is_listed_but_absent_is_a_record(tmp_path):
    listed(tmp_path, {"file_name": "gone.png", "text": "x"})
    assert captions(scan(tmp_path)) == {"gone.png": "x"}


def test_unlisted_images_are_counted(tmp_path, caplog):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    listed(tmp_path, {"file_name": "a.png", "text": "x"})
    with caplog.at_level(logging.INFO):
        scan(tmp_path)
    assert "1 images are not in metadata.jsonl" in caplog.text


NAMES = st.lists(st.text("abcdefgh0123456789", min_size=1, max_size=6), min_size=3, unique=True, max_size=40)


@given(NAMES, st.data())
def test_the_held_out_part_depends_on_names_alone(names, data):
    records = tuple(Record(name, None, "") for name in sorted(names))
    count = data.draw(st.integers(0, len(names) - 1))
    train, held_out = split(records, count=count)
    assert len(held_out) == count
    assert sorted(train + held_out) == sorted(records)
    shuffled = data.draw(st.permutations(records))
    assert set(split(shuffled, count=count)[1]) == set(held_out)
    # One more image moves at most one of the held-out ones back.
    more = (*records, Record("zzzzzzz", None, ""))
    assert len(set(held_out) - set(split(more, count=count)[1])) <= 1


def test_a_fraction_holds_out_at_least_one_and_never_all():
    records = tuple(Record(str(i), None, "") for i in range(10))
    assert len(split(records, fraction=0.01)[1]) == 1
    assert len(split(records, fraction=0.3)[1]) == 3
    assert split(records) == (records, ())
    with pytest.raises(DataError, match="nothing left to train on"):
        split(records, count=10)
    with pytest.raises(DataError, match="1 of 1 images held out"):
        split(records[:1], fraction=0.1)


def test_the_fingerprint_sees_every_change(tmp_path):
    image(tmp_path / "a.png")
    records = scan(tmp_path, caption="x")
    first = fingerprint(records)
    (tmp_path / "a.png").touch()
    assert fingerprint(records) == first
    assert fingerprint(scan(tmp_path, caption="y")) != first
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    assert fingerprint(records) != first


@pytest.fixture
def hashed(monkeypatch):
    """The files that were hashed, one entry each time."""
    paths = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: paths.append(Path(file.name)) or digest(file, kind))
    return paths


def aged(path, seconds=3600):
    """Makes a file look as if it was last changed some time ago."""
    changed = time.time_ns() - seconds * 10**9
    os.utime(path, ns=(changed, changed))
    return path


def test_a_file_is_hashed_once(tmp_path, hashed, monkeypatch):
    (tmp_path / "a").write_bytes(b"a" * 5000)
    path = aged(tmp_path / "a")
    digests = {file_digest(path) for _ in range(3)}
    monkeypatch.chdir(tmp_path)
    assert digests | {file_digest(path.relative_to(tmp_path))} == {hashlib.sha256(b"a" * 5000).hexdigest()}
    assert hashed == [path]


def same_size(path):
    path.write_bytes(b"b" * 5000)


def same_size_and_time(path):
    times = path.stat()
    path.write_bytes(b"b" * 5000)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def another_file_in_its_place(path):
    times = path.stat()
    path.with_name("new").write_bytes(b"b" * 5000)
    os.utime(path.with_name("new"), ns=(times.st_atime_ns, times.st_mtime_ns))
    path.with_name("new").rename(path)


@pytest.mark.parametrize("change", [same_size, same_size_and_time, another_file_in_its_place])
def test_a_changed_file_is_hashed_again(tmp_path, change):
    (tmp_path / "a").write_bytes(b"a" * 5000)
    path = aged(tmp_path / "a")
    first = file_digest(path)
    time.sleep(0.02)  # longer than the steps in which file systems count time
    change(path)
    assert file_digest(path) == hashlib.sha256(b"b" * 5000).hexdigest() != first
    path.unlink()
    assert file_digest(path) == ""


def test_two_changes_in_quick_succession_are_both_seen(tmp_path):
    """A file system may give both the same time."""
    for i in range(50):
        content = f"{i:05}".encode()
        (tmp_path / "a").write_bytes(content)
        assert file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_files_are_hashed_by_several_threads(tmp_path, hashed):
    paths = [tmp_path / str(i) for i in range(40)]
    for i, path in enumerate(paths):
        path.write_text(str(i))
        aged(path)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(file_digest, paths * 3))
        assert digests == [hashlib.sha256(str(i).encode()).hexdigest() for i in range(40)] * 3
        assert set(hashed) == set(paths)
        hashed.clear()
        assert list(pool.map(file_digest, paths * 3)) == digests
    assert hashed == []
