"""The declarations of the settings of drawing: defaults, ranges, flags, axes, and the text of a PNG file."""

from typing import get_args, get_origin

import pytest

from sdjax.draw.grids import parse_axis
from sdjax.draw.settings import (
    JobSettings,
    PictureSettings,
    Subject,
    changed,
    complete,
    complete_job,
    declarations,
    from_text,
    help_text,
    labelled,
)
from sdjax.errors import ConfigError
from sdjax.settings import Range, choices, metadata, plain_type

NAMES = list(declarations())
AXES = [name for name in NAMES if declarations()[name][1].axis]


def ranges(name):
    return [rule for rule in metadata(declarations()[name][0]) if isinstance(rule, Range)]


def a_value(name):
    """A text that a flag or an axis takes for a setting, and the value it stands for."""
    hint, _ = declarations()[name]
    kind = plain_type(hint)
    if options := choices(hint):
        return options[-1], options[-1]
    if kind in (int, float):
        low, high = ranges(name)[0][:2]
        value = kind(min(low + 8, high))
        return str(value), value
    if get_origin(kind) is tuple:
        kinds = [plain_type(each) for each in get_args(kind)]
        values = tuple(range(1, len(kinds) + 1))
        return ("x.pt:0.5", ("x.pt:0.5",)) if kinds[0] is str else (",".join(map(str, values)), values)
    return "x", "x"


def refused():
    """(name, value) for values beyond each end of each range and outside the choices."""
    for name in NAMES:
        for rule in ranges(name):
            kind = plain_type(declarations()[name][0])
            yield name, kind(rule.low if rule.above else rule.low - 1)
            if rule.high < float("inf"):
                yield name, kind(rule.high + 1)
            if rule.multiple > 1:
                yield name, kind(rule.low + 1)
        if choices(declarations()[name][0]):
            yield name, "magic"


def test_every_setting_is_declared_once_with_a_good_default():
    assert set(NAMES) == JobSettings.__optional_keys__
    assert PictureSettings.__optional_keys__ < JobSettings.__optional_keys__
    defaults = complete_job({})
    assert defaults == {name: declarations()[name][1].default for name in NAMES}
    assert complete({}) == {name: defaults[name] for name in NAMES if name in PictureSettings.__optional_keys__}
    assert changed(defaults, NAMES) == []


@pytest.mark.parametrize("name", [name for name in NAMES if plain_type(declarations()[name][0]) is not bool])
def test_every_setting_reads_its_default_from_the_text_of_a_flag(name):
    default = declarations()[name][1].default
    if isinstance(default, (str, int, float)):
        found = from_text(name, str(default), "--flag")
        assert found == default and type(found) is type(default)
    else:
        assert default in (None, ())  # no text stands for these: the flag is left out
    text, value = a_value(name)
    assert from_text(name, text, "--flag") == value != default
    assert complete_job({name: value})[name] == value


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_varies_the_settings_that_are_declared_as_axes(name):
    text, value = a_value(name)
    if name in AXES:
        axis = parse_axis(f"{name.replace('_', '-')}={text}, {text}")
        assert axis == (name, (value, value))
    else:
        with pytest.raises(ConfigError, match=f"a name of {', '.join(AXES)}$"):
            parse_axis(f"{name}={text}")


@pytest.mark.parametrize(("name", "value"), list(refused()))
def test_values_beyond_the_range_or_the_choices_are_refused(name, value):
    for read in (complete_job, complete) if name in PictureSettings.__optional_keys__ else (complete_job,):
        with pytest.raises(ConfigError, match=f"^{name} = {value!r}: expected "):
            read({name: value})


def test_only_declared_settings_are_taken():
    with pytest.raises(ConfigError, match="unknown key stesp: did you mean steps"):
        complete({"stesp": 3})
    for name in Subject.__annotations__:
        with pytest.raises(ConfigError, match=f"unknown key {name}"):
            complete({name: declarations()[name][1].default})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps", "sampler steps, 1 to 1000 (default: 20)"),
        ("seed", "seed of the first picture, 0 to 4294967295; the next pictures count up from it (default: 0)"),
        ("height", "height, a multiple of 8 (default: the model's, or the image's)"),
        ("strength", "how far to redraw the image, above 0 and at most 1 (default: 0.75; with a mask 1)"),
        ("prompt_syntax", "syntax of prompts: a1111 or plain (default: a1111)"),
        ("karras", "use the noise levels of Karras et al. 2022; the same as spacing karras"),
        (
            "spacing",
            "spacing of the timesteps or of the noise levels: leading, linspace, trailing, sgm_uniform, simple, "
            "karras, exponential or beta (default: the model's)",
        ),
        ("lora", "LoRA to merge in"),
        ("hires_scale", "draw, enlarge by this factor and draw again, 1 to 8; 1 is off (default: 1)"),
    ],
)
def test_the_help_of_a_setting_tells_range_choices_and_default(name, expected):
    assert help_text(name) == expected


def test_labels_are_those_of_a1111():
    settings = complete({"sampler": "euler_a", "spacing": "karras", "fill": "blurred", "guidance": 3})
    assert labelled(settings, ["sampler", "spacing", "fill", "guidance"]) == {
        "Sampler": "Euler a", "Schedule type": "Karras", "Masked content": "fill", "CFG scale": 3.0,
    }  # fmt: skip
    assert changed(settings, ["steps", "sampler", "spacing", "guidance"]) == ["sampler", "spacing", "guidance"]


def test_numbers_become_those_of_their_setting():
    settings = complete({"guidance": 3, "steps": 5})
    assert type(settings["guidance"]) is float and type(settings["steps"]) is int
    with pytest.raises(ConfigError, match=r"steps = 5\.0: expected a whole number"):
        complete({"steps": 5.0})
    with pytest.raises(ConfigError, match="guidance = nan: expected a number"):
        complete({"guidance": float("nan")})
