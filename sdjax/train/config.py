"""A run's settings: frozen dataclasses, and the rules that no single field can state.

`train.config_file` fills them from a TOML file and flags. Paths are relative to the current directory. TOML knows no
null, so a text that may be absent is empty, and a number that may be absent is left out.
"""

import dataclasses
import enum
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar, get_type_hints

from sdjax.draw.settings import Guidance, SamplerName, Steps
from sdjax.errors import ConfigError
from sdjax.settings import (
    Count,
    Dtype,
    FileName,
    Fraction,
    LoraTargets,
    NotNegative,
    Positive,
    Range,
    Seed,
    Text,
    Whole,
    wrong,
)

T = TypeVar("T")


class OnResume(enum.Enum):
    """Whether a run may be resumed with another value of a setting. A setting without a mark must stay as it was."""

    LOGGED = "the change is logged"
    FREE = "the change passes silently"


Logged = Annotated[T, OnResume.LOGGED]
Free = Annotated[T, OnResume.FREE]

Resolution = Annotated[int, Range(8, 4096, multiple=8)]

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Kind = Literal["lora", "textual_inversion", "unet", "text_encoder", "text_encoder_2", "vae"]
"""What `train` may name: bypasses, embeddings of new words, or all weights of a model."""


@dataclass(frozen=True)
class Data:
    """A folder of captioned images."""

    path: Free[Text]
    """Folder of images, with metadata.jsonl, or NAME.txt beside NAME.png, or one caption for all."""
    resolution: Resolution = 512
    """Side of the square training images, in pixels: a multiple of 8."""
    batch_size: Logged[Count] = 1
    """Images a step takes at once, over all devices."""
    accumulation: Logged[Count] = 1
    """Batches whose gradients are averaged into one optimizer step."""
    flip: Logged[bool] = False
    """Mirror each image left to right half of the time."""
    caption: Free[str] = ""
    """One caption for every image that has none of its own."""
    missing_caption: Free[Literal["fail", "empty", "skip", "folder"]] = "fail"
    """An image without a caption: fail, take an empty one, skip it, or take its folder's name (kohya's N_NAME)."""
    on_bad_image: Free[Literal["skip", "fail"]] = "fail"
    """An unreadable image: fail, or skip it with a warning."""
    background: Free[str] = "white"
    """Colour put behind transparent pixels: a CSS name or #rrggbb."""
    caption_dropout: Logged[Fraction] = 0.0
    """Share of examples trained with the empty caption, 0 to 1."""
    repeats: Logged[dict[str, Whole]] = field(default_factory=dict)
    """Times an image is shown in an epoch: pattern over its name, such as cat/* -> times. First match counts."""
    random_crops: Logged[Whole] = 0
    """Random crops of each image, cached and taken in turn; 0: the middle."""
    buckets: Logged[bool] = False
    """Keep each image's shape: batches of several sizes of about resolution x resolution pixels, planned up front."""
    bucket_step: Logged[Annotated[int, Range(8, 512, multiple=8)]] = 64
    """Sides of a bucket are multiples of this, in pixels."""
    bucket_max_aspect: Logged[Annotated[float, Range(1, 8)]] = 2.0
    """Long side of a bucket over its short one, at most."""
    shuffle_tags: Logged[bool] = False
    """Shuffle a caption's comma-separated tags."""
    keep_tags: Logged[Whole] = 0
    """First tags that shuffling and dropping leave alone."""
    tag_dropout: Logged[Fraction] = 0.0
    """Share of the tags left out, 0 to 1."""
    caption_variants: Logged[Count] = 8
    """Versions of each caption prepared when tags are shuffled or dropped."""
    mask_path: Free[str] = ""
    """Folder of masks for masked_loss: same names as the images, white is learned; empty: the images' alpha channel."""
    inpaint_masks: Whole = 0
    """Train inpainting with so many random masks of each image (of each crop), cached and drawn at random; 0: none."""
    inpaint_full: Fraction = 0.25
    """Share of the random masks that cover the whole image; the others are rectangles and brush strokes."""
    inpaint_mask_path: str = ""
    """Folder of own masks in place of random ones: same names as the images, white is painted."""
    validation_path: Logged[str] = ""
    """Folder of images held out of training, instead of a share of path."""
    validation_count: Logged[Whole] = 0
    """Images of path held out of training."""
    validation_fraction: Logged[Annotated[float, Range(0, 0.9)]] = 0.0
    """Share of the images of path held out of training, 0 to 0.9."""
    cache: Free[str] = ""
    """Folder for cached latents and prompt embeddings; empty: OUTPUT/cache."""


