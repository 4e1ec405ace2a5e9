"""Declared settings: values in the type of their annotation, and errors that name key, value and rule."""

import dataclasses
import math
from typing import Annotated, Literal, TypedDict

import numpy as np
import pytest

from sdjax.errors import ConfigError
from sdjax.settings import (
    Count,
    FileName,
    Fraction,
    Matching,
    Range,
    Seed,
    choices,
    contained_types,
    metadata,
    parse,
    plain_type,
    read_record,
    read_value,
)


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    size: Count = 1


@dataclasses.dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    rate: float | dict[str, float] = 1.0
    kind: Literal["a", "b"] = "a"
    note: str | None = None


class Optional(TypedDict, total=False):
    steps: Count
    share: Fraction


def test_a_record_is_read_with_its_tables():
    table = {"parts": [{"name": "x"}, {"name": "y", "size": 3}], "rate": {"unet": 2}, "kind": "b"}
    assert read_record(Whole, table) == Whole((Part("x"), Part("y", 3)), {"unet": 2.0}, "b")
    assert read_record(Optional, {"share": 1}) == {"share": 1.0}
    assert read_record(Optional, {}) == {}


@pytest.mark.parametrize(
    ("kind", "table", "message"),
    [
        (Whole, [], "run = []: expected a table"),
        (Whole, {}, "missing: run.parts"),
        (Whole, {"parts": [], "kidn": "a"}, "unknown key run.kidn: did you mean run.kind?"),
        (Part, {"name": "x", "colour": 1}, "unknown key run.colour: choices: name, size"),
        (Whole, {"parts": [{"name": "x"}, {}]}, "missing: run.parts.1.name"),
        (Whole, {"parts": [{"name": "x", "size": 0}]}, "run.parts.0.size = 0: expected at least 1"),
        (Whole, {"parts": {"name": "x"}}, "run.parts = {'name': 'x'}: expected a list"),
        (Whole, {"parts": [], "rate": {"unet": "x"}}, "run.rate.unet = 'x': expected a number"),
        (Optional, {"steps": 1, "share": 1.5}, "run.share = 1.5: expected at least 0 and at most 1"),
        (Optional, {"step": 1}, "unknown key run.step: did you mean run.steps?"),
    ],
)
def test_errors_of_a_record_name_the_dotted_key(kind, table, message):
    with pytest.raises(ConfigError) as raised:
        read_record(kind, table, "run")
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, np.int64(3), 3),
        (int, np.uint8(3), 3),
        (float, 3, 3.0),
        (float, np.float32(0.5), 0.5),
        (float, np.int32(2), 2.0),
        (bool, True, True),
        (Literal["a", "b"], "b", "b"),
        (int | None, None, None),
        (int | None, 4, 4),
        (Annotated[int, Range(1)] | None, None, None),
        (Annotated[int | None, Range(1)], None, None),
        (float | dict[str, float], {"a": 1}, {"a": 1.0}),
        (float | dict[str, float], 2, 2.0),
        (str | tuple[str, ...], ["a", "b"], ("a", "b")),
        (str | tuple[str, ...], "a", "a"),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, ...], 1, (1,)),
        (tuple[str, ...], "a", ("a",)),
        (tuple[int, int], (1, 2), (1, 2)),
        (tuple[Literal["unet", "vae"], ...], ["vae"], ("vae",)),
    ],
)
def test_a_value_gets_the_type_of_its_annotation(hint, value, expected):
    found = read_value(hint, value, "key")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "rule"),
    [
        (int, 1.0, "a whole number"),
        (int, True, "a whole number"),
        (int, "1", "a whole number"),
        (float, False, "a number"),
        (float, math.nan, "a number"),
        (float, -math.inf, "a number"),
        (float, np.float64("nan"), "a number"),
        (Fraction, math.nan, "a number"),
        (bool, 1, "true or false"),
        (bool, "true", "true or false"),
        (str, 1, "text"),
        (str, None, "text"),
        (int | None, "x", "a whole number"),
        (Literal["a", "b"], "c", "one of a, b"),
        (Literal["a", "b"], 1, "one of a, b"),
        (Literal["a", "b"], ["a"], "one of a, b"),
        (tuple[int, int], [1], "a list of 2"),
        (tuple[int, int], 1, "a list"),
        (tuple[int, ...], {"a": 1}, "a list"),
        (dict[str, int], [1], "a table"),
        (Annotated[int, Range(8, multiple=8)], 12, "at least 8, a multiple of 8"),
        (Annotated[float, Range(0, 1, above=True)], 0, "above 0 and at most 1"),
        (Annotated[int, Range(0, 3)] | None, 4, "at least 0 and at most 3"),
        (Seed, 2**32, "at least 0 and at most 4294967295"),
        (FileName, "a/b", "a short name of letters, digits, '_', '-' and '.'"),
        (FileName, "..", "a short name of letters, digits, '_', '-' and '.'"),
        (FileName, "ä" * 61, "a short name of letters, digits, '_', '-' and '.'"),
        (str, "half \ud83d", "text in UTF-8, without halves of characters"),
        (Annotated[str, Matching("a+", "only a")], "aab", "only a"),
    ],
)
def test_a_value_that_breaks_its_rule_is_named_with_the_rule(hint, value, rule):
    with pytest.raises(ConfigError) as raised:
        read_value(hint, value, "key")
    assert str(raised.value).startswith("key = ") and str(raised.value).endswith(f": expected {rule}")


