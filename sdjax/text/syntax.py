"""A1111's prompt language: `(emphasis:1.2)`, `[editing:by steps:0.5]`, `[alter|nation]`, BREAK, AND, LoRAs.

Text in, text out. The rules are those of AUTOMATIC1111's web UI, so that a prompt copied from there means the same:
tags of LoRAs are taken out, the prompt is divided at AND, then the text of each step is worked out, then its emphasis.
"""

import re
from typing import NamedTuple

from sdjax.errors import ConfigError

SYNTAXES = ("a1111", "plain")
EMPHASES = ("original", "no_norm")


class Span(NamedTuple):
    """A piece of a prompt and what its part of the context is multiplied by."""

    text: str
    weight: float


Sections = list[list[Span]]  # what stands between BREAKs; each section begins a new window


class LoraTag(NamedTuple):
    """`<lora:name:text_weight:unet_weight>`; one weight stands for both, none for 1."""

    name: str
    text_weight: float
    unet_weight: float


# ------------------------------------------------------------------------------------------------ emphasis

_STRONGER, _WEAKER = 1.1, 1 / 1.1
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_MARK = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+")


def emphasis(text: str) -> Sections:
    r"""The spans of a text by weight, in sections between BREAKs.

    `(a)` is weighted 1.1, `[a]` 1 / 1.1, `(a:1.5)` 1.5; nested weights multiply. `\(` and the like are the character
    itself. A bracket never closed counts to the end; one never opened is text. Unlike A1111, which then reads the
    word itself, BREAK counts inside brackets too.
    """
    spans: list[Span | None] = []  # None: a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each bracket not yet closed begins

    def close(bracket: str, factor: float) -> None:
        begin = opened[bracket].pop()
        spans[begin:] = [span and Span(span.text, span.weight * factor) for span in spans[begin:]]

    for match in _MARK.finditer(text):
        mark, weight = match[0], match[1]
        if mark in opened:
            opened[mark].append(len(spans))
        elif weight and opened["("]:
            close("(", float(weight))
        elif mark == ")" and opened["("]:
            close("(", _STRONGER)
        elif mark == "]" and opened["["]:
            close("[", _WEAKER)
        elif mark[0] == "\\":
            spans.append(Span(mark[1:], 1.0))
        else:
            first, *later = _BREAK.split(mark)
            spans.append(Span(first, 1.0))
            for part in later:
                spans += [None, Span(part, 1.0)]
    while opened["("]:
        close("(", _STRONGER)
    while opened["["]:
        close("[", _WEAKER)

    sections: Sections = [[]]
    for span in spans:
        if span is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == span.weight:  # one text, or its words would be divided
            sections[-1][-1] = Span(sections[-1][-1].text + span.text, span.weight)
        else:
            sections[-1].append(span)
    return [[span for span in section if span.text] for section in sections]


# ------------------------------------------------------------------------------------------------ steps


class _Edit(NamedTuple):
    """`[before:after:when]`."""

    before: "_Text"
    after: "_Text"
    when: str


class _Turns(NamedTuple):
    """`[first|second|...]`."""

    options: "list[_Text]"


_Text = list[str | _Edit | _Turns]


class _Group(NamedTuple):
    """A bracket not yet closed: its parts, and what stands between them."""

    bracket: str
    parts: list[_Text]
    separators: list[str]


_PIECE = re.compile(r"[()\[\]:|]|(?:[^\\()\[\]:|]|\\.)+")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


def at_each_step(prompt: str, steps: int, earlier: int = 0) -> list[str]:
    """The text of a prompt at steps 1 to `steps`.

    earlier: steps of a first pass that this one follows. Numbers then count from that pass's beginning, so 1.5 is half
    of this one.

    `[a:b:12]` is a up to step 12 and b after it, `[a:b:0.5]` changes after half of the steps: a number with a point is
    a fraction, one without it a step. `[b:12]` and `[:b:12]` add b, `[a::12]` takes a out. `[a|b|c]` goes to the next
    with each step. All of them nest. Brackets that are none of these stay as they are, and so does the whole prompt
    when a `|` stands anywhere but in `[a|b]`.
    """
    text = _parsed(prompt)
    if text is None or all(isinstance(piece, str) for piece in text):
        return [prompt] * steps
    return [_at_step(text, step, steps, earlier) for step in range(1, steps + 1)]