DataOverride = dataclasses.make_dataclass(
    "DataOverride",
    [(name, hint | None, None) for name, hint in get_type_hints(Data, include_extras=True).items()],
    frozen=True,
)
"""What one stage changes in [data]: the same fields; one left out (None) keeps the run's value."""


VAE_LOSS = {"l1": 1.0, "l2": 1.0, "pooled": 0.5, "chroma": 1.0, "gradient": 0.5, "kl": 2e-4}


@dataclass(frozen=True)
class Stage:
    """One leg of a run: what is trained, for how long and how."""

    name: FileName
    """Name of the stage, used for its files."""
    train: tuple[Kind, ...]
    """What is trained: lora, textual_inversion, or all weights of unet, text_encoder, text_encoder_2, or vae alone."""
    steps: Logged[Count]
    """Optimizer steps."""
    learning_rate: Logged[Positive | dict[str, NotNegative]]
    """Peak learning rate, or one for each part: unet 1e-4 text_encoder 5e-5 textual_inversion 5e-3."""
    placeholder_tokens: tuple[Text, ...] = ()
    """Textual Inversion: the new words. One that an earlier stage made is trained further."""
    vectors_per_token: tuple[Count, ...] = (1,)
    """Vectors of each new word: one number for all, or one each."""
    init_tokens: tuple[Text, ...] = ()
    """What each new word starts as: a word or phrase, <rand-SIGMA>, <zero>, or an embedding file."""
    template: Logged[Literal["caption", "object", "style"] | tuple[Text, ...]] = "caption"
    """Captions: the images' own, the paper's lists for an object or a style, or own ones with {} for the new words."""
    clip_ti_decay: Logged[bool] = False
    """Draw the norm of the new vectors towards clip_ti_norm after each step."""
    clip_ti_norm: Logged[Positive | None] = None
    """Norm that clip_ti_decay draws to. Left out: the median of the text model's own table (0.4 for SD1)."""
    lora_parts: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = ("unet",)
    """Models that get an adapter: unet, text_encoder, text_encoder_2."""
    lora_continue: bool = False
    """Train the adapter of the earlier stages further instead of adding one on top."""
    lora_rank: Count = 4
    """Rank of the adapter."""
    lora_ranks: dict[str, Whole] = field(default_factory=dict)
    """Other ranks for some layers: regular expression over the layer's path -> rank (0: no adapter)."""
    lora_alpha: Positive | None = None
    """Strength: the adapter is scaled by alpha / rank. Left out: alpha = rank."""
    lora_targets: LoraTargets | tuple[str, ...] = "attention"
    """Layers that get an adapter: a set by name, or a list of regular expressions over their paths."""
    lora_dropout: Logged[Annotated[float, Range(0, 0.99)]] = 0.0
    """Share of the adapter's inputs dropped in training, 0 to 0.99."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead of alpha / rank."""
    use_dora: bool = False
    """Learn the magnitude of each output on its own (DoRA)."""
    lora_plus_ratio: Logged[Positive] = 1.0
    """LoRA+: learning rate of the up matrices as a multiple of the part's."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay of a moving average of what is trained, which is what is drawn and exported (0.999 is usual); 0: none."""
    optimizer: Literal["adamw", "adafactor", "lion", "prodigy", "schedule_free"] = "adamw"
    """Optimizer."""
    schedule: Logged[Schedule] = "constant"
    """Course of the learning rate after the warm-up; all but the constant ones end at 0."""
    schedule_cycles: Logged[Count] = 1
    """Cycles of cosine_with_restarts."""
    schedule_power: Logged[Positive] = 1.0
    """Exponent of polynomial."""
    schedule_hold: Logged[Fraction] = 0.0
    """Share of the steps after the warm-up in which the rate stays at its peak before it falls."""
    warmup_steps: Logged[Whole] = 0
    """Optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Logged[NotNegative] = 1e-2
    """Decoupled weight decay."""
    betas: Logged[tuple[Annotated[float, Range(0, 0.999999)], Annotated[float, Range(0, 0.999999)]]] = (0.9, 0.999)
    """Decay rates of the first and second moment (adamw, lion, prodigy, schedule_free)."""
    eps: Logged[Positive] = 1e-8
    """Epsilon of adamw, prodigy and schedule_free."""
    clip_norm: Logged[NotNegative] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    loss: Logged[Literal["l2", "l1", "huber"]] = "l2"
    """Distance to the target: squared, absolute, or pseudo-Huber."""
    huber_c: Logged[Positive] = 0.1
    """Where pseudo-Huber turns from squared to absolute."""
    huber_schedule: Logged[Literal["constant", "exponential", "snr"]] = "snr"
    """How huber_c falls with the noise."""
    min_snr_gamma: Logged[NotNegative] = 0.0
    """Min-SNR loss weighting with this gamma (5 is usual); 0: off."""
    debiased: Logged[bool] = False
    """Debiased loss weighting; not together with min_snr_gamma."""
    noise_offset: Logged[NotNegative] = 0.0
    """Strength of a constant shift of each channel's noise (0.05 is usual); 0: off."""
    multires_noise_iterations: Logged[Whole] = 0
    """Octaves of multi-resolution noise (6 to 10 are usual); 0: off."""
    multires_noise_discount: Logged[Fraction] = 0.3
    """Weight of each further octave as a multiple of the one before."""
    input_perturbation: Logged[NotNegative] = 0.0
    """Strength of noise that is added to the input but not to the target (0.1 is usual); 0: off."""
    timestep_range: Logged[tuple[Fraction, Fraction]] = (0.0, 1.0)
    """Time steps trained, as fractions of the schedule: from 0 (clean) to 1 (noise)."""
    timestep_bias: Logged[Literal["none", "earlier", "later"]] = "none"
    """Which time steps of the range are drawn more often: earlier ones are nearer to the clean image."""
    timestep_bias_multiplier: Logged[Positive] = 1.0
    """How much more often."""
    timestep_bias_portion: Logged[Fraction] = 0.25
    """Share of the range that is drawn more often."""
    masked_loss: Logged[bool] = False
    """Learn only where the mask is white (data.mask_path, or the images' alpha channel)."""
    unmasked_weight: Logged[Fraction] = 0.0
    """Weight of the loss where the mask is black, and, training a standard model for inpainting, where it is kept."""
    prior_prompt: Logged[str] = ""
    """Prior preservation: what an ordinary picture of the class is called, such as a dog; empty: off."""
    prior_path: Logged[str] = ""
    """Folder of class pictures; missing ones are drawn by the model. Empty: OUTPUT/prior/STAGE."""
    prior_count: Logged[Count] = 100
    """Class pictures."""
    prior_weight: Logged[NotNegative] = 1.0
    """Weight of their loss."""
    vae_loss: Logged[dict[str, NotNegative]] = field(default_factory=lambda: dict(VAE_LOSS))
    """Weights of the terms of the autoencoder's loss: l1, l2, pooled, chroma, gradient, kl."""
    vae_augment: Logged[bool] = False
    """Autoencoder: shift its pictures and swap their colour channels at random, besides data.flip."""
    vae_normalise: Logged[bool] = False
    """Autoencoder: at the end, shift and scale each latent channel to mean 0 and deviation 1."""
    data: DataOverride = field(default_factory=DataOverride)  # type: ignore[valid-type]

    @property
    def parts(self) -> dict[str, str]:
        """What is trained, each with a learning rate of its own: part -> "lora", "rows" (of new words) or "weights"."""
        parts = dict.fromkeys(self.lora_parts, "lora") if "lora" in self.train else {}
        parts |= {"textual_inversion": "rows"} if "textual_inversion" in self.train else {}
        return parts | {kind: "weights" for kind in self.train if kind not in ("lora", "textual_inversion")}


