"""The emoji sets of the embedded model: which pictures of the npm packages are drawn, under which code."""

import io
import json
import tarfile

import pytest
import tiny_sets

CODES = {"1f431": "cat-face", "1f408": "cat", "1f438": "frog", "1f600": "grinning-face", "1f638": "grinning-cat"}


def icons(*names: str, **aliases: str) -> dict:
    bodies = {name: {"body": f'<path d="{name}"/>'} for name in names}
    return {"icons": bodies, "aliases": {alias: {"parent": name} for alias, name in aliases.items()}, "width": 36}


def write_packages(folder, parts) -> None:
    """parts: `parts(set)` -> the JSON files of its package."""
    for each in (*tiny_sets.SETS, *tiny_sets.TAUGHT):
        with tarfile.open(folder / f"iconify-json-{each.package}-{each.version}.tgz", "w:gz") as archive:
            for name, content in parts(each).items():
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(f"package/{name}.json")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def names(word: str, given: dict) -> dict[str, str]:
    """Code -> the name of the picture that is drawn for it."""
    return {code: svg.split('d="')[1].split('"')[0] for code, svg in tiny_sets.matched(word, given, CODES)}


def test_pictures_are_found_by_name():
    assert names("noto", icons("cat-face", "frog", "rocket")) == {"1f431": "cat-face", "1f438": "frog"}


def test_older_names_aliases_and_numbered_variants_are_found():
    given = icons(
        "grinning-cat-face-with-smiling-eyes", "frog-face-1", "frog-face-2", "beam", **{"grinning-face": "beam"}
    )
    assert names("sticker", given) == {"1f438": "frog-face-1", "1f600": "beam"}
    assert names("sticker", icons("grinning-cat-face")) == {"1f638": "grinning-cat-face"}


def test_a_face_is_not_taken_for_the_whole_animal():
    assert names("sticker", icons("cat-face")) == {"1f431": "cat-face"}


def test_own_names_of_a_set():
    assert names("firefox", icons("cat", "catside", "grinwide")) == {
        "1f431": "cat",
        "1f408": "catside",
        "1f600": "grinwide",
    }


@pytest.mark.parametrize(
    ("slug", "code", "drawn"),
    [
        ("cat-face", "1f431", True),
        ("heart-with-arrow", "1f498", True),
        ("waving-hand-light-skin-tone", "1f44b-1f3fb", False),
        ("flag-japan", "1f1ef-1f1f5", False),
        ("keycap-1", "31-20e3", False),
        ("ok-button", "1f197", False),
        ("up-arrow", "2b06", False),
    ],
)
def test_which_emoji_are_drawn(slug, code, drawn):
    assert tiny_sets.is_drawn(slug, code) == drawn


def test_all_sets_are_drawn_once_and_credited(tmp_path):
    parts = {"chars": {"1f431-fe0f": "cat-face"}, "icons": icons("cat-face")}
    write_packages(tmp_path, lambda _: parts)
    drawn = []

    def render(svg: str) -> bytes:
        drawn.append(svg)
        return b"PNG"

    counts = tiny_sets.draw_sets(tmp_path, tmp_path / "sets", render)
    assert set(counts.values()) == {1} and len(drawn) == len(counts) == len(tiny_sets.SETS) + len(tiny_sets.TAUGHT)
    assert 'viewBox="0 0 36 16"' in drawn[0]
    assert (tmp_path / "sets/blob/1f431.png").read_bytes() == b"PNG"
    credits = (tmp_path / "sets/ATTRIBUTION.md").read_text()
    assert all(each.credit in credits and each.licence in credits for each in tiny_sets.SETS)
    tiny_sets.draw_sets(tmp_path, tmp_path / "sets", render)
    assert len(drawn) == len(counts)  # what is there is not drawn again


def test_a_missing_package_is_one_line(tmp_path, capsys):
    assert tiny_sets.main([str(tmp_path), str(tmp_path / "sets")]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "npm pack @iconify-json/noto@" in error
