"""The settings of drawing. Each is declared once, here, with its type, range, default and help text.

The Python methods, the flags of `sdjax generate`, the lines of a `--jobs` file, the axes of a grid and the text in a
PNG file all follow these declarations. To add a setting, add a field here and use it in `draw.loop`.

Settings are plain dictionaries. `complete` checks every value and adds the defaults.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, cast, get_type_hints

from sdjax.settings import Fraction, Guidance, Range, Seed, Text, choices, metadata, parse, read_record

SAMPLER_LABELS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "lms": "LMS",
    "heun": "Heun",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "unipc": "UniPC",
    "restart": "Restart",
    "er_sde": "ER SDE",
    "lcm": "LCM",
    "tcd": "TCD",
}
"""Name -> label in A1111 of every sampler; `draw.samplers` defines them."""

SPACING_LABELS = {
    "leading": "Leading",
    "linspace": "Linspace",
    "trailing": "Trailing",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
}
"""Name -> label in A1111 of every spacing, where A1111 has it; `draw.levels` defines them."""

if TYPE_CHECKING:
    SamplerName = SpacingName = str
else:
    SamplerName = Literal[tuple(SAMPLER_LABELS)]
    SpacingName = Literal[tuple(SPACING_LABELS)]

Steps = Annotated[int, Range(1, 1000)]
LARGEST_SIDE = 16384
"""Longest side of a picture in pixels."""
Side = Annotated[int, Range(8, LARGEST_SIDE, multiple=8)]
Strength = Annotated[float, Range(0, 1, above=True)]
Pixels = Annotated[int, Range(0, 1024)]
SIZE_CONDITIONS = ("original_size", "crops_coords_top_left", "target_size")
Watch = Callable[[int, int, Any], None]
UpscaleFactor = Annotated[float, Range(0, 16, above=True)]


class Declared(NamedTuple):
    """What the declaration of a setting says beside its type and range."""

    default: Any
    help: str
    """What the setting does. `help_text` adds the range or the choices before the first semicolon."""
    label: str = ""
    """The name in the text of a PNG file, as A1111 writes it; empty: not written."""
    axis: bool = False
    """Whether a grid may vary the setting. A setting that changes the size of the pictures may not be varied."""
    unset: str = ""
    """What the default None stands for, for the help text."""
    metavar: str = ""
    names: Mapping[Any, str] = {}
    """Value -> its name in the text of a PNG file, where they differ."""


class Subject(TypedDict, total=False):
    """The prompts and seeds of one picture. The pictures of a batch may differ in them."""

    prompt: Annotated[str, Declared("", "what to draw", axis=True)]
    negative_prompt: Annotated[str, Declared("", "what not to draw", axis=True, metavar="TEXT")]
    seed: Annotated[Seed, Declared(0, "seed of the first picture; the next pictures count up from it", axis=True)]
    variation_seed: Annotated[Seed, Declared(0, "second seed; its noise is mixed into that of the first", axis=True)]


class Reading(TypedDict, total=False):
    """Settings of how prompts and seeds are read."""

    variation_strength: Annotated[
        Fraction, Declared(0.0, "share of the variation seed in the noise", "Variation seed strength", axis=True)
    ]
    prompt_syntax: Annotated[Literal["a1111", "plain"], Declared("a1111", "syntax of prompts")]
    emphasis: Annotated[
        Literal["original", "no_norm"],
        Declared(
            "original",
            "effect of weights in prompts; original restores the mean of the context, no_norm does not",
            "Emphasis",
            names={"no_norm": "No norm"},
        ),
    ]
    clip_skip: Annotated[
        Annotated[int, Range(1, 1000)] | None,
        Declared(None, "text model layer to use; 1 is the last, 2 the penultimate", "Clip skip", True, "the model's"),
    ]


class Sampling(TypedDict, total=False):
    """Settings of the sampler, the guidance and the size."""

    sampler: Annotated[SamplerName, Declared("dpmpp_2m", "sampler", "Sampler", True, names=SAMPLER_LABELS)]
    steps: Annotated[Steps, Declared(20, "sampler steps", "Steps", axis=True)]
    spacing: Annotated[
        SpacingName | None,
        Declared(
            None,
            "spacing of the timesteps or of the noise levels",
            "Schedule type",
            True,
            "the model's",
            names={None: "Automatic", **SPACING_LABELS},
        ),
    ]
    karras: Annotated[bool, Declared(False, "use the noise levels of Karras et al. 2022; the same as spacing karras")]
    guidance: Annotated[
        Guidance | None,
        Declared(
            None,
            "classifier-free guidance scale of Ho and Salimans 2022; 1 is off",
            "CFG scale",
            True,
            "the model's, or 7.5",
        ),
    ]
    guidance_rescale: Annotated[
        Fraction,
        Declared(
            0.0, "guidance rescale against overexposure; phi of Lin et al. 2023, section 3.4", "CFG Rescale", axis=True
        ),
    ]
    freeu: Annotated[
        tuple[float, float, float, float] | None,
        Declared(
            None,
            "factors of FreeU of Si et al. 2023: of the backbone and of the skips, at the smallest and the next level",
            "FreeU",
            unset="off",
            metavar="B1,B2,S1,S2",
        ),
    ]
    height: Annotated[Side | None, Declared(None, "height", unset="the model's, or the image's", metavar="PIXELS")]
    width: Annotated[Side | None, Declared(None, "width", unset="the model's, or the image's", metavar="PIXELS")]
    original_size: Annotated[
        tuple[int, int] | None,
        Declared(
            None,
            "SDXL's condition: size of the picture before it was resized and cropped",
            "Original size",
            unset="the picture's",
            metavar="H,W",
        ),
    ]
    crops_coords_top_left: Annotated[
        tuple[int, int] | None,
        Declared(None, "SDXL's condition: where the picture was cropped", "Crop top left", unset="0,0", metavar="Y,X"),
    ]
    target_size: Annotated[
        tuple[int, int] | None,
        Declared(
            None,
            "SDXL's condition: size of the picture after it was resized and cropped",
            "Target size",
            unset="the picture's",
            metavar="H,W",
        ),
    ]


class Enlarging(TypedDict, total=False):
    """Settings of how the finished picture is enlarged; see `draw.upscaling.upscale`, which writes its own PNG text."""

    upscale: Annotated[
        Text | None,
        Declared(None, "upscaler that enlarges the finished picture; tiny (embedded) or a file", metavar="MODEL"),
    ]
    scale: Annotated[
        UpscaleFactor | None,
        Declared(None, "how many times as long its sides become", unset="the upscaler's", metavar="N"),
    ]


class Shared(Reading, Sampling, Enlarging, total=False):
    """The settings that every way of drawing takes, and that all pictures of a batch share."""


class SecondPass(TypedDict, total=False):
    """Settings of a second pass: the picture is drawn small, enlarged and drawn again.

    hires_steps * hires_strength steps run. The steps in prompts count on from the first pass, as in A1111. With 20
    steps in the first pass, `[a:b:21]` changes after one step of the second pass, and `[a:b:1.5]` after half of them.
    """

    hires_scale: Annotated[
        float, Range(1, 8), Declared(1.0, "draw, enlarge by this factor and draw again; 1 is off", "Hires upscale")
    ]
    hires_steps: Annotated[
        Steps | None, Declared(None, "sampler steps of the second pass", "Hires steps", True, "those of the first")
    ]
    hires_strength: Annotated[
        Strength, Declared(0.5, "how far the second pass redraws the first", "Denoising strength", axis=True)
    ]
    hires_upscaler: Annotated[
        Text,
        Declared(
            "latent",
            "what enlarges the picture; latent: bilinear on the latents; lanczos, tiny (embedded) or the file of an "
            "upscaler: on the decoded picture",
            "Hires upscaler",
            axis=True,
            metavar="NAME",
            names={"latent": "Latent", "lanczos": "Lanczos"},
        ),
    ]


class Source(TypedDict, total=False):
    """Settings of the image to start from."""

    image: Annotated[str | None, Declared(None, "picture to start from", metavar="FILE")]
    strength: Annotated[
        Strength | None,
        Declared(None, "how far to redraw the image", "Denoising strength", True, "0.75; with a mask 1"),
    ]
    mask: Annotated[
        str | None,
        Declared(
            None, 'paint where this picture is white; "alpha" paints where the image is transparent', metavar="FILE"
        ),
    ]
    outpaint: Annotated[
        tuple[int, int, int, int] | None,
        Declared(None, "pixels to add to the image and paint: left, top, right, bottom", metavar="L,T,R,B"),
    ]


class Masking(TypedDict, total=False):
    """Settings of inpainting.

    fill: what the masked region starts as if the strength is below 1. A1111 calls it "masked content": original, latent
    noise (noise), fill (blurred: the surroundings), latent nothing (constant).
    only_masked: the masked region with `padding` around it is cropped, drawn at height x width (by default the size the
    model was trained at) and pasted back.
    """

    mask_blur: Annotated[
        Pixels, Declared(4, "width of the soft edge inside the mask", "Mask blur", axis=True, metavar="PIXELS")
    ]
    mask_grow: Annotated[Pixels, Declared(0, "how far to widen the mask", "Mask grow", axis=True, metavar="PIXELS")]
    fill: Annotated[
        Literal["original", "noise", "blurred", "constant"],
        Declared(
            "original",
            "what the masked region starts as if the strength is below 1",
            "Masked content",
            axis=True,
            names={"blurred": "fill", "noise": "latent noise", "constant": "latent nothing"},
        ),
    ]
    only_masked: Annotated[
        bool,
        Declared(False, "draw the masked region alone, at height x width", "Inpaint area", names={True: "Only masked"}),
    ]
    padding: Annotated[
        Pixels,
        Declared(32, "width of the surroundings in that region", "Masked area padding", axis=True, metavar="PIXELS"),
    ]


class Settings(Shared, total=False):
    """The keywords of `StableDiffusion.img2img`.

    seed: picture i of the call uses seed + i; or a sequence with a seed for each picture.
    variation_seed: with variation_strength above 0 every picture has the noise of `seed`, moved along the sphere
    towards the noise of variation_seed + i; or a sequence with a seed for each picture.
    num_images: the number of pictures of each prompt.
    latents: unit noise [B, h, w, 4] in place of the noise of the seeds.
    progress: whether to show a progress bar.
    watch: called after each evaluation of the U-Net with the number of evaluations done, that of all, and the latents
    [B, h, w, 4] so far. A second pass counts anew. The call ends with whatever it raises.
    """

    seed: int | Sequence[int]
    variation_seed: int | Sequence[int]
    num_images: int
    latents: Any
    progress: bool
    watch: Watch


class TextToImageSettings(Settings, SecondPass, total=False):
    """The keywords of `StableDiffusion.text2image`."""


class InpaintSettings(Settings, Masking, total=False):
    """The keywords of `StableDiffusion.inpaint`."""


class PictureSettings(Shared, SecondPass, Masking, total=False):
    """All settings that the pictures of a batch share."""


class Adapters(TypedDict, total=False):
    """Settings of the adapters that are merged into the weights."""

    lora: Annotated[tuple[str, ...], Declared((), "LoRA to merge in", axis=True, metavar="FILE[:WEIGHT]")]


class JobSettings(Subject, PictureSettings, Source, Adapters, total=False):
    """The settings of one picture: a line of a `--jobs` file."""


@functools.cache
def declarations() -> dict[str, tuple[Any, Declared]]:
    """Name -> (annotation, declaration) of every setting of a picture."""
    return {
        name: (hint, next(mark for mark in metadata(hint) if isinstance(mark, Declared)))
        for name, hint in get_type_hints(JobSettings, include_extras=True).items()
    }


def complete(settings: Mapping[str, Any]) -> PictureSettings:
    """Checks settings and adds the defaults of those left out. Raises ConfigError."""
    return cast(PictureSettings, _completed(PictureSettings, settings))


def complete_job(settings: Mapping[str, Any]) -> JobSettings:
    """Checks the settings of a job and adds the defaults of those left out. Raises ConfigError."""
    return cast(JobSettings, _completed(JobSettings, settings))


def _completed(kind: Any, settings: Mapping[str, Any]) -> Any:
    names = kind.__optional_keys__
    defaults = {name: declared.default for name, (_, declared) in declarations().items() if name in names}
    return read_record(kind, {**defaults, **settings})


def from_text(name: str, text: str, key: str) -> Any:
    """Reads the value of a setting from a flag or an axis of a grid. Raises ConfigError, which names `key`."""
    return parse(declarations()[name][0], text, key)


def help_text(name: str) -> str:
    """One line on a setting: what it does, its range or choices, and its default."""
    hint, declared = declarations()[name]
    purpose, *remarks = declared.help.split("; ")
    purpose += "".join(f", {_words(rule)}" for rule in metadata(hint) if isinstance(rule, Range))
    if names := choices(hint):
        purpose += f": {', '.join(names[:-1])} or {names[-1]}"
    default = declared.unset if declared.default is None else declared.default
    shown = not isinstance(default, (bool, tuple)) and default != ""
    return "; ".join([purpose, *remarks]) + (f" (default: {str(default).removesuffix('.0')})" if shown else "")


def _words(rule: Range) -> str:
    """A range in the words of a help text, which are fewer than those of an error."""
    if rule.multiple > 1:
        return f"a multiple of {rule.multiple}"
    return rule.expected if rule.above else f"{rule.low} to {rule.high}"


def labelled(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Label -> value of the named settings, as the text of a PNG file writes them."""
    pairs = [(declarations()[name][1], settings[name]) for name in names]
    return {declared.label: declared.names.get(value, value) for declared, value in pairs}


def changed(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Those of the named settings that differ from their defaults."""
    return [name for name in names if settings[name] != declarations()[name][1].default]