@dataclass(frozen=True)
class Validation:
    """Pictures and held-out loss during training."""

    prompts: tuple[str, ...] = ()
    """Prompts drawn at each validation."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    every: Whole = 0
    """Optimizer steps between validations; 0: only at the start and the end of a stage."""
    steps: Steps = 20
    """Sampler steps of a picture."""
    guidance: Guidance = 7.5
    """Guidance scale; 1: none."""
    sampler: SamplerName = "dpmpp_2m"
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

    data: Annotated[int, Range(-1)] = -1
    """Copies of the model, each with its part of the batch; -1: all devices."""
    fsdp: Annotated[int, Range(-1)] = 1
    """Devices over which the weights and what is trained are split."""


@dataclass(frozen=True)
class Parallel:
    """Several devices."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit over a mesh, or pmap (the data axis only)."""
    mesh: Mesh = Mesh()
    cpu_devices: Annotated[int, Range(1)] = 1
    """As how many devices the command sees the CPU; for small models one a core: a third faster than one in all."""


@dataclass(frozen=True)
class Copy:
    """One of several trainings that run at once: what it has of its own; the rest is the run's."""

    name: FileName
    """Names its folder within the run's."""
    seed: Seed | None = None
    """Left out: the run's."""
    path: str = ""
    """Folder of images of every stage; empty: the run's."""
    placeholder_tokens: tuple[Text, ...] = ()
    """In place of those of the stage that trains words, in validation.prompts too."""
    init_tokens: tuple[str, ...] = ()
    """In place of those of the stage that trains words."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a training run depends on."""

    model: Free[Text]
    """Base model: tiny, a diffusers folder, a .safetensors or .ckpt file, or a hub id."""
    output: Free[Text]
    """Folder of the run: config.toml, metrics.jsonl, samples, checkpoints, export."""
    data: Data
    stages: tuple[Stage, ...]
    seed: Seed = 0
    """Seed of all randomness."""
    dtype: Logged[Dtype] = "float32"
    """Number type of the computation; what is trained stays float32."""
    export_dtype: Free[Dtype] = "float32"
    """Number type of the models that are exported as a whole."""
    clip_skip: Count | None = None
    """Text model layer used, counted from the end: 1 last, 2 penultimate. Left out: the model's own."""
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    """What the U-Net answers, to train it towards another; empty: as the model does."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise; wants prediction_type v_prediction."""
    remat: Logged[bool] = False
    """Recompute activations in the backward pass: less memory, slower."""
    variant: Free[str] = ""
    """Variant of the weight files, such as fp16."""
    on_nan: Logged[Literal["stop", "skip"]] = "stop"
    """A loss that is not a number: stop the run, or skip that step."""
    validation: Free[Validation] = Validation()
    checkpoint: Free[Checkpoint] = Checkpoint()
    parallel: Free[Parallel] = Parallel()
    copies: tuple[Copy, ...] = ()
    """Train the stages several times at once, in one program on one base model; each copy has its own folder."""

    def data_of(self, stage: Stage) -> Data:
        """The data settings of one stage: [data] with the stage's own changes."""
        changes = {k: v for k, v in dataclasses.asdict(stage.data).items() if v is not None}
        return dataclasses.replace(self.data, **changes)

    def members(self) -> tuple["RunConfig", ...]:
        """A run for each copy, as it would be by itself; just this one if there are none."""
        return tuple(self._member(copy) for copy in self.copies) or (self,)

    def _member(self, copy: Copy) -> "RunConfig":
        stages, prompts = list(self.stages), self.validation.prompts
        for i, stage in enumerate(stages):
            if copy.path:
                stages[i] = stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=None))
            if "textual_inversion" not in stage.train:
                continue
            own = {
                "placeholder_tokens": copy.placeholder_tokens or stage.placeholder_tokens,
                "init_tokens": copy.init_tokens or stage.init_tokens,
            }
            stages[i] = dataclasses.replace(stage, **own)
            for word, new in zip(stage.placeholder_tokens, own["placeholder_tokens"], strict=False):
                prompts = tuple(prompt.replace(word, new) for prompt in prompts)
        data = {"path": copy.path or self.data.path, "cache": self.data.cache or f"{self.output}/cache"}
        return dataclasses.replace(
            self,
            output=f"{self.output}/{copy.name}",
            data=dataclasses.replace(self.data, **data),
            stages=tuple(stages),
            seed=self.seed if copy.seed is None else copy.seed,
            validation=dataclasses.replace(self.validation, prompts=prompts),
            copies=(),
        )