def test_an_item_of_a_list_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"^key\.1 = -1: expected at least 1$"):
        read_value(tuple[Count, ...], [1, -1], "key")
    with pytest.raises(ConfigError, match=r"^key\.1 = 'x': expected a whole number$"):
        read_value(tuple[int, int], [1, "x"], "key")


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [
        (int, "12", 12),
        (float, "1e-3", 1e-3),
        (float, "3", 3.0),
        (Annotated[int, Range(1)] | None, "4", 4),
        (str, "12", "12"),
        (str | None, "x", "x"),
        (Literal["a", "b"], "a", "a"),
        (tuple[int, int, int], "1,2,3", (1, 2, 3)),
        (tuple[int, ...] | None, "7", (7,)),
        (tuple[str, ...], "a,b", ("a,b",)),
    ],
)
def test_texts_of_flags_are_read(hint, text, expected):
    found = parse(hint, text, "--flag")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "text", "rule"),
    [
        (int, "1.5", "a whole number"),
        (float, "nan", "a number"),
        (float, "inf", "a number"),
        (float, "many", "a number"),
        (tuple[int, int], "1", "a list of 2"),
        (tuple[int, int], "1,x", "a list"),
        (Literal["a", "b"], "c", "one of a, b"),
        (Annotated[int, Range(1, 9)], "10", "at least 1 and at most 9"),
    ],
)
def test_texts_of_flags_that_break_the_rule_are_named(hint, text, rule):
    with pytest.raises(ConfigError, match=f"^--flag = .*: expected {rule}"):
        parse(hint, text, "--flag")


def test_annotations_are_taken_apart():
    steps = Annotated[int, Range(1), "note"]
    assert plain_type(steps) is plain_type(steps | None) is int
    assert plain_type(Literal["a"]) is str
    assert choices(Annotated[Literal["a", "b"], "note"]) == ("a", "b")
    assert choices(Literal["a", "b"] | None) == ("a", "b")
    assert choices(int) == choices(Annotated[int | None, "note"]) == ()
    assert metadata(steps) == metadata(steps | None) == [Range(1), "note"]
    assert metadata(Annotated[steps, "outer"]) == [Range(1), "note", "outer"]
    assert contained_types(tuple[Annotated[Part, "note"], ...]) == [Part]
    assert contained_types(Part) == [Part]
