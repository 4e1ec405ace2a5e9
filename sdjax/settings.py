"""How a setting is declared, and how a value is checked against the declaration.

A setting is a field whose annotation holds its type and its rules:

    steps: Annotated[int, Range(1, 1000)]

Training (`train.config`) and drawing (`draw.settings`) declare their settings this way. `read_value` checks any value
against such an annotation, whether it comes from TOML, from JSON or from a flag.
"""

import contextlib
import dataclasses
import difflib
import math
import numbers
import re
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints, is_typeddict

from sdjax.errors import ConfigError
from sdjax.runtime.strict_json import is_text

Dtype = Literal["float32", "bfloat16", "float16"]
"""Number types that weights can be loaded, computed with and written in."""

BaseDtype = Literal["", "int8"]
"""How the weights of a U-Net that are not trained can be kept: in the number type of the computation, or in int8."""

RematPolicy = Literal["attention", "blocks", "levels"]
"""What the backward pass computes again, in place of keeping its activations: from little to much."""


class Former(NamedTuple):
    """A value that a setting had under this name in an earlier version. advice: what to write today."""

    value: str
    advice: str


LoraTargets = Annotated[
    Literal["attention", "attention+ff", "transformer", "locon", "linear", "all"],
    Former("conv", "'all', which has the layers that 'conv' had, or 'locon', the layers of kohya's LoCon"),
]
"""The sets of layers that a LoRA can adapt, by name; see `lora.TARGETS`."""
LoraKind = Literal["lora", "loha", "lokr"]
"""The kinds of adapters that can be trained, see `lora.NEW`."""


class Range(NamedTuple):
    """The rule that a number x satisfies `low <= x <= high` (`low < x` if `above`) and `x % multiple == 0`."""

    low: float
    high: float = math.inf
    multiple: int = 1
    above: bool = False

    @property
    def expected(self) -> str:
        """The rule in words."""
        words = f"{'above' if self.above else 'at least'} {self.low}"
        words += f" and at most {self.high}" if math.isfinite(self.high) else ""
        return words + (f", a multiple of {self.multiple}" if self.multiple > 1 else "")

    def allows(self, value: float) -> bool:
        """Whether the value obeys the rule."""
        low = value > self.low if self.above else value >= self.low
        return low and value <= self.high and (self.multiple == 1 or value % self.multiple == 0)


LONGEST_NAME = 120
"""Most bytes of a name that becomes part of the name of a file. File systems allow 255 for the whole."""


class Matching(NamedTuple):
    """The rule that a whole text matches a regular expression and is short. expected: the rule in words.

    longest: most bytes of the text in UTF-8.
    """

    pattern: str
    expected: str
    longest: float = math.inf

    def allows(self, value: str) -> bool:
        """Whether the value obeys the rule."""
        return len(value.encode()) <= self.longest and re.fullmatch(self.pattern, value, re.DOTALL) is not None


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Guidance = Annotated[float, Range(0, 1000)]
Text = Annotated[str, Matching(".+", "not empty")]
FileName = Annotated[
    str, Matching(r"[\w.-]*\w[\w.-]*", "a short name of letters, digits, '_', '-' and '.'", LONGEST_NAME)
]


