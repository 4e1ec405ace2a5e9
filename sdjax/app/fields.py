"""The fields of the page, made from the declarations of the settings, and the values that are read from them."""

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import gradio as gr

from sdjax.draw.settings import Enlarging, Masking, Reading, Sampling, SecondPass, declarations, from_text, help_text
from sdjax.errors import ConfigError
from sdjax.settings import choices, plain_type, read_value

MAIN = ("steps", "guidance", "sampler", "width", "height", "seed")
"""Settings that are always in sight. The others are in folded groups."""
GROUPS = {
    "Prompt and seed": (*Reading.__annotations__, "variation_seed"),
    "Sampler": [name for name in Sampling.__annotations__ if name not in MAIN],
    "Second pass": list(SecondPass.__annotations__),
    "Enlarge": list(Enlarging.__annotations__),
    "Mask": list(Masking.__annotations__),
}
FILES = {"upscale": ("tiny",), "hires_upscaler": ("latent", "lanczos", "tiny")}
"""Settings that can name a file, which the page does not allow -> their choices."""

Read = Callable[[Any], Any]


def component(name: str, **how: Any) -> Any:
    """Returns the field of a setting. An empty field stands for the default."""
    hint, declared = declarations()[name]
    how = {"label": label(name), "info": _first_upper(help_text(name)), **how}
    kind, named = plain_type(hint), FILES.get(name, choices(hint))
    if kind is bool:
        return gr.Checkbox(value=declared.default, **how)
    if named:
        listed = [(declared.names.get(value, value), value) for value in named]
        unset = [(declared.unset or "none", "")] if declared.default is None else []
        return gr.Dropdown([*unset, *listed], value=declared.default or "", **how)
    if kind in (int, float) and declared.default is not None:  # an empty field of numbers would show 0
        return gr.Number(declared.default, precision=0 if kind is int else None, **how)
    return gr.Textbox(declared.default or "", placeholder=declared.unset.partition(",")[0], **how)


def names_field(names: Iterable[str], label: str, **how: Any) -> Any:
    """Returns a field to choose one of some names, which may become more.

    Gradio would compare the choice with the names at the start. What is chosen is looked up where it is used.
    """
    return gr.Dropdown(list(names), label=label, **{"allow_custom_value": True, "value": None, **how})


def label(name: str) -> str:
    """The name of a setting for people."""
    return _first_upper(name.replace("_", " "))


def reader(name: str) -> Read:
    """Returns the function that reads the value of a field. It raises ConfigError, which names the setting."""
    hint, declared = declarations()[name]

    def read(value: Any) -> Any:
        if value is None or value == "":
            return declared.default
        if name in FILES and value not in FILES[name]:
            raise ConfigError(f"{name} = {value!r}: choose {', '.join(FILES[name])}")
        return from_text(name, value, name) if isinstance(value, str) else read_value(hint, value, name)

    return read


def value_of(name: str, setting: Any) -> Any:
    """What the field of a setting shows for a value."""
    if isinstance(setting, tuple):
        return ",".join(map(str, setting))
    return "" if setting is None and choices(declarations()[name][0]) else setting


def checks(readers: Sequence[Read | None]) -> Callable[..., list[Any]]:
    """Returns the validator of a button: a message beside each field that cannot be read.

    readers: those of the first fields, None for a field without a rule; the fields behind them have none either.
    """

    def check(*values: Any) -> list[Any]:
        return [_problem(read, value) for read, value in zip_longest(readers, values)]

    return check


def _problem(read: Read | None, value: Any) -> Any:
    try:
        if read is not None:
            read(value)
    except ConfigError as error:
        return gr.validate(False, str(error))
    return None


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
