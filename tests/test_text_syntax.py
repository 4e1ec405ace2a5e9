"""A1111's prompt language: the cases that A1111 documents, stray brackets, and texts that might break a parser."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.errors import ConfigError
from sdjax.text.syntax import at_each_step, emphasis, subprompts, without_loras

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ("", []),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", UP), (" word", 1)]),
        ("an [unimportant] word", [("an ", 1), ("unimportant", DOWN), (" word", 1)]),
        ("((w)) [[w]]", [("w", UP**2), (" ", 1), ("w", DOWN**2)]),
        ("(unbalanced", [("unbalanced", UP)]),
        ("a [b", [("a ", 1), ("b", DOWN)]),
        ("a) b] c", [("a) b] c", 1)]),
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a \(b\) (c \[d\]) \\ \e", [("a (b) ", 1), ("c [d]", UP), (" \\ e", 1)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                *[("a ", 1), ("house", 1.3 * UP**2), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.5 * UP)],
                *[(", sun, ", UP), ("sky", UP**4), (".", UP)],
            ],
        ),
        ("(a:1.5)(b:.5)(c:2)(d: +3 )(e:-1)", [("a", 1.5), ("b", 0.5), ("c", 2), ("d", 3), ("e", -1)]),
        ("(a:1.2.3) (a:b) a:1.2", [("a:1.2.3", UP), (" ", 1), ("a:b", UP), (" a:1.2", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("[a:1.2) b]", [("a:1.2) b", DOWN)]),
        ("(a:0)", [("a", 0)]),
    ],
)
def test_emphasis(prompt, spans):
    (section,) = emphasis(prompt)
    assert [text for text, _ in section] == [text for text, _ in spans]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in spans])


def test_a_break_begins_a_section():
    texts = lambda prompt: [[tuple(span) for span in section] for section in emphasis(prompt)]
    assert texts("a BREAK b") == [[("a", 1)], [("b", 1)]]
    assert texts("a\nBREAK\n\nb, BREAKFAST BREAK") == [[("a", 1)], [("b, BREAKFAST", 1)], []]
    assert texts("BREAK BREAK a") == [[], [], [("a", 1)]]
    assert texts("(a BREAK b:2)") == [[("a", 2)], [("b", 2)]]  # A1111 takes the word as text here


def changes(prompt, steps, earlier=0):
    """[last step, text] of each stretch of steps with the same text."""
    texts = at_each_step(prompt, steps, earlier)
    assert len(texts) == steps
    return [[i, a] for i, (a, b) in enumerate(zip(texts, [*texts[1:], None], strict=True), 1) if a != b]


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]], [[10, "a b c"]]),
        ("a [b:1.5] c", [[10, "a  c"]], [[5, "a  c"], [10, "a b c"]]),
        ("[a:b:1.0]", [[10, "a"]], [[10, "b"]]),
        ("[a:b:13]", [[10, "a"]], [[3, "a"], [10, "b"]]),
        ("[a:b:3]", [[3, "a"], [10, "b"]], [[10, "b"]]),
    ],
)
def test_a_second_pass_counts_on(prompt, first, second):
    """The first two are A1111's own examples."""
    assert changes(prompt, 10) == first
    assert changes(prompt, 10, 10) == second


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [[10, "test"]]),
        ("a [b:3]", [[3, "a "], [10, "a b"]]),
        ("a [b: 3]", [[3, "a "], [10, "a b"]]),
        ("a [[[b]]:2]", [[2, "a "], [10, "a [[b]]"]]),
        ("[(a:2):3]", [[3, ""], [10, "(a:2)"]]),
        ("a [b : c : 1] d", [[1, "a b  d"], [10, "a  c  d"]]),
        ("a[b:[c:d:2]:1]e", [[1, "abe"], [2, "ace"], [10, "ade"]]),
        ("a [unbalanced", [[10, "a [unbalanced"]]),
        ("a [b:.5] c", [[5, "a  c"], [10, "a b c"]]),
        (
            "a [{b|d{:.5] c",
            [[10, "a [{b|d{:.5] c"]],
        ),  # A1111 documents the braces alone, its code gives this
        ("((a][:b:c [d:3]", [[3, "((a][:b:c "], [10, "((a][:b:c d"]]),
        ("a[b::7]c[:d:4]", [[4, "abc"], [7, "abcd"], [10, "acd"]]),
        ("[a:b:0][a:b:-3]", [[10, "bb"]]),
        ("[a:b:99]", [[10, "a"]]),
        ("[a:b:1.0][c:d:1]", [[1, "ac"], [10, "ad"]]),  # a point makes it a fraction
        ("[[a|b]:c:2] [d|[e:f:3]]", [[1, "a d"], [2, "b e"], *([i, f"c {'df'[i % 2 == 0]}"] for i in range(3, 11))]),
        ("[a|(b:1.1)]", [[i, "(b:1.1)" if i % 2 == 0 else "a"] for i in range(1, 11)]),
        ("[fe|]male", [[i, "male" if i % 2 == 0 else "female"] for i in range(1, 11)]),
        ("[fe|||]male", [[1, "female"], [4, "male"], [5, "female"], [8, "male"], [9, "female"], [10, "male"]]),
        ("(a) [b] (c:1.2) [d:e] [a:b:c:3]", [[10, "(a) [b] (c:1.2) [d:e] [a:b:c:3]"]]),
        (r"[a:\[b\]:3]", [[3, "a"], [10, r"\[b\]"]]),
        ("a | b [c:3]", [[10, "a | b [c:3]"]]),
        ("(a|b) [c:3]", [[10, "(a|b) [c:3]"]]),
        ("[c:3] \\", [[10, "[c:3] \\"]]),
    ],
)
def test_steps(prompt, expected):
    assert changes(prompt, 10) == expected