def _parsed(prompt: str) -> _Text | None:
    """The prompt with its edits and turns found; None if it has a `|` or `\\` out of place."""
    outermost: _Text = []
    stack = [_Group("", [outermost], [])]
    end = 0

    def give_up() -> None:
        """What no bracket closes is plain text."""
        for group in stack[1:]:
            outermost.append(group.bracket)
            for separator, part in zip(["", *group.separators], group.parts, strict=True):
                outermost.extend([separator, *part])
        del stack[1:]

    def has_stray_bar() -> bool:
        return any("|" in group.separators for group in stack)

    for match in _PIECE.finditer(prompt):
        if match.start() != end:
            return None
        end, piece = match.end(), match[0]
        group = stack[-1]
        if piece in ("(", "["):
            stack.append(_Group(piece, [[]], []))
        elif piece in (":", "|") and group.bracket:
            group.parts.append([])
            group.separators.append(piece)
        elif piece == "|":
            return None
        elif piece in (")", "]"):
            closed = _closed(group, piece)
            if closed is None:
                if has_stray_bar():
                    return None
                give_up()
                outermost.append(piece)
            else:
                stack.pop()
                stack[-1].parts[-1].extend(closed)
        else:
            group.parts[-1].append(piece)
    if end != len(prompt) or has_stray_bar():
        return None
    give_up()
    return outermost


def _closed(group: _Group, bracket: str) -> _Text | None:
    """What a group is once closed; None if it is nothing."""
    parts, separators = group.parts, "".join(group.separators)
    if (group.bracket, bracket) == ("(", ")"):
        if separators in ("", ":"):
            return ["(", *parts[0], *([":", *parts[1]] if separators else []), ")"]
    elif (group.bracket, bracket) == ("[", "]"):
        if not separators:
            return ["[", *parts[0], "]"]
        if separators == "|" * len(separators):
            return [_Turns(parts)]
        plain = len(parts[-1]) == 1 and isinstance(parts[-1][0], str)
        if separators in (":", "::") and plain and (number := _NUMBER.fullmatch(str(parts[-1][0]))):
            return [_Edit(parts[0] if separators == "::" else [], parts[-2], number[1])]
    return None


def _at_step(text: _Text, step: int, steps: int, earlier: int) -> str:
    words = []
    for piece in text:
        if isinstance(piece, _Edit):
            value = float(piece.when)
            value = (value - (earlier > 0)) * steps if "." in piece.when else value - earlier
            chosen = piece.before if step <= int(min(max(value, 0), steps)) else piece.after
        elif isinstance(piece, _Turns):
            chosen = piece.options[(step - 1) % len(piece.options)]
        else:
            words.append(piece)
            continue
        words.append(_at_step(chosen, step, steps, earlier))
    return "".join(words)


# ------------------------------------------------------------------------------------------------ AND, LoRAs

_AND = re.compile(r"\bAND\b")
_WEIGHTED = re.compile(r"(\s*.*?)\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")


def subprompts(prompt: str) -> list[Span]:
    """The prompts that AND joins, each with what its guidance is multiplied by: `a cat :1.2 AND a dog`.

    Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models". As in A1111, a prompt without
    AND may have a weight too.
    """
    parts = [(part, _WEIGHTED.fullmatch(part)) for part in _AND.split(prompt)]
    return [Span(match[1], float(match[2])) if match else Span(part, 1.0) for part, match in parts]


_LORA = re.compile(r"<(?:lora|lyco):([^>]+)>")


def without_loras(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its `<lora:...>` tags, and the tags. ConfigError for a weight that is no number."""
    return _LORA.sub("", prompt), [_lora_tag(match) for match in _LORA.finditer(prompt)]


def _lora_tag(match: re.Match[str]) -> LoraTag:
    arguments = [argument.strip() for argument in match[1].split(":")]
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name, *weights = [argument for argument in arguments if "=" not in argument] or [""]
    try:
        text = float(named.get("te", weights[0] if weights else 1.0))
        return LoraTag(name, text, float(named.get("unet", weights[1] if len(weights) > 1 else text)))
    except ValueError:
        raise ConfigError(f"{match[0]}: the weights of a LoRA must be numbers, as in <lora:name:0.8>") from None
