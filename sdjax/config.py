"""A run's settings: frozen dataclasses, filled from a TOML file and flags, strictly.

`parse_args` is the way in: TOML file -> `RunConfig` -> every field again as a flag -> checked `RunConfig`.
Paths are relative to the current directory, in the file and in flags alike. TOML knows no null, so a text that may
be absent is empty, and a number that may be absent is left out.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import sys
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sdjax.errors import ConfigError


class Rule(NamedTuple):
    """What a number must satisfy: `low <= x <= high` (`low < x` if `above`) and `x % multiple == 0`."""

    low: float
    high: float = math.inf
    multiple: int = 1
    above: bool = False

    def broken_by(self, value: float) -> str | None:
        """What `value` should have been, or None if it obeys."""
        if value < self.low or value > self.high or (self.above and value == self.low):
            bounds = f"{'above' if self.above else 'at least'} {self.low:g}"
            return bounds if math.isinf(self.high) else f"{bounds} and at most {self.high:g}"
        if self.multiple > 1 and value % self.multiple:
            return f"a multiple of {self.multiple}"
        return None


Count = Annotated[int, Rule(1)]
Whole = Annotated[int, Rule(0)]
Fraction = Annotated[float, Rule(0, 1)]
Positive = Annotated[float, Rule(0, above=True)]
NotNegative = Annotated[float, Rule(0)]
Resolution = Annotated[int, Rule(8, 4096, multiple=8)]
Seed = Annotated[int, Rule(0, 2**32 - 1)]
Text = Annotated[str, "not empty"]
OnBadImage = Literal["skip", "fail"]
MissingCaption = Literal["fail", "empty", "skip"]
LoraTargets = Literal["attention", "attention+ff", "transformer", "linear", "conv"]

TRAINABLE = ("lora",)
"""What `train` may name today; the other kinds of the documentation are refused as not available yet."""

PLANNED = ("textual_inversion", "unet", "text_encoder", "vae")


@dataclass(frozen=True)
class Data:
    """A folder of captioned images."""

    path: Text
    """Folder of images, with metadata.jsonl, or NAME.txt beside NAME.png, or one caption for all."""
    resolution: Resolution = 512
    """Side of the square training images, in pixels: a multiple of 8."""
    batch_size: Count = 1
    """Images a step takes at once, over all devices."""
    accumulation: Count = 1
    """Batches whose gradients are averaged into one optimizer step."""
    flip: bool = False
    """Mirror each image left to right half of the time."""
    caption: str = ""
    """One caption for every image that has none of its own."""
    missing_caption: MissingCaption = "fail"
    """An image without a readable caption: fail, train it with an empty caption, or skip it."""
    on_bad_image: OnBadImage = "fail"
    """An unreadable image: fail, or skip it with a warning."""
    background: str = "white"
    """Colour put behind transparent pixels: a CSS name or #rrggbb."""
    caption_dropout: Fraction = 0.0
    """Share of examples trained with the empty caption, 0 to 1."""
    validation_path: str = ""
    """Folder of images held out of training, instead of a share of path."""
    validation_count: Whole = 0
    """Images of path held out of training."""
    validation_fraction: Annotated[float, Rule(0, 0.9)] = 0.0
    """Share of the images of path held out of training, 0 to 0.9."""
    cache: str = ""
    """Folder for cached latents and prompt embeddings; empty: OUTPUT/cache."""


