"""A1111's prompt language: `(emphasis:1.2)`, `[editing:by steps:0.5]`, `[alter|nation]`, BREAK, AND, LoRAs.

These functions turn text into text. They follow the rules of AUTOMATIC1111's web UI, so that a prompt copied from there
has the same meaning. A prompt is read in this order: the tags of LoRAs are removed, the prompt is divided at AND, the
text of each step is chosen, and the emphasis of that text is read.
"""

import math
import re
from typing import NamedTuple

from sdjax.errors import ConfigError


class Span(NamedTuple):
    """A stretch of a prompt and the factor for its context (for prompts joined by AND: for its guidance)."""

    text: str
    weight: float


Sections = list[list[Span]]
"""The spans of a prompt, in the sections that BREAK divides it into. Each section begins a new chunk."""


class LoraTag(NamedTuple):
    """`<lora:name:text_weight:unet_weight>`. A single weight is used for both; without weights, both are 1."""

    name: str
    text_weight: float
    unet_weight: float


# ------------------------------------------------------------------------------------------------ emphasis

_STRONGER, _WEAKER = 1.1, 1 / 1.1
# No expression here can match a text in two ways. It would try them all, and a long prompt would take hours.
_BREAK = re.compile(r"\bBREAK\b")
_MARK = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]:]|[^\\()\[\]:]+")
MAX_NESTING = 100
"""Most brackets that may lie one in another."""
_LARGEST = 1e30  # of float32, with room for the context that it multiplies


def _check_nesting(depth: int, text: str) -> None:
    if depth > MAX_NESTING:
        raise ConfigError(
            f"the brackets of a prompt are nested more than {MAX_NESTING} deep: {text[:40]!r}...; "
            r"a plain bracket is written \( or \["
        )


def emphasis(text: str) -> Sections:
    r"""Divides a text into spans of one weight each, in the sections that BREAK makes.

    `(a)` has weight 1.1, `[a]` 1 / 1.1 and `(a:1.5)` 1.5; nested weights multiply. `\(`, `\)`, `\[`, `\]` and `\\` are
    plain characters. A bracket that is never closed reaches to the end, and a closing bracket without an opening one is
    text. BREAK also divides inside brackets, where A1111 takes it as a word.
    Raises ConfigError for brackets nested more than MAX_NESTING deep, and for a weight too large for float32.
    """
    spans: list[Span | None] = []  # None: a BREAK
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the first span inside each bracket that is still open

    def close(bracket: str, factor: float) -> None:
        begin = opened[bracket].pop()
        spans[begin:] = [span and Span(span.text, span.weight * factor) for span in spans[begin:]]
        if largest := next((span for span in spans[begin:] if span and not abs(span.weight) < _LARGEST), None):
            raise ConfigError(f"the weight {largest.weight:g} in a prompt is too large: {largest.text[:40]!r}")

    for match in _MARK.finditer(text):
        mark, weight = match[0], match[1]
        if mark in opened:
            opened[mark].append(len(spans))
            _check_nesting(len(opened["("]) + len(opened["["]), text)
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
            spans.append(Span(first.rstrip() if later else first, 1.0))
            for i, words in enumerate(later, 1):
                spans += [None, Span(words.lstrip() if i == len(later) else words.strip(), 1.0)]
    while opened["("]:
        close("(", _STRONGER)
    while opened["["]:
        close("[", _WEAKER)

    sections: Sections = [[]]
    for span in spans:
        if span is None:
            sections.append([])
        elif sections[-1] and sections[-1][-1].weight == span.weight:  # joined, so that no word is divided
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
    """An open bracket: the texts in it so far and the separators between them, each `:` or `|`."""

    bracket: str
    texts: list[_Text]
    separators: list[str]


_PIECE = re.compile(r"[()\[\]:|]|(?:[^\\()\[\]:|]|\\.)+")
_NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")