def check(config: RunConfig) -> None:
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
    if config.copies:
        _check_copies(config)


def _check_copies(config: RunConfig) -> None:
    names = [copy.name for copy in config.copies]
    if len(set(names)) < len(names) or "cache" in names:
        raise wrong("copies: name", names, "names that differ, and none of them 'cache'")
    if config.parallel.mode == "pmap":
        raise ConfigError("copies are trained in one program over a mesh: parallel.mode = 'jit'")
    for i, stage in enumerate(config.stages):
        if "weights" in stage.parts.values():
            raise ConfigError(f"stages.{i} trains whole models, of which copies share one: LoRA and words only")
        if config.data_of(stage).buckets:
            raise ConfigError(f"stages.{i}.data.buckets: copies train in step, so at one shape")
    for i, (copy, member) in enumerate(zip(config.copies, config.members(), strict=True)):
        if (copy.placeholder_tokens or copy.init_tokens) and not any(
            "textual_inversion" in stage.train for stage in config.stages
        ):
            raise ConfigError(f"copies.{i} names words, but no stage trains any")
        try:
            check(member)
        except ConfigError as e:
            raise ConfigError(f"copies.{i} ({copy.name}): {e}") from None


def _check_stage(stage: Stage, key: str) -> None:
    for name in ("train", "lora_parts", "lora_targets"):
        values = getattr(stage, name)
        if not values or (isinstance(values, tuple) and len(set(values)) < len(values)):
            raise wrong(f"{key}.{name}", list(values), "at least one name, and none twice")
    patterns = stage.lora_targets if isinstance(stage.lora_targets, tuple) else ()
    for pattern in (*patterns, *stage.lora_ranks):
        try:
            re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"{key}: {pattern!r} is not a regular expression: {e}") from None
    if isinstance(stage.learning_rate, dict) and set(stage.learning_rate) != set(stage.parts):
        raise ConfigError(
            f"{key}.learning_rate has {', '.join(stage.learning_rate) or 'no part'}, "
            f"but the stage trains {', '.join(stage.parts)}: one rate for each"
        )
    _check_parts(stage, key)
    if stage.min_snr_gamma and stage.debiased:
        raise ConfigError(f"{key}: min_snr_gamma and debiased are two weightings of the same loss: choose one")
    if stage.optimizer == "schedule_free" and stage.ema_decay:
        raise ConfigError(f"{key}: schedule_free averages by itself: leave ema_decay out")
    if stage.schedule == "constant_with_warmup" and not stage.warmup_steps:
        raise ConfigError(f"{key}.schedule = 'constant_with_warmup' needs {key}.warmup_steps above 0")
    if stage.warmup_steps > stage.steps:
        raise ConfigError(f"{key}.warmup_steps = {stage.warmup_steps} is more than {key}.steps = {stage.steps}")
    if stage.timestep_range[0] >= stage.timestep_range[1]:
        raise wrong(f"{key}.timestep_range", list(stage.timestep_range), "the first below the second")