@dataclass(frozen=True)
class DataOverride:
    """What one stage changes in [data]; a field left out keeps the run's value."""

    path: Text | None = None
    """Replaces data.path in this stage."""
    resolution: Resolution | None = None
    """Replaces data.resolution in this stage."""
    batch_size: Count | None = None
    """Replaces data.batch_size in this stage."""
    accumulation: Count | None = None
    """Replaces data.accumulation in this stage."""
    flip: bool | None = None
    """Replaces data.flip in this stage."""
    caption: str | None = None
    """Replaces data.caption in this stage."""
    missing_caption: MissingCaption | None = None
    """Replaces data.missing_caption in this stage."""
    on_bad_image: OnBadImage | None = None
    """Replaces data.on_bad_image in this stage."""
    background: str | None = None
    """Replaces data.background in this stage."""
    caption_dropout: Fraction | None = None
    """Replaces data.caption_dropout in this stage."""
    validation_path: str | None = None
    """Replaces data.validation_path in this stage."""
    validation_count: Whole | None = None
    """Replaces data.validation_count in this stage."""
    validation_fraction: Annotated[float, Rule(0, 0.9)] | None = None
    """Replaces data.validation_fraction in this stage."""
    cache: str | None = None
    """Replaces data.cache in this stage."""


@dataclass(frozen=True)
class Stage:
    """One leg of a run: what is trained, for how long and how."""

    name: Annotated[str, "file name"]
    """Name of the stage, used for its files."""
    train: tuple[str, ...]
    """What is trained: lora."""
    steps: Count
    """Optimizer steps."""
    learning_rate: Positive | dict[str, NotNegative]
    """Peak learning rate, or one for each part: unet 1e-4 text_encoder 5e-5."""
    lora_parts: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = ("unet",)
    """Models that get an adapter: unet, text_encoder, text_encoder_2."""
    lora_rank: Count = 4
    """Rank of the adapter."""
    lora_ranks: dict[str, Whole] = field(default_factory=dict)
    """Other ranks for some layers: regular expression over the layer's path -> rank (0: no adapter)."""
    lora_alpha: Positive | None = None
    """Strength: the adapter is scaled by alpha / rank. Left out: alpha = rank."""
    lora_targets: LoraTargets | tuple[str, ...] = "attention"
    """Layers that get an adapter: a set by name, or a list of regular expressions over their paths."""
    lora_dropout: Annotated[float, Rule(0, 0.99)] = 0.0
    """Share of the adapter's inputs dropped in training, 0 to 0.99."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """Learn the magnitude of each output on its own (DoRA)."""
    lora_plus_ratio: Positive = 1.0
    """LoRA+: learning rate of the up matrices as a multiple of the part's."""
    optimizer: Literal["adamw"] = "adamw"
    """Optimizer."""
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: Whole = 0
    """Optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: NotNegative = 1e-2
    """Decoupled weight decay of AdamW."""
    betas: tuple[Annotated[float, Rule(0, 0.999999)], Annotated[float, Rule(0, 0.999999)]] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_norm: NotNegative = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    min_snr_gamma: NotNegative = 0.0
    """Min-SNR loss weighting with this gamma (5 is usual); 0: off."""
    debiased: bool = False
    """Debiased loss weighting; not together with min_snr_gamma."""
    timestep_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Time steps trained, as fractions of the schedule: from 0 (clean) to 1 (noise)."""
    data: DataOverride = DataOverride()


@dataclass(frozen=True)
class Validation:
    """Pictures and held-out loss during training."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn at each validation."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    every: Whole = 0
    """Optimizer steps between validations; 0: only at the start and the end of a stage."""
    steps: Count = 20
    """Sampler steps of a picture."""
    guidance: NotNegative = 7.5
    """Guidance scale; 1: none."""
    sampler: Literal["ddim", "pndm", "lms", "heun", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"] = (
        "dpmpp_2m"
    )
    """Sampler."""
    seed: Seed = 0
    """Seed of the first picture and of the noise of the held-out loss."""
    held_out_images: Whole = 0
    """Most held-out images the loss is taken over; 0: all."""
    held_out_timesteps: Count = 4
    """Time steps, evenly spread and the same each time, at which each held-out image is tried."""


@dataclass(frozen=True)
class Checkpoint:
    """What survives a crash."""

    every: Whole = 100
    """Optimizer steps between checkpoints; 0: only at the end of a stage."""
    keep: Count = 3
    """Newest checkpoints kept."""
    allow_changed_data: bool = False
    """Resume although the images or captions have changed."""


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis; -1 takes what is left."""

    data: Annotated[int, Rule(-1)] = -1
    """Copies of the model, each with its part of the batch; -1: all devices."""
    fsdp: Annotated[int, Rule(-1)] = 1
    """Devices over which the frozen weights are split."""