def test_a1111s_own_example_of_many_edits():
    prompt = (
        "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75][ in foreground::0.6]"
        "[: in background:0.25] [shoddy:masterful:0.5]"
    )
    start = "fantasy landscape with a"
    assert changes(prompt, 100) == [
        [25, f"{start} mountain and an oak in foreground shoddy"],
        [50, f"{start} lake and an oak in foreground in background shoddy"],
        [60, f"{start} lake and an oak in foreground in background masterful"],
        [75, f"{start} lake and an oak in background masterful"],
        [100, f"{start} lake and a christmas tree in background masterful"],
    ]


_marks = st.sampled_from([*"()[]:|\\ab, ", "1.2", ":1.2)", " BREAK ", ":0.5]", ":3]"])


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(_marks, max_size=30).map("".join), st.integers(1, 12))
def test_any_text_is_a_prompt(prompt, steps):
    texts = at_each_step(prompt, steps)
    assert len(texts) == steps
    for text in texts:
        for span in (span for section in emphasis(text) for span in section):
            assert span.text and isinstance(span.weight, float)


def test_brackets_nest_a_hundred_deep():
    deep = "(" * 100 + "a" + ")" * 100
    assert at_each_step(deep, 2) == [deep, deep]
    assert at_each_step("[" * 100, 1) == ["[" * 100]
    assert emphasis(deep)[0][0].weight > 1e4
    for read in (emphasis, lambda text: at_each_step(text, 2)):
        for text in ("(" * 101, "[" * 2000, "[a:" * 2000 + "b" + ":3]" * 2000):
            with pytest.raises(ConfigError, match="nested more than 100 deep"):
                read(text)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (emphasis, "(a:" + "9" * 400 + ")"),
        (emphasis, "((a:1e3:99999999999999999):99999999999999999)"),
        (subprompts, "a AND b :" + "9" * 400),
    ],
)
def test_weights_beyond_float32_are_refused(read, text):
    with pytest.raises(ConfigError, match="too large"):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        *("(a" * 50 + "a " * 50_000, " " * 100_000, ":" + "1" * 100_000),
        *("<lora:" * 20_000, "[a:" + "1" * 100_000, "a:b" * 30_000),
    ],
    ids=lambda text: text[:6],
)
def test_long_prompts_take_no_long_time(text):
    start = time.perf_counter()
    for read in (emphasis, subprompts, without_loras, lambda text: at_each_step(text, 2)):
        with contextlib.suppress(ConfigError):  # of a weight of 100,000 digits
            read(text)
    assert time.perf_counter() - start < 2


def test_tags_of_loras_are_removed():
    text, tags = without_loras("a <lora:one:0.5>, <w> b<lora:two> <lora:three:1:0><lyco:four:unet=0.2>")
    assert text == "a , <w> b "
    assert tags == [("one", 0.5, 0.5), ("two", 1, 1), ("three", 1, 0), ("four", 1, 0.2)]
    assert without_loras("a <lora> <b:c> lora:x:1") == ("a <lora> <b:c> lora:x:1", [])
    with pytest.raises(ConfigError, match="<lora:one:strong>: the weights of a LoRA must be numbers"):
        without_loras("<lora:one:strong>")
    for weight in ("nan", "inf", "1e999"):
        with pytest.raises(ConfigError, match="the weights of a LoRA must be numbers"):
            without_loras(f"<lora:one:{weight}>")