def wrong(key: str, value: Any, expected: str) -> ConfigError:
    """The error for a value that breaks a rule."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    return ConfigError(f"{key} = {shown}: expected {expected}")


def read_record(cls: type, table: Any, key: str = "") -> Any:
    """Makes a dataclass or TypedDict from a plain table.

    key: the dotted name of the table, which errors begin with. Raises ConfigError for an unknown or missing key and
    for a value that breaks its rule.
    """
    if not isinstance(table, Mapping):
        raise wrong(key, table, "a table")
    hints = get_type_hints(cls, include_extras=True)
    for name in table:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            advice = f"did you mean {join(key, near[0])}?" if near else f"choices: {', '.join(hints)}"
            raise ConfigError(f"unknown key {join(key, name)}: {advice}")
    required = cls.__required_keys__ if is_typeddict(cls) else [f.name for f in _fields(cls) if not _has_default(f)]
    if missing := [join(key, name) for name in hints if name in required and name not in table]:
        raise ConfigError(f"missing: {', '.join(missing)}")
    return cls(**{name: read_value(hints[name], value, join(key, name)) for name, value in table.items()})


def read_value(hint: Any, value: Any, key: str) -> Any:
    """Returns the value in the type of the annotation.

    A whole number becomes a float where a float is expected, a list becomes a tuple, and a single value becomes a tuple
    of one. Raises ConfigError, which names the key, the value and the rule.
    """
    kind, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return read_record(hint, value, key)  # type: ignore[arg-type]
    if kind is Annotated:
        for rule in arguments[1:]:
            if isinstance(rule, Former) and value == rule.value:
                raise wrong(key, value, rule.advice)
        value = read_value(arguments[0], value, key)
        for rule in arguments[1:]:
            if isinstance(rule, (Range, Matching)) and value is not None and not rule.allows(value):
                raise wrong(key, value, rule.expected)
        return value
    if kind is Literal:
        if value not in arguments or not isinstance(value, str):
            raise wrong(key, value, f"one of {', '.join(arguments)}")
        return value
    if kind in (Union, types.UnionType):
        # For `X | None`, `number | table` or `name | list` the shape of the value picks the branch.
        if value is None and type(None) in arguments:
            return None
        container = dict if isinstance(value, Mapping) else tuple if isinstance(value, (list, tuple)) else None
        branch = next((a for a in arguments if container and get_origin(a) is container), arguments[0])
        return read_value(branch, value, key)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise wrong(key, value, "a table")
        return {name: read_value(arguments[1], inner, join(key, name)) for name, inner in value.items()}
    if kind is tuple:
        return _read_sequence(arguments, value, key)
    # The abstract types also match NumPy's numbers.
    number = {int: numbers.Integral, float: numbers.Real}.get(hint)
    if number is not None and isinstance(value, number) and not isinstance(value, bool):
        value = hint(value)
    if hint is str and isinstance(value, str) and not is_text(value):
        raise wrong(key, value, "text in UTF-8, without halves of characters")
    if type(value) is not hint or (isinstance(value, float) and not math.isfinite(value)):
        raise wrong(key, value, {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint])
    return value


def parse(hint: Any, text: str, key: str) -> Any:
    """Reads the value of a setting from a text, such as that of a flag. Raises ConfigError like `read_value`.

    Numbers are converted, and a list of numbers is divided at its commas.
    """
    plain = plain_type(hint)
    value: Any = text
    with contextlib.suppress(ValueError):  # read_value refuses a text that is no number, and names the rule
        if plain in (int, float):
            value = plain(text)
        elif get_origin(plain) is tuple and (number := plain_type(get_args(plain)[0])) in (int, float):
            value = [number(part) for part in text.split(",")]
    return read_value(hint, value, key)


def plain_type(hint: Any) -> Any:
    """The type of an annotation without its rules, such as `int` for `Annotated[int | None, Range(1)]`."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Annotated, Union, types.UnionType):
        return plain_type(arguments[0])
    return str if kind is Literal else hint


def choices(hint: Any) -> tuple[str, ...]:
    """The choices of an annotation such as `Literal["a", "b"] | None`. Empty for an annotation without choices."""
    kind, arguments = get_origin(hint), get_args(hint)
    if kind in (Annotated, Union, types.UnionType):
        return choices(arguments[0])
    return arguments if kind is Literal else ()


def metadata(hint: Any) -> list[Any]:
    """Everything that `Annotated` adds to a type: `[Range(1)]` for `Annotated[int, Range(1)] | None`."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        return [*metadata(inner), *marks]
    return [mark for argument in get_args(hint) for mark in metadata(argument)]


def contained_types(hint: Any) -> list[Any]:
    """The plain types inside an annotation: `[Stage]` for `tuple[Stage, ...]`."""
    arguments = get_args(hint)[:1] if get_origin(hint) is Annotated else [a for a in get_args(hint) if a is not ...]
    return [kind for argument in arguments for kind in contained_types(argument)] if arguments else [hint]


def join(key: str, name: str) -> str:
    """The dotted key of a name in a table."""
    return f"{key}.{name}" if key else name


def _fields(cls: type) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(cls)  # type: ignore[arg-type]


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _read_sequence(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if type(value) in (str, int, float) and arguments[-1] is Ellipsis:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise wrong(key, value, "a list")
    if arguments[-1] is Ellipsis:
        return tuple(read_value(arguments[0], item, f"{key}.{i}") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise wrong(key, value, f"a list of {len(arguments)}")
    return tuple(
        read_value(hint, item, f"{key}.{i}") for i, (hint, item) in enumerate(zip(arguments, value, strict=True))
    )