@dataclass(frozen=True)
class Parallel:
    """Several devices."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit over a mesh, or pmap (the data axis only)."""
    mesh: Mesh = Mesh()


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: Text
    """Base model: tiny, a diffusers folder, a .safetensors or .ckpt file, or a hub id."""
    output: Text
    """Folder of the run: config.toml, metrics.jsonl, samples, checkpoints, export."""
    data: Data
    stages: tuple[Stage, ...]
    seed: Seed = 0
    """Seed of all randomness."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the computation; what is trained stays float32."""
    clip_skip: Count | None = None
    """Text model layer used, counted from the end: 1 last, 2 penultimate. Left out: the model's own."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    variant: str = ""
    """Variant of the weight files, such as fp16."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss that is not a number: stop the run, or skip that step."""
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    parallel: Parallel = Parallel()

    def data_of(self, stage: Stage) -> Data:
        """The data settings of one stage: [data] with the stage's own changes."""
        changes = {k: v for k, v in dataclasses.asdict(stage.data).items() if v is not None}
        return dataclasses.replace(self.data, **changes)


class Arguments(NamedTuple):
    """A training command line, read and checked."""

    config: RunConfig
    resume: bool
    """Go on from the newest good checkpoint, or start fresh if there is none."""
    resume_step: int | None
    """Go on from exactly this step."""
    debug: bool
    """Show tracebacks."""


# --------------------------------------------------------------------------------------------------- tables <-> records


def from_table(table: Mapping[str, Any]) -> RunConfig:
    """A checked configuration from TOML's plain tables.

    Raises ConfigError with the dotted key, what was given, the rule and the choices.
    """
    config = _record(RunConfig, table, "")
    _check_whole(config)
    return config