def _check_parts(stage: Stage, key: str) -> None:
    """What is trained together, and the words of Textual Inversion."""
    both = sorted(set(stage.lora_parts) & set(stage.train)) if "lora" in stage.train else []
    if both:
        raise ConfigError(f"{key}: {both[0]} is trained as a whole and by LoRA: leave it out of train or of lora_parts")
    if "vae" in stage.train and len(stage.train) > 1:
        raise ConfigError(f"{key}.train: vae is trained alone, in a stage of its own")
    if unknown := set(stage.vae_loss) - set(VAE_LOSS):
        raise ConfigError(f"{key}.vae_loss has {unknown.pop()!r}: choices are {', '.join(VAE_LOSS)}")
    words = stage.placeholder_tokens
    if ("textual_inversion" in stage.train) != bool(words):
        raise ConfigError(f"{key}: train = ['textual_inversion'] and placeholder_tokens need each other")
    for word in words:
        if word.split() != [word] or words.count(word) > 1:
            raise wrong(f"{key}.placeholder_tokens", list(words), "different words without spaces")
    if len(stage.vectors_per_token) not in (1, len(words)):
        raise wrong(f"{key}.vectors_per_token", list(stage.vectors_per_token), f"one number, or {len(words)}")
    if stage.init_tokens and len(stage.init_tokens) != len(words):
        raise wrong(f"{key}.init_tokens", list(stage.init_tokens), f"one for each of {len(words)} placeholder_tokens")
    if stage.template != "caption" and not words:
        raise ConfigError(f"{key}.template needs placeholder_tokens")
    if isinstance(stage.template, tuple) and not all("{}" in text for text in stage.template):
        raise wrong(f"{key}.template", list(stage.template), "texts with {} where the new words go")


def _check_data(data: Data, key: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(data.background)
    except ValueError:
        raise wrong(f"{key}.background", data.background, "a CSS colour name or #rrggbb") from None
    given = [n for n in ("validation_path", "validation_count", "validation_fraction") if getattr(data, n)]
    if len(given) > 1:
        raise ConfigError(f"{key}: {' and '.join(given)} both say what is held out: choose one")
    if data.inpaint_masks and data.inpaint_mask_path:
        raise ConfigError(f"{key}: inpaint_masks are random and inpaint_mask_path holds own masks: choose one")
