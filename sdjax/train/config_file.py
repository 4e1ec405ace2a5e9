"""Reads TOML files and flags as a checked `RunConfig`, writes it as TOML, and compares the settings of two runs.

A command line is read by `parse_args`. Its TOML file gives a `RunConfig`, whose values are the defaults of the flags.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import logging
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from sdjax.errors import ConfigError, DataError
from sdjax.settings import contained_types, join, metadata, read_record
from sdjax.train.config import Data, OnResume, RunConfig, Stage, check, check_copies_table

log = logging.getLogger(__name__)

COMMAND_FLAGS = ("resume", "resume-step", "debug", "coordinator", "processes", "process")
"""The flags of the command, which are no settings of the run."""


class Arguments(NamedTuple):
    """A training command line, read and checked."""

    config: RunConfig
    resume: bool
    """Whether to resume from the newest intact checkpoint, or start fresh if there is none."""
    resume_step: int | None
    """The step of the checkpoint to resume from, counted over all stages."""
    debug: bool
    """Whether to show tracebacks."""
    coordinator: str | None
    """HOST:PORT of the first of several processes, or auto; see `runtime.processes.join`."""
    processes: int | None
    """The number of processes."""
    process: int | None
    """The index of this process."""


# --------------------------------------------------------------------------------------------------- tables <-> records


def from_table(table: Mapping[str, Any]) -> RunConfig:
    """Returns the checked configuration of a plain table, as TOML gives it.

    Raises ConfigError with the dotted key, the value, the rule and the choices.
    """
    check_copies_table(table.get("copies"))
    config = read_record(RunConfig, table)
    check(config)
    return config


def to_table(config: Any) -> dict[str, Any]:
    """Returns the plain table of a configuration or a part of it, without absent values (None)."""
    return {f.name: _plain(value) for f in dataclasses.fields(config) if (value := getattr(config, f.name)) is not None}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Returns the value of every setting by its dotted key, such as `stages.0.learning_rate`."""

    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(join(key, name), inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, inner in enumerate(value):
                yield from walk(f"{key}.{number}", inner)
        else:
            yield key, value

    return dict(walk("", to_table(config)))


def compare_runs(saved: Mapping[str, Any], current: Mapping[str, Any], config: RunConfig) -> None:
    """Raises DataError if a run cannot be resumed with these settings, and lists those that must not have changed.

    saved, current: `flatten` of both runs, with the digests of their model, files and data under `fingerprint.`. The
    marks in `train.config` say which settings may change. Values are compared as JSON represents them. A setting that
    is newer than the saved run counts as its default.
    """
    defaults = flatten(RunConfig("", "", Data(""), (Stage("", (), 0, 0.0),) * len(config.stages)))
    refused = []
    for key in sorted(saved.keys() | current.keys()):
        if key.startswith("fingerprint.data."):
            changes = _changed_images(saved.get(key) or {}, current.get(key) or {})
            if changes and config.checkpoint.allow_changed_data:
                log.warning("resuming with other images in %s: %s", key.rpartition(".")[2], changes)
            elif changes:
                allow = "--checkpoint.allow-changed-data resumes with them"
                refused.append(f"the images or captions of {key.removeprefix('fingerprint.')}: {changes} ({allow})")
            continue
        was = saved[key] if key in saved else defaults.get(key) if key in current else None
        before, now = (json.dumps(value, sort_keys=True) for value in (was, current.get(key)))
        if before == now:
            continue
        policy = on_resume(key)
        if key == "fingerprint.model":
            refused.append("model is another one: its weights, configs, schedule or tokenizer differ")
        elif key.startswith("fingerprint.files."):
            refused.append(f"the file of {key.removeprefix('fingerprint.files.')} is another one")
        elif policy is None:
            refused.append(f"{key} was {before}, is {now}")
        elif policy is OnResume.LOGGED:
            log.warning("resuming with another %s: was %s, is %s", key, before, now)
    if refused:
        raise DataError(f"cannot resume, the run has changed: {'; '.join(refused)}")


def _changed_images(before: Mapping[str, str], now: Mapping[str, str], most: int = 3) -> str:
    """Returns the names of the images that differ, for a message. before, now: name -> digest."""
    groups = {
        "changed": [name for name in now if name in before and before[name] != now[name]],
        "new": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
    }
    return ", ".join(
        f"{len(names)} {kind} ({', '.join([*names[:most], *['...'] * (len(names) > most)])})"
        for kind, names in groups.items()
        if names
    )


def on_resume(key: str) -> OnResume | None:
    """Returns the mark of the setting with this dotted key, or None if the setting must stay as it was."""
    record: Any = RunConfig
    for name in key.split("."):
        if name.isdigit():  # a place in a list of records
            continue
        hint = get_type_hints(record, include_extras=True).get(name)
        marks = [mark for mark in metadata(hint) if isinstance(mark, OnResume)]
        if marks or not (inner := [kind for kind in contained_types(hint) if dataclasses.is_dataclass(kind)]):
            return marks[0] if marks else None
        record = inner[0]
    return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------------ files and flags


def load(path: str | Path) -> RunConfig:
    """Reads a TOML file. Raises ConfigError."""
    return from_table(_read(Path(path)))


def load_run(folder: Path, stage: str | None) -> RunConfig:
    """Returns the configuration of a run from its folder.

    stage: the name of a stage that the run must have, or None. Raises DataError for a folder that is not a run's, and
    ConfigError for a stage that the run does not have.
    """
    if not (folder / "config.toml").is_file():
        copies = [str(path.parent) for path in sorted(folder.glob("*/config.toml"))]
        others = f"; those of its copies do: {', '.join(copies)}" if copies else ""
        raise DataError(f"{folder}: not the folder of a run, which holds config.toml{others}")
    config = load(folder / "config.toml")
    names = [own.name for own in config.stages]
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage {stage}: the stages of {folder} are {', '.join(names)}")
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not valid TOML: nested too deeply") from None
    except ValueError as e:  # also a text that is not UTF-8, and a number of thousands of digits
        raise ConfigError(f"{path} is not valid TOML: {e}") from None


def to_toml(config: RunConfig) -> str:
    """Returns the configuration as TOML text; `from_table(tomllib.loads(to_toml(c))) == c`."""
    return "\n".join(_toml_lines(to_table(config), "")).lstrip("\n") + "\n"


def _toml_lines(table: dict[str, Any], key: str) -> Iterator[str]:
    """Yields the lines of a table: its plain values, and then each inner table under a [header], as TOML demands."""
    inner = {k: v for k, v in table.items() if isinstance(v, dict)}
    lists = {k: v for k, v in table.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for name, value in table.items():
        if name not in inner and name not in lists:
            yield f"{_toml_key(name)} = {_toml_value(value)}"
    for name, value in inner.items():
        if value:
            yield from ("", f"[{join(key, _toml_key(name))}]", *_toml_lines(value, join(key, _toml_key(name))))
    for name, items in lists.items():
        for item in items:
            yield from ("", f"[[{join(key, name)}]]", *_toml_lines(item, join(key, name)))


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML has the escapes of JSON, but DEL must be escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def parse_args(argv: Sequence[str] | None = None, prog: str = "sdjax.train") -> Arguments:
    """Reads `CONFIG.toml [--key value ...] [--resume [--resume-step N]] [--debug]`. Flags win over the file.

    Several processes that train together also get `--coordinator HOST:PORT --processes N --process I`.

    argv: by default that of the process. A stage has a number: `--stages.0.steps 5`. `--help` prints the flags and
    exits with 0. Raises ConfigError.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        config = load(argv[0])
    elif {"-h", "--help"} & set(argv):
        config = RunConfig("MODEL", "OUTPUT", Data("FOLDER"), (Stage("NAME", ("lora",), 1000, 1e-4),))
    else:
        raise ConfigError(f"the configuration comes first: {prog} CONFIG.toml [--key value ...] [--resume]")

    @dataclass(frozen=True)
    class Command:
        file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG.toml", help="The run's settings.")]
        config: Annotated[RunConfig, tyro.conf.arg(name="")]
        resume: Annotated[bool, tyro.conf.arg(help="Resume from the newest intact checkpoint.")] = False
        resume_step: Annotated[int | None, tyro.conf.arg(help="Resume from this step, counted over all stages.")] = None
        debug: Annotated[bool, tyro.conf.arg(help="Show tracebacks of errors.")] = False
        coordinator: Annotated[
            str | None, tyro.conf.arg(help="HOST:PORT of the first of several processes; auto: JAX finds them.")
        ] = None
        processes: Annotated[int | None, tyro.conf.arg(help="Number of processes.")] = None
        process: Annotated[int | None, tyro.conf.arg(help="Index of this process, from 0.")] = None

    default = Command("", config)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            command, unknown = tyro.cli(Command, prog=prog, args=argv, default=default, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:
            raise
        raise ConfigError(_unboxed(complaint.getvalue())) from None
    if unknown:
        known = [f"--{flag}" for flag in (*COMMAND_FLAGS, *flags(config))]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), known, n=1)
        raise ConfigError(f"unknown flag {unknown[0]}: {f'did you mean {near[0]}?' if near else '--help lists them'}")
    # Read again from a table, so that flags obey the same rules as the file.
    config = from_table(to_table(command.config))
    return Arguments(
        config,
        command.resume or command.resume_step is not None,
        *(command.resume_step, command.debug, command.coordinator, command.processes, command.process),
    )


def flags(record: Any) -> Iterator[str]:
    """Yields the flag of every setting, without dashes in front, such as `stages.0.lora-rank`."""
    hints = get_type_hints(type(record))
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        inner = {f.name: value}
        if isinstance(value, tuple):
            inner = {f"{f.name}.{i}": item for i, item in enumerate(value)}
        records = {name: item for name, item in inner.items() if dataclasses.is_dataclass(item)}
        for name, item in records.items():
            yield from (f"{name}.{flag}" for flag in flags(item))
        if not records and not any(map(dataclasses.is_dataclass, get_args(hints[f.name]))):  # an empty list of records
            yield f.name.replace("_", "-")


def _unboxed(text: str) -> str:
    """Returns tyro's message as one line: the text in the box above the first rule."""
    lines = [line.strip("│ \n") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    return " ".join(line for line in lines[:rule] if line)