def to_table(config: Any) -> dict[str, Any]:
    """The plain tables of a configuration; absent values (None) are left out."""
    return {f.name: _plain(value) for f in dataclasses.fields(config) if (value := getattr(config, f.name)) is not None}


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, for comparing two runs: `stages.0.learning_rate`, `data.path`, ..."""

    def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(_join(key, name), inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, inner in enumerate(value):
                yield from walk(f"{key}.{number}", inner)
        else:
            yield key, value

    return dict(walk("", to_table(config)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, dict) else value


def _record(cls: type, table: Any, key: str) -> Any:
    if not isinstance(table, Mapping):
        raise _wrong(key, table, "a table")
    hints = get_type_hints(cls, include_extras=True)
    for name in table:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            advice = f"did you mean {_join(key, near[0])}?" if near else f"choices: {', '.join(hints)}"
            raise ConfigError(f"unknown key {_join(key, name)}: {advice}")
    missing = [
        _join(key, f.name)
        for f in dataclasses.fields(cls)
        if f.name not in table and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)}")
    return cls(**{name: _value(hints[name], value, _join(key, name)) for name, value in table.items()})


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint` wants it, or ConfigError."""
    kind, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _record(hint, value, key)  # type: ignore[arg-type]
    if kind is Annotated:
        return _annotated(arguments, value, key)
    if kind is Literal:
        if value not in arguments or not isinstance(value, str):
            raise _wrong(key, value, f"one of {', '.join(arguments)}")
        return value
    if kind in (Union, types.UnionType):
        # `X | None`, `number | table` or `name | list`: the value's own shape picks the branch.
        container = dict if isinstance(value, Mapping) else tuple if isinstance(value, (list, tuple)) else None
        branch = next((a for a in arguments if container and get_origin(a) is container), arguments[0])
        return _value(branch, value, key)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(key, value, "a table")
        return {name: _value(arguments[1], inner, _join(key, name)) for name, inner in value.items()}
    if kind is tuple:
        return _sequence(arguments, value, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise _wrong(key, value, {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[hint])
    return value


def _annotated(arguments: tuple[Any, ...], value: Any, key: str) -> Any:
    hint, rule = arguments
    value = _value(hint, value, key)
    if isinstance(rule, Rule):
        expected = rule.broken_by(value)
    elif rule == "file name":
        expected = None if re.fullmatch(r"[\w.-]*\w[\w.-]*", value) else "a name of letters, digits, '_', '-' and '.'"
    else:
        expected = None if value else "not empty"
    if expected:
        raise _wrong(key, value, expected)
    return value


def _sequence(arguments: tuple[Any, ...], value: Any, key: str) -> tuple[Any, ...]:
    if isinstance(value, str) and arguments[-1] is Ellipsis:
        value = [value]  # one name may stand for a list of one
    if not isinstance(value, (list, tuple)):
        raise _wrong(key, value, "a list")
    if arguments[-1] is Ellipsis:
        return tuple(_value(arguments[0], item, f"{key}.{i}") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise _wrong(key, value, f"a list of {len(arguments)}")
    return tuple(_value(hint, item, f"{key}.{i}") for i, (hint, item) in enumerate(zip(arguments, value, strict=True)))


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _wrong(key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{key} = {value!r}: expected {expected}")


# -------------------------------------------------------------------------------------------- rules over several fields


def _check_whole(config: RunConfig) -> None:
    """Rules that no single field can state."""
    if not config.stages:
        raise ConfigError("stages is empty: a run needs at least one [[stages]] table")
    names = [stage.name for stage in config.stages]
    for i, stage in enumerate(config.stages):
        if stage.name in names[:i]:
            raise ConfigError(f"stages.{i}.name = {stage.name!r} is taken by an earlier stage: names must differ")
        _check_stage(stage, f"stages.{i}")
        _check_data(config.data_of(stage), f"stages.{i}.data")
    mesh = config.parallel.mesh
    if mesh.data == -1 and mesh.fsdp == -1:
        raise ConfigError("parallel.mesh: only one of data and fsdp may be -1")
    if 0 in (mesh.data, mesh.fsdp):
        raise ConfigError("parallel.mesh: an axis is 0; expected -1 or at least 1")
    if config.parallel.mode == "pmap" and mesh.fsdp != 1:
        raise ConfigError(f"parallel.mode = 'pmap' has a data axis only, but parallel.mesh.fsdp = {mesh.fsdp}")


def _check_stage(stage: Stage, key: str) -> None:
    for kind in stage.train:
        if kind in PLANNED:
            raise ConfigError(f"{key}.train: {kind!r} is not available yet; choices: {', '.join(TRAINABLE)}")
        if kind not in TRAINABLE:
            raise ConfigError(f"{key}.train: unknown kind {kind!r}; choices: {', '.join(TRAINABLE)}")
    for name in ("train", "lora_parts", "lora_targets"):
        values = getattr(stage, name)
        if not values or (isinstance(values, tuple) and len(set(values)) < len(values)):
            raise _wrong(f"{key}.{name}", list(values), "at least one name, and none twice")
    patterns = stage.lora_targets if isinstance(stage.lora_targets, tuple) else ()
    for pattern in (*patterns, *stage.lora_ranks):
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {e}") from None
    if isinstance(stage.learning_rate, dict) and set(stage.learning_rate) != set(stage.lora_parts):
        raise ConfigError(
            f"{key}.learning_rate has {', '.join(stage.learning_rate) or 'no part'}, "
            f"but the stage trains {', '.join(stage.lora_parts)}: one rate for each"
        )
    if stage.min_snr_gamma and stage.debiased:
        raise ConfigError(f"{key}: min_snr_gamma and debiased are two weightings of the same loss: choose one")
    if stage.schedule == "constant_with_warmup" and not stage.warmup_steps:
        raise ConfigError(f"{key}.schedule = 'constant_with_warmup' needs {key}.warmup_steps above 0")
    if stage.warmup_steps > stage.steps:
        raise ConfigError(f"{key}.warmup_steps = {stage.warmup_steps} is more than {key}.steps = {stage.steps}")
    if stage.timestep_range[0] >= stage.timestep_range[1]:
        raise _wrong(f"{key}.timestep_range", list(stage.timestep_range), "the first below the second")


def _check_data(data: Data, key: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(data.background)
    except ValueError:
        raise _wrong(f"{key}.background", data.background, "a CSS colour name or #rrggbb") from None
    given = [n for n in ("validation_path", "validation_count", "validation_fraction") if getattr(data, n)]
    if len(given) > 1:
        raise ConfigError(f"{key}: {' and '.join(given)} both say what is held out: choose one")


# ------------------------------------------------------------------------------------------------------ files and flags


def load(path: str | Path) -> RunConfig:
    """Read a TOML file."""
    return from_table(_read(Path(path)))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror or e}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid TOML: {e}") from None


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML text; `from_table(tomllib.loads(to_toml(c))) == c`."""
    return "\n".join(_toml_lines(to_table(config), "")).lstrip("\n") + "\n"


def _toml_lines(table: dict[str, Any], key: str) -> Iterator[str]:
    """Plain values first, then a [header] for each inner table: TOML's own order."""
    inner = {k: v for k, v in table.items() if isinstance(v, dict)}
    lists = {k: v for k, v in table.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    for name, value in table.items():
        if name not in inner and name not in lists:
            yield f"{_toml_key(name)} = {_toml_value(value)}"
    for name, value in inner.items():
        if value:
            yield from ("", f"[{_join(key, _toml_key(name))}]", *_toml_lines(value, _join(key, _toml_key(name))))
    for name, items in lists.items():
        for item in items:
            yield from ("", f"[[{_join(key, name)}]]", *_toml_lines(item, _join(key, name)))


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def parse_args(argv: Sequence[str] | None = None, prog: str = "sdjax.train") -> Arguments:
    """Read `CONFIG.toml [--key value ...] [--resume [--resume-step N]] [--debug]`; flags win over the file.

    A stage is addressed by its number: `--stages.0.steps 5`. `--help` prints and exits with 0. Raises ConfigError.
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
        resume: Annotated[bool, tyro.conf.arg(help="Go on from the newest good checkpoint.")] = False
        resume_step: Annotated[int | None, tyro.conf.arg(help="Go on from exactly this step.")] = None
        debug: Annotated[bool, tyro.conf.arg(help="Show tracebacks of errors.")] = False

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
        flags = [f"--{key}" for key in ("resume", "resume-step", "debug", *_flags(config))]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("_", "-"), flags, n=1)
        raise ConfigError(f"unknown flag {unknown[0]}: {f'did you mean {near[0]}?' if near else '--help lists them'}")
    # Once more through the tables, so that flags obey the same rules as the file.
    config = from_table(to_table(command.config))
    return Arguments(config, command.resume or command.resume_step is not None, command.resume_step, command.debug)


def _flags(record: Any) -> Iterator[str]:
    """The flag of every field: `stages.0.lora-rank`."""
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        inner = {f.name: value}
        if isinstance(value, tuple):
            inner = {f"{f.name}.{i}": item for i, item in enumerate(value)}
        records = {name: item for name, item in inner.items() if dataclasses.is_dataclass(item)}
        for name, item in records.items():
            yield from (f"{name}.{flag}" for flag in _flags(item))
        if not records:
            yield f.name.replace("_", "-")


def _unboxed(text: str) -> str:
    """tyro's boxed message as one line: what stands between the title and the first rule inside the box."""
    lines = [line.strip("│ \n") for line in text.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((i for i, line in enumerate(lines) if line and not line.strip("─")), len(lines))
    return " ".join(line for line in lines[:rule] if line)
