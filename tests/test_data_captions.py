"""Versions of captions depend only on seed and caption, and always keep a tag."""

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.data.captions import from_templates, tag_versions, with_words

CAPTION = "a cat, red, small, old, asleep"
TAGS = [tag.strip() for tag in CAPTION.split(",")]


def split(version):
    return version.split(", ")


def test_without_shuffling_and_dropping_a_caption_is_unchanged():
    assert tag_versions(" odd ,, spacing", 8, seed=1, keep=1) == (" odd ,, spacing",)


def test_shuffled_tags_are_all_there():
    versions = tag_versions(CAPTION, 30, seed=0, shuffle=True, keep=2)
    assert len(versions) == 30
    assert all(split(version)[:2] == TAGS[:2] for version in versions)
    assert all(sorted(split(version)) == sorted(TAGS) for version in versions)
    assert len(set(versions)) == 6  # every order of the other three
    assert len(set(tag_versions(CAPTION, 200, seed=0, shuffle=True))) > 90  # of 120


def test_dropped_tags_keep_their_order():
    versions = tag_versions(CAPTION, 1000, seed=0, dropout=0.25, keep=1)
    for version in versions:
        assert split(version) == [tag for tag in TAGS if tag in split(version)]
        assert version.startswith("a cat")
    left = sum(len(split(version)) - 1 for version in versions) / 4000
    assert 0.72 < left < 0.78


@given(st.text("ab, \n", max_size=30), st.integers(0, 2**70), st.floats(0, 1), st.integers(0, 4), st.booleans())
@settings(deadline=None)
def test_versions_of_any_caption(caption, seed, dropout, keep, shuffle):
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    versions = tag_versions(caption, 4, seed=seed, shuffle=shuffle, dropout=dropout, keep=keep)
    assert versions == tag_versions(caption, 4, seed=seed, shuffle=shuffle, dropout=dropout, keep=keep)
    for version in versions if shuffle or dropout else ():
        parts = split(version) if version else []
        assert len(parts) >= min(1, len(tags))
        assert parts[: min(keep, len(tags))] == tags[:keep]
        assert all(parts.count(part) <= tags.count(part) for part in parts)


def test_seed_caption_and_number_alone_decide():
    settings = {"shuffle": True, "dropout": 0.3}
    versions = tag_versions(CAPTION, 12, seed=3, **settings)
    assert tag_versions(CAPTION, 5, seed=3, **settings) == versions[:5]
    assert tag_versions(CAPTION, 12, seed=4, **settings) != versions
    code = f"from sdjax.data.captions import *; print(tag_versions({CAPTION!r}, 12, seed=3, **{settings!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(versions)


def test_new_words_are_put_in_front_unless_one_is_there():
    assert with_words("a cat", ["<x>", "<y>"]) == "<x> <y> a cat"
    assert with_words("a <Y> cat", ["<x>", "<y>"]) == "a <Y> cat"
    assert with_words("", ["<x>"]) == "<x>"
    assert with_words("a cat", []) == "a cat"


def test_templates_hold_the_words():
    assert from_templates(["a {}", "{} and {}, {0}"], ["<x>", "<y>"]) == ("a <x> <y>", "<x> <y> and <x> <y>, {0}")