def at_each_step(prompt: str, steps: int, earlier: int = 0) -> list[str]:
    """The text of a prompt at each of the steps 1 to `steps`.

    `[a:b:12]` is a up to step 12 and b after it. `[a:b:0.5]` changes after half of the steps: a number with a point is
    a fraction of the steps, a number without one is a step. `[b:12]` and `[:b:12]` add b after step 12; `[a::12]`
    removes a. `[a|b|c]` is a, b and c in turn, one a step. All of these can be nested. Other brackets stay as they are.
    If a `|` stands anywhere but in `[a|b]`, the whole prompt stays as it is.

    earlier: number of steps of the pass that this pass follows. Numbers then count from the beginning of that earlier
    pass: a step number includes its steps, and 1.5 is half of this pass.
    """
    text = _parsed(prompt)
    if text is None or all(isinstance(piece, str) for piece in text):
        return [prompt] * steps
    return [_at_step(text, step, steps, earlier) for step in range(1, steps + 1)]


def _parsed(prompt: str) -> _Text | None:
    """Finds the edits and turns of a prompt; None if a `|` or a final `\\` is out of place."""
    outermost: _Text = []
    stack = [_Group("", [outermost], [])]
    end = 0

    def give_up() -> None:
        """Turns the brackets that are still open into plain text."""
        for group in stack[1:]:
            outermost.append(group.bracket)
            for separator, text in zip(["", *group.separators], group.texts, strict=True):
                outermost.extend([separator, *text])
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
            _check_nesting(len(stack) - 1, prompt)
        elif piece in (":", "|") and group.bracket:
            group.texts.append([])
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
                stack[-1].texts[-1].extend(closed)
        else:
            group.texts[-1].append(piece)
    if end != len(prompt) or has_stray_bar():
        return None
    give_up()
    return outermost


def _closed(group: _Group, bracket: str) -> _Text | None:
    """The text of a group that `bracket` closes; None if it is the wrong bracket or the separators mean nothing."""
    texts, separators = group.texts, "".join(group.separators)
    if (group.bracket, bracket) == ("(", ")"):
        if separators in ("", ":"):
            return ["(", *texts[0], *([":", *texts[1]] if separators else []), ")"]
    elif (group.bracket, bracket) == ("[", "]"):
        if not separators:
            return ["[", *texts[0], "]"]
        if separators == "|" * len(separators):
            return [_Turns(texts)]
        plain = len(texts[-1]) == 1 and isinstance(texts[-1][0], str)
        if separators in (":", "::") and plain and (number := _NUMBER.fullmatch(str(texts[-1][0]))):
            return [_Edit(texts[0] if separators == "::" else [], texts[-2], number[1])]
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
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")


def subprompts(prompt: str) -> list[Span]:
    """The prompts that AND joins, as in `a cat :1.2 AND a dog`; each prompt's guidance is multiplied by its weight.

    Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models". As in A1111, a prompt without
    AND may have a weight too.
    """
    return [_weighted(text) for text in _AND.split(prompt)]


def _weighted(text: str) -> Span:
    """The span of a text such as `a cat :1.2`. A text of several lines has no weight."""
    words, _, number = text.rpartition(":")
    match = _WEIGHT.fullmatch(number)
    words = words.rstrip() or words
    if match is None or text == number or "\n" in words.lstrip():
        return Span(text, 1.0)
    weight = float(match[1])
    if not abs(weight) < _LARGEST:
        raise ConfigError(f"the weight {weight:g} in a prompt is too large: {words[:40]!r}")
    return Span(words, weight)


_LORA = re.compile(r"<(?:lora|lyco):([^<>]+)>")


def without_loras(prompt: str) -> tuple[str, list[LoraTag]]:
    """The prompt without its `<lora:...>` tags, and the tags. Raises ConfigError for a weight that is not a number."""
    return _LORA.sub("", prompt), [_lora_tag(match) for match in _LORA.finditer(prompt)]


def _lora_tag(match: re.Match[str]) -> LoraTag:
    arguments = [argument.strip() for argument in match[1].split(":")]
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    name, *weights = [argument for argument in arguments if "=" not in argument] or [""]
    try:
        text = float(named.get("te", weights[0] if weights else 1.0))
        tag = LoraTag(name, text, float(named.get("unet", weights[1] if len(weights) > 1 else text)))
        if not (math.isfinite(tag.text_weight) and math.isfinite(tag.unet_weight)):
            raise ValueError
        return tag
    except ValueError:
        raise ConfigError(f"{match[0]}: the weights of a LoRA must be numbers, as in <lora:name:0.8>") from None
