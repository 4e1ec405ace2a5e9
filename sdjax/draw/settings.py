"""The settings of drawing. Each is declared here once, with its type, range, default and help.

The Python methods, the flags of `sdjax generate`, the lines of a `--jobs` file, the axes of a grid and the text in a
PNG file all follow these declarations. To add a setting, add a field here and use it in `draw.loop`.

Settings are plain dictionaries. `complete` fills in the defaults and checks every value.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, cast, get_type_hints

from sdjax.draw.solvers import SAMPLERS
from sdjax.settings import Fraction, Range, Seed, choices, metadata, parse, read_record

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = Literal[tuple(SAMPLERS)]

Steps = Annotated[int, Range(1, 1000)]
Guidance = Annotated[float, Range(0, 1000)]
Side = Annotated[int, Range(8, multiple=8)]
Strength = Annotated[float, Range(0, 1, above=True)]
Pixels = Annotated[int, Range(0, 1024)]


class Declared(NamedTuple):
    """What is known of a setting beside its type and range."""

    default: Any
    help: str
    unset: str = ""
    """What is used where the default is None, for the help text."""
    metavar: str = ""
    label: str = ""
    """Name in the text of a PNG file, as A1111 writes it; empty: not written."""
    names: Mapping[Any, str] = {}
    """Value -> what the text of a PNG file calls it."""
    axis: bool = False
    """Whether a grid may vary it. Such a setting leaves the size of the pictures as it is."""


class Shared(TypedDict, total=False):
    """The settings that every way of drawing takes, and that all pictures of a batch share."""

    steps: Annotated[Steps, Declared(20, "sampler steps", label="Steps", axis=True)]
    sampler: Annotated[
        SamplerName,
        Declared("dpmpp_2m", "sampler", label="Sampler", names={n: s.label for n, s in SAMPLERS.items()}, axis=True),
    ]
    karras: Annotated[
        bool,
        Declared(
            False,
            "noise levels spaced as in Karras et al. 2022",
            label="Schedule type",
            names={True: "Karras", False: "Automatic"},
        ),
    ]
    guidance: Annotated[
        Guidance,
        Declared(
            7.5,
            "classifier-free guidance scale (Ho and Salimans 2022); 1 = off; the tiny model likes 2 to 4",
            label="CFG scale",
            axis=True,
        ),
    ]
    guidance_rescale: Annotated[
        Fraction,
        Declared(
            0.0,
            "guidance rescale, phi of Lin et al. 2023, section 3.4; against overexposure",
            metavar="PHI",
            label="CFG Rescale",
            axis=True,
        ),
    ]
    height: Annotated[Side | None, Declared(None, "height in pixels", "the model's, or the image's", "PIXELS")]
    width: Annotated[Side | None, Declared(None, "width in pixels", "the model's, or the image's", "PIXELS")]
    clip_skip: Annotated[
        Annotated[int, Range(1, 1000)] | None,
        Declared(
            None,
            "text model layer from the end: 1 last, 2 penultimate",
            "the model's",
            label="Clip skip",
            axis=True,
        ),
    ]
    prompt_syntax: Annotated[Literal["a1111", "plain"], Declared("a1111", "how prompts are read")]
    emphasis: Annotated[
        Literal["original", "no_norm"],
        Declared(
            "original",
            "whether weighted prompts keep the mean of their context",
            label="Emphasis",
            names={"no_norm": "No norm"},
        ),
    ]
    variation_strength: Annotated[
        Fraction,
        Declared(
            0.0,
            "how far the noise moves towards that of the variation seed",
            metavar="S",
            label="Variation seed strength",
            axis=True,
        ),
    ]


class SecondPass(TypedDict, total=False):
    """Settings of a second pass: the picture is drawn small, enlarged and drawn again.

    hires_steps * hires_strength steps run. Prompts count on from the first pass, as in A1111: with 20 steps in the
    first pass, `[a:b:21]` changes after one step of the second, and `[a:b:1.5]` after half of the steps it runs.
    """

    hires_scale: Annotated[
        float,
        Range(1, 8),
        Declared(1.0, "draw, enlarge by this factor and draw again; 1 = off", metavar="X", label="Hires upscale"),
    ]
    hires_steps: Annotated[
        Steps | None,
        Declared(None, "sampler steps of the second pass", "those of the first", label="Hires steps", axis=True),
    ]
    hires_strength: Annotated[
        Strength,
        Declared(
            0.5,
            "how far the second pass redraws the first",
            metavar="S",
            label="Denoising strength",
            axis=True,
        ),
    ]
    hires_upscaler: Annotated[
        Literal["latent", "lanczos"],
        Declared(
            "latent",
            "what enlarges: latent (bilinear on the latents) or lanczos (on the decoded picture)",
            label="Hires upscaler",
            names={"latent": "Latent", "lanczos": "Lanczos"},
            axis=True,
        ),
    ]


class Masking(TypedDict, total=False):
    """Settings of inpainting.

    fill: what the region starts from where strength is below 1. These are A1111's "masked content": original, latent
    noise, fill (the surroundings, blurred), latent nothing (constant).
    only_masked: the region with `padding` around it is cropped, drawn at height x width (by default the size the model
    was trained at) and pasted back.
    """

    mask_blur: Annotated[
        Pixels,
        Declared(4, "width of the soft edge inside the mask", metavar="PIXELS", label="Mask blur", axis=True),
    ]
    mask_grow: Annotated[Pixels, Declared(0, "widen the mask", metavar="PIXELS", label="Mask grow", axis=True)]
    fill: Annotated[
        Literal["original", "noise", "blurred", "constant"],
        Declared(
            "original",
            "what the region starts as",
            label="Masked content",
            names={"blurred": "fill", "noise": "latent noise", "constant": "latent nothing"},
            axis=True,
        ),
    ]
    only_masked: Annotated[
        bool,
        Declared(
            False,
            "draw the region around the mask alone, at height x width",
            label="Inpaint area",
            names={True: "Only masked"},
        ),
    ]
    padding: Annotated[
        Pixels,
        Declared(
            32, "width of the surroundings in that region", metavar="PIXELS", label="Masked area padding", axis=True
        ),
    ]


class Settings(Shared, total=False):
    """The keywords of `StableDiffusion.img2img`.

    seed: image i of the call uses seed + i, whatever the batch; or one seed for each image.
    variation_seed: with variation_strength above 0 every image has the noise of `seed`, moved along the sphere towards
    that of variation_seed + i; or one seed for each image.
    num_images: pictures of each prompt. latents: unit noise [B, h, w, 4] in place of the noise of the seeds.
    progress: whether to show a bar.
    """

    seed: int | Sequence[int]
    variation_seed: int | Sequence[int]
    num_images: int
    latents: Any
    progress: bool


class TextToImageSettings(Settings, SecondPass, total=False):
    """The keywords of `StableDiffusion.text2image`."""


class InpaintSettings(Settings, Masking, total=False):
    """The keywords of `StableDiffusion.inpaint`."""


class PictureSettings(Shared, SecondPass, Masking, total=False):
    """All settings that the pictures of a batch share."""


class JobSettings(PictureSettings, total=False):
    """The settings of one picture: a line of a `--jobs` file."""

    prompt: Annotated[str, Declared("", "what to draw", axis=True)]
    negative_prompt: Annotated[str, Declared("", "what not to draw", metavar="TEXT", axis=True)]
    seed: Annotated[Seed, Declared(0, "seed of the first picture; the next pictures count up from it", axis=True)]
    variation_seed: Annotated[
        Seed, Declared(0, "another seed, to vary the pictures of --seed by", metavar="N", axis=True)
    ]
    image: Annotated[str | None, Declared(None, "picture to start from", "none", "FILE")]
    mask: Annotated[
        str | None,
        Declared(
            None,
            'paint the image only where this picture is white; "alpha": where the image is transparent',
            "none",
            "FILE",
        ),
    ]
    strength: Annotated[
        Strength | None,
        Declared(
            None, "how far to redraw the image", "0.75; with a mask 1", "S", label="Denoising strength", axis=True
        ),
    ]
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        Declared(None, "pixels to add to the image and paint: left, top, right, bottom", "none", "L,T,R,B"),
    ]
    lora: Annotated[
        tuple[str, ...],
        Declared((), "LoRA to merge in, FILE or FILE:WEIGHT; may be repeated", metavar="FILE[:WEIGHT]", axis=True),
    ]


@functools.cache
def declarations() -> dict[str, tuple[Any, Declared]]:
    """Name -> (annotation, declaration) of every setting of a picture."""
    hints = get_type_hints(JobSettings, include_extras=True)
    return {
        name: (hint, next(data for data in hint.__metadata__ if isinstance(data, Declared)))
        for name, hint in hints.items()
    }


def complete(given: Mapping[str, Any]) -> PictureSettings:
    """The given settings, checked, with defaults for those left out. Raises ConfigError."""
    names = PictureSettings.__optional_keys__
    defaults = {name: declared.default for name, (_, declared) in declarations().items() if name in names}
    return cast(PictureSettings, read_record(PictureSettings, {**defaults, **given}))


def complete_job(given: Mapping[str, Any], key: str = "") -> JobSettings:
    """The given settings of a job, checked, with defaults for those left out. Raises ConfigError."""
    defaults = {name: declared.default for name, (_, declared) in declarations().items()}
    return cast(JobSettings, read_record(JobSettings, {**defaults, **given}, key))


def from_text(name: str, text: str, key: str) -> Any:
    """The value of a setting from the text of a flag or of a grid's axis. Raises ConfigError, which names `key`."""
    return parse(declarations()[name][0], text, key)


def help_text(name: str) -> str:
    """One line on a setting: what it does, its range and its default."""
    hint, declared = declarations()[name]
    parts = [declared.help, *(rule.expected for rule in metadata(hint) if isinstance(rule, Range))]
    parts += [f"one of {', '.join(choices(hint))}"] if choices(hint) else []
    default = declared.unset if declared.default is None else _shown(declared.default)
    return ", ".join(parts) + (f" ({default})" if default else "")


def _shown(default: Any) -> str:
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return f"{default:g}"
    return default if isinstance(default, str) else ""


def labelled(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Label -> what the text of a PNG file says, for the named settings."""
    found = {name: declarations()[name][1] for name in names}
    return {declared.label: declared.names.get(settings[name], settings[name]) for name, declared in found.items()}


def changed(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The named settings that are not at their defaults."""
    return [name for name in names if settings[name] != declarations()[name][1].default]
