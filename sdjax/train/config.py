"""The settings of a training run, as frozen dataclasses, and the rules that involve several settings.

`train.config_file` reads them from a TOML file and flags. The docstring of a field is the help of its flag. Paths are
relative to the current directory. TOML has no null, so an absent text is empty, and an absent number is left out.
"""

import dataclasses
import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from sdjax.data.order import MOST_REPEATS
from sdjax.draw.settings import SamplerName, Steps
from sdjax.errors import ConfigError
from sdjax.settings import (
    BaseDtype,
    Count,
    Dtype,
    FileName,
    Fraction,
    Guidance,
    LoraKind,
    LoraTargets,
    NotNegative,
    Positive,
    Range,
    RematPolicy,
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
"""What a stage can train: adapters (lora), vectors of new words (textual_inversion), or all weights of a model."""


@dataclass(frozen=True)
class Data:
    """Images with captions."""

    path: Free[Text]
    """Folder of images, with captions in metadata.jsonl or NAME.txt beside NAME.png; or parquet files or tars."""
    image_column: Free[str] = ""
    """Column of parquet files that holds the images. Empty: image, or the only column of bytes."""
    caption_column: Free[str] = ""
    """Column of parquet files, or key of the .json files in tars, that holds the captions. Empty: text or caption."""
    resolution: Resolution = 512
    """Side of the square training images in pixels, a multiple of 8."""
    batch_size: Logged[Count] = 1
    """Images in a batch, over all devices."""
    accumulation: Logged[Count] = 1
    """Batches whose gradients are averaged into one optimizer step."""
    flip: Logged[bool] = False
    """Show each image mirrored left to right half of the time, at random."""
    caption: Free[str] = ""
    """Caption of every image that has no other."""
    missing_caption: Free[Literal["fail", "empty", "skip", "folder"]] = "fail"
    """For images without a caption: fail, use the empty caption, skip them, or use the name of the folder (N_NAME)."""
    on_bad_image: Logged[Literal["skip", "fail"]] = "fail"
    """For an unreadable image: fail, or skip it with a warning."""
    background: Logged[str] = "white"
    """Colour behind transparent pixels, a CSS name or #rrggbb."""
    caption_dropout: Logged[Fraction] = 0.0
    """Share of the examples that are trained with the empty caption, 0 to 1."""
    repeats: Logged[dict[str, Annotated[int, Range(0, MOST_REPEATS)]]] = field(default_factory=dict)
    """How often an epoch shows an image: pattern of its name, such as cat/* -> number. The first match counts."""
    crop: Logged[Literal["middle", "subject"]] = "middle"
    """What is cut from each image: the middle, or on a plain background a square around the subject, which fills it."""
    random_crops: Logged[Whole] = 0
    """Random crops of each image, cached and used in turn. 0: one crop, see crop."""
    buckets: Logged[bool] = False
    """Keep the shape of each image. Batches then have several sizes of about resolution x resolution pixels."""
    bucket_step: Logged[Annotated[int, Range(8, 512, multiple=8)]] = 64
    """The sides of a bucket are multiples of this number of pixels, which is a multiple of 8."""
    bucket_max_aspect: Logged[Annotated[float, Range(1, 8)]] = 2.0
    """Largest ratio of the long side of a bucket to the short side, 1 to 8."""
    shuffle_tags: Logged[bool] = False
    """Shuffle the comma-separated tags of captions."""
    keep_tags: Logged[Whole] = 0
    """Number of first tags that are neither shuffled nor dropped."""
    tag_dropout: Logged[Fraction] = 0.0
    """Share of the tags that are dropped, 0 to 1."""
    caption_variants: Logged[Count] = 8
    """Versions of each caption that are prepared if tags are shuffled or dropped."""
    mask_path: Free[str] = ""
    """Folder of masks for masked_loss, named like the images; white is learned. Empty: use the alpha channel."""
    inpaint_masks: Whole = 0
    """Train inpainting with this many random masks of each image (of each crop), cached. 0: no inpainting."""
    inpaint_full: Fraction = 0.25
    """Share of the random masks that cover the whole image, 0 to 1. The others are rectangles and brush strokes."""
    inpaint_mask_path: str = ""
    """Train inpainting with the masks in this folder, named like the images; white is painted."""
    validation_path: Logged[str] = ""
    """Held-out images, used instead of images of path: a folder, parquet files or tars, as in path."""
    validation_count: Logged[Whole] = 0
    """Number of images of path that are held out of training."""
    validation_fraction: Logged[Annotated[float, Range(0, 0.9)]] = 0.0
    """Share of the images of path that is held out of training, 0 to 0.9."""
    cache: Free[str] = ""
    """Folder for cached latents and prompt embeddings. Empty: OUTPUT/cache."""


DataOverride = dataclasses.make_dataclass(
    "DataOverride",
    [(name, hint | None, None) for name, hint in get_type_hints(Data, include_extras=True).items()],
    frozen=True,
)
"""The data settings that a stage changes: the fields of `Data`, or None where the stage keeps the value of [data]."""


VAE_LOSS = {"l1": 1.0, "l2": 1.0, "pooled": 0.5, "chroma": 1.0, "gradient": 0.5, "kl": 2e-4}


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what is trained, and how."""

    name: FileName
    """Name of the stage and of its files."""
    train: tuple[Kind, ...]
    """What is trained: lora, textual_inversion, all weights of unet, text_encoder or text_encoder_2; or vae, alone."""
    steps: Logged[Count]
    """Optimizer steps."""
    learning_rate: Logged[Positive | dict[str, NotNegative]]
    """Peak learning rate, or one for each part: unet 1e-4 text_encoder 5e-5 textual_inversion 5e-3."""
    placeholder_tokens: tuple[Text, ...] = ()
    """Textual Inversion: the new words. Words of earlier stages are trained further."""
    vectors_per_token: tuple[Count, ...] = (1,)
    """Textual Inversion: number of vectors of each new word, or one number for all of them."""
    init_tokens: tuple[Text, ...] = ()
    """Textual Inversion: what each new word starts as: a word or phrase, <rand-SIGMA>, <zero>, or an embedding file."""
    template: Logged[Literal["caption", "object", "style"] | tuple[Text, ...]] = "caption"
    """Textual Inversion: the images' captions, a built-in list for an object or a style, or texts with {} for words."""
    clip_ti_decay: Logged[bool] = False
    """Textual Inversion: pull the norm of the new vectors towards clip_ti_norm after each step."""
    clip_ti_norm: Logged[Positive | None] = None
    """Textual Inversion: norm for clip_ti_decay. Left out: the median in the model's embedding table (0.4 for SD1)."""
    lora_parts: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = ("unet",)
    """LoRA: models that get an adapter: unet, text_encoder, text_encoder_2."""
    lora_continue: bool = False
    """LoRA: train the adapter of the earlier stages further, instead of adding a new one to it."""
    lora_init: Free[str] = ""
    """LoRA: file whose adapter is trained further. It sets kind, rank, alpha, layers; other values are refused."""
    lora_kind: LoraKind = "lora"
    """LoRA: formula of the adapter: LoRA, or LyCORIS's loha (product by elements) or lokr (Kronecker product)."""
    lora_factor: Count | None = None
    """LoRA: size of lokr's small matrix, which is whole. Left out: both matrices are of about the same size."""
    lora_rank: Count = 4
    """LoRA: rank of the adapter."""
    lora_ranks: dict[str, Whole] = field(default_factory=dict)
    """LoRA: other ranks for some layers: regular expression for the path of a layer -> rank (0: no adapter)."""
    lora_alpha: Positive | None = None
    """LoRA: strength of the adapter, which is scaled by alpha / rank. Left out: the rank."""
    lora_targets: LoraTargets | tuple[str, ...] = "attention"
    """LoRA: layers that get an adapter: the name of a set, or regular expressions for the paths of layers."""
    lora_dropout: Logged[Annotated[float, Range(0, 0.99)]] = 0.0
    """LoRA: share of the inputs of the adapter that is dropped in training, 0 to 0.99."""
    use_rslora: bool = False
    """LoRA: scale by alpha / sqrt(rank) instead of alpha / rank (rsLoRA)."""
    use_dora: bool = False
    """LoRA: also train the magnitude of the weights of each output (DoRA)."""
    lora_plus_ratio: Logged[Positive] = 1.0
    """LoRA: multiply the learning rate of the up matrices by this number (LoRA+)."""
    ema_decay: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay of a moving average of what is trained; pictures and exports use the average (0.999 is usual). 0: none."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule_free"] = "adamw"
    """Optimizer."""
    schedule: Logged[Schedule] = "constant"
    """Course of the learning rate after the warm-up. All but the constant ones end at 0."""
    schedule_cycles: Logged[Count] = 1
    """Number of cycles of cosine_with_restarts."""
    schedule_power: Logged[Positive] = 1.0
    """Exponent of the polynomial schedule."""
    schedule_hold: Logged[Fraction] = 0.0
    """Share of the steps after the warm-up in which the learning rate stays at its peak before it falls, 0 to 1."""
    warmup_steps: Logged[Whole] = 0
    """Optimizer steps in which the learning rate rises from 0 to its peak."""
    weight_decay: Logged[NotNegative] = 1e-2
    """Decoupled weight decay."""
    betas: Logged[tuple[Annotated[float, Range(0, 0.999999)], Annotated[float, Range(0, 0.999999)]]] = (0.9, 0.999)
    """Decay rates of the first and second moment in adamw, lion, prodigy and schedule_free, 0 to below 1."""
    eps: Logged[Positive] = 1e-8
    """Epsilon of adamw, prodigy and schedule_free."""
    clip_norm: Logged[NotNegative] = 1.0
    """Largest norm of the gradient of all parts together. 0: no clipping."""
    loss: Logged[Literal["l2", "l1", "huber"]] = "l2"
    """Distance to the target: squared (l2), absolute (l1) or pseudo-Huber."""
    huber_c: Logged[Positive] = 0.1
    """Error at which the pseudo-Huber loss changes from squared to absolute."""
    huber_schedule: Logged[Literal["constant", "exponential", "snr"]] = "snr"
    """How huber_c falls as the noise grows."""
    consistency_steps: Logged[Annotated[int, Range(0, 1000)]] = 0
    """Latent consistency distillation (LCM-LoRA): time steps of the teacher's path (50 is usual). 0: off."""
    consistency_guidance: Logged[tuple[Guidance, Guidance]] = (6.0, 16.0)
    """Latent consistency distillation: lowest and highest guidance scale of the teacher, drawn for each example."""
    min_snr_gamma: Logged[NotNegative] = 0.0
    """Gamma of Min-SNR loss weighting (5 is usual). 0: off."""
    debiased: Logged[bool] = False
    """Debiased loss weighting; not together with min_snr_gamma."""
    noise_offset: Logged[NotNegative] = 0.0
    """Strength of a random offset, one for all noise of a channel (0.05 is usual). 0: off."""
    multires_noise_iterations: Logged[Whole] = 0
    """Octaves of multi-resolution noise (6 to 10 are usual). 0: off."""
    multires_noise_discount: Logged[Fraction] = 0.3
    """Multi-resolution noise: weight of each octave as a multiple of the one before, 0 to 1."""
    input_perturbation: Logged[NotNegative] = 0.0
    """Strength of noise that is added to the input but not to the target (0.1 is usual). 0: off."""
    timestep_range: Logged[tuple[Fraction, Fraction]] = (0.0, 1.0)
    """Range of the time steps that are trained, as fractions of the schedule: 0 is clean, 1 is noise."""
    timestep_bias: Logged[Literal["none", "earlier", "later"]] = "none"
    """Train the earlier (less noisy) or the later time steps of the range more often."""
    timestep_bias_multiplier: Logged[Positive] = 1.0
    """How many times as often timestep_bias trains its time steps."""
    timestep_bias_portion: Logged[Fraction] = 0.25
    """Share of the range that timestep_bias trains more often, 0 to 1."""
    masked_loss: Logged[bool] = False
    """Learn only where the mask is white: that of data.mask_path, or else the alpha channel of the image."""
    unmasked_weight: Logged[Fraction] = 0.0
    """Weight of the loss, 0 to 1, outside the mask of masked_loss, and of inpainting with a standard model."""
    prior_prompt: Logged[str] = ""
    """Prior preservation: caption of ordinary pictures of the class, such as a dog. Empty, without prior_path: off."""
    prior_path: Logged[str] = ""
    """Prior preservation: folder of class pictures. The model draws those missing. Empty: OUTPUT/prior/STAGE.
    Without prior_prompt: other pictures that every batch also shows, with their own captions; none is drawn."""
    prior_count: Logged[Count] = 100
    """Prior preservation: number of class pictures."""
    prior_weight: Logged[NotNegative] = 1.0
    """Prior preservation: weight of the loss of class pictures."""
    vae_loss: Logged[dict[str, NotNegative]] = field(default_factory=lambda: dict(VAE_LOSS))
    """Autoencoder: weights of the terms of its loss: l1, l2, pooled, chroma, gradient, kl."""
    vae_augment: Logged[bool] = False
    """Autoencoder: shift images and swap their colour channels at random."""
    vae_normalise: Logged[bool] = False
    """Autoencoder: at the end, shift and scale each latent channel to mean 0 and deviation 1."""
    data: DataOverride = field(default_factory=DataOverride)  # type: ignore[valid-type]
    """Changes to [data] in this stage."""

    @property
    def has_prior(self) -> bool:
        """Whether each batch also holds class pictures, as many as others."""
        return bool(self.prior_prompt or self.prior_path)

    @property
    def parts(self) -> dict[str, str]:
        """Part -> how it is trained: "lora", "rows" (of new words) or "weights". Each part has its learning rate."""
        parts = dict.fromkeys(self.lora_parts, "lora") if "lora" in self.train else {}
        parts |= {"textual_inversion": "rows"} if "textual_inversion" in self.train else {}
        return parts | {kind: "weights" for kind in self.train if kind not in ("lora", "textual_inversion")}


@dataclass(frozen=True)
class BaseLora:
    """A LoRA file beneath a run."""

    path: Free[Text]
    """LoRA file, with the keys of any program."""
    weight: float = 1.0
    """Strength of the LoRA: 0 none, 1 as it was trained."""


@dataclass(frozen=True)
class Base:
    """Files that lie beneath all stages. They are trained with and drawn with, but not changed and not exported."""

    loras: tuple[BaseLora, ...] = ()
    """LoRAs to merge into the base model."""
    embeddings: Free[tuple[Text, ...]] = ()
    """Embedding files, whose words captions and prompts may use."""


@dataclass(frozen=True)
class Validation:
    """Pictures and held-out loss during training."""

    prompts: tuple[str, ...] = ()
    """Prompts to draw at each validation."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    every: Whole = 0
    """Optimizer steps between validations. 0: only at the start and the end of a stage."""
    steps: Steps = 20
    """Sampler steps of a picture."""
    guidance: Guidance | None = None
    """Guidance scale. 1: none. Default: the model's own, or 7.5."""
    sampler: SamplerName = "dpmpp_2m"
    """Sampler."""
    seed: Seed = 0
    """Seed of the first picture, and of the noise of the held-out loss."""
    held_out_images: Whole = 0
    """Largest number of images for the held-out loss. 0: all held-out images."""
    held_out_timesteps: Count = 4
    """Number of time steps at which the held-out loss measures each image, evenly spread."""
    held_out_pictures: Whole = 0
    """Draw the captions of so many held-out images too, and measure how far the pictures are from the images."""
    weights: tuple[float, ...] = (0.6, 0.8)
    """Weights of the LoRA, beside 1, at which before and after shows it."""


@dataclass(frozen=True)
class Export:
    """Files that are written during training, to choose the best step by looking."""

    every: Whole = 0
    """Optimizer steps between files of the LoRA and the new words. Each time is a validation too. 0: none."""
    keep: Whole = 0
    """Number of newest steps whose files are kept, beside the best by held-out loss. 0: all."""


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints, from which a run can be resumed."""

    every: Whole = 100
    """Optimizer steps between checkpoints. 0: only at the end of a stage."""
    keep: Count = 3
    """Number of newest checkpoints that are kept."""
    background: bool = True
    """Write checkpoints while training goes on, from a copy of the state in the memory of the host. Several processes
    always stop for it."""
    allow_changed_data: bool = False
    """Resume even if the images or captions have changed."""


@dataclass(frozen=True)
class Mesh:
    """Number of devices along each axis. -1: all that the other axes leave."""

    data: Annotated[int, Range(-1)] = -1
    """Copies of the model, each with a part of the batch."""
    fsdp: Annotated[int, Range(-1)] = 1
    """Devices that the batch, the weights and the training state are split over."""
    tensor: Annotated[int, Range(-1)] = 1
    """Devices that the heads and channels of each layer are split over. They share the examples they compute."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The sizes in the order of the axes."""
        return self.data, self.fsdp, self.tensor


@dataclass(frozen=True)
class Parallel:
    """Several devices."""

    mode: Literal["jit", "pmap"] = "jit"
    """jit over a mesh, or pmap, which has the data axis only."""
    mesh: Mesh = Mesh()
    cpu_devices: Annotated[int, Range(1)] = 1
    """Number of devices that the CPU is divided into. One for each core trains a small model a third faster."""


@dataclass(frozen=True)
class Copy:
    """One of several trainings that run at once. It has the settings of the run except for these."""

    name: FileName
    """Name of the folder of the copy, within that of the run."""
    seed: Seed | None = None
    """Seed of the copy. Left out: that of the run."""
    path: str = ""
    """Folder of images, for every stage. Empty: those of the run."""
    placeholder_tokens: tuple[Text, ...] = ()
    """New words that replace those of each stage that trains words, and those in validation.prompts."""
    init_tokens: tuple[str, ...] = ()
    """What the new words start as."""
    stage: str = ""
    """Name of the stage that the settings below change. Empty: every stage that uses them."""
    learning_rate: Positive | dict[str, NotNegative] | None = None
    """Peak learning rate, or one for each part."""
    weight_decay: NotNegative | None = None
    """Decoupled weight decay."""
    lora_alpha: Positive | None = None
    """Strength of the adapter, which is scaled by alpha / rank."""
    clip_ti_norm: Positive | None = None
    """Norm for clip_ti_decay."""
    huber_c: Positive | None = None
    """Error at which the pseudo-Huber loss changes from squared to absolute."""
    min_snr_gamma: NotNegative | None = None
    """Gamma of Min-SNR loss weighting. 0: off."""
    noise_offset: NotNegative | None = None
    """Strength of the random offset of the noise."""
    input_perturbation: NotNegative | None = None
    """Strength of noise that is added to the input but not to the target. 0: off."""
    prior_weight: NotNegative | None = None
    """Weight of the loss of class pictures."""

    def changes(self, stage: Stage) -> dict[str, Any]:
        """Returns the settings of a stage that this copy has other values for."""
        if self.stage not in ("", stage.name):
            return {}
        values = {name: getattr(self, name) for name, is_used in NUMBERS.items() if is_used(stage)}
        return {name: value for name, value in values.items() if value is not None}


NUMBERS: dict[str, Callable[[Stage], bool]] = {
    "learning_rate": lambda stage: True,
    "weight_decay": lambda stage: True,
    "lora_alpha": lambda stage: "lora" in stage.train and not (stage.lora_continue or stage.lora_init),
    "clip_ti_norm": lambda stage: stage.clip_ti_decay,
    "huber_c": lambda stage: stage.loss == "huber",
    "min_snr_gamma": lambda stage: True,
    "noise_offset": lambda stage: True,
    "input_perturbation": lambda stage: True,
    "prior_weight": lambda stage: stage.has_prior,
}
"""The settings of a stage that copies may differ in, and whether a stage uses them."""


@dataclass(frozen=True)
class RunConfig:
    """All settings of a training run."""

    model: Free[Text]
    """Base model: tiny, a folder in diffusers' layout, a .safetensors or .ckpt file, or a hub id."""
    output: Free[Text]
    """Folder of the run, for config.toml, metrics.jsonl, samples, checkpoints and exports."""
    data: Data
    stages: tuple[Stage, ...]
    seed: Seed = 0
    """Seed of all randomness."""
    dtype: Logged[Dtype] = "float32"
    """Number type of the computation. What is trained stays float32. float16 is for GPUs without bfloat16."""
    base_dtype: Logged[BaseDtype] = ""
    """int8 keeps the U-Net's weights in eight bits while LoRA or words are trained. Empty: in dtype."""
    export_dtype: Free[Dtype] = "float32"
    """Number type of the weights of models that are exported as a whole."""
    license: Free[str] = ""
    """Licence of the exports, for cards and metadata: an id of the hub, such as openrail++. Empty: to be filled in."""
    push_to_hub: Free[str] = ""
    """Repository, OWNER/NAME, that gets the last export when the run is done. Needs license. Copies add -COPY."""
    clip_skip: Count | None = None
    """Text model layer that is used, counted from the end: 1 last, 2 penultimate. Left out: the model's default."""
    prediction_type: Literal["", "epsilon", "v_prediction"] = ""
    """What the U-Net learns to predict. Empty: what the base model predicts."""
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise. Needs prediction_type v_prediction."""
    remat: Logged[bool] = False
    """Recompute activations in the backward pass. Needs less memory, but is slower."""
    remat_policy: Logged[RematPolicy] = "blocks"
    """What remat computes again: attention only, each block, or in addition each level of the U-Net as a whole."""
    vae: str = ""
    """Another autoencoder in place of the base model's: a folder, a file or a hub id. Empty: the base model's."""
    variant: Free[str] = ""
    """Variant of the weight files, such as fp16."""
    on_nan: Logged[Literal["stop", "skip"]] = "stop"
    """When the loss or gradient of a step is not finite: stop the run, or skip the step."""
    trackers: Free[tuple[Literal["tensorboard", "wandb"], ...]] = ()
    """Where the numbers of metrics.jsonl and the pictures go as well: tensorboard, wandb (Weights & Biases)."""
    base: Base = Base()
    validation: Free[Validation] = Validation()
    export: Free[Export] = Export()
    checkpoint: Free[Checkpoint] = Checkpoint()
    parallel: Free[Parallel] = Parallel()
    copies: tuple[Copy, ...] = ()
    """Train the stages several times at once, in one program and on one base model. Each copy has its own folder."""

    def data_of(self, stage: Stage) -> Data:
        """Returns the data settings of a stage: [data] with the changes that the stage makes."""
        changes = {k: v for k, v in dataclasses.asdict(stage.data).items() if v is not None}
        return dataclasses.replace(self.data, **changes)

    def file_steps(self, number: int) -> set[int]:
        """Returns the steps of a stage after which it writes files: none if it trains a whole model, or follows one."""
        steps, every = self.stages[number].steps, self.export.every
        whole = any("weights" in stage.parts.values() for stage in self.stages[: number + 1])
        return {*range(every, steps, every), steps} if every and not whole else set()

    def validation_steps(self, number: int) -> set[int]:
        """Returns the steps of a stage after which it is validated."""
        steps, every = self.stages[number].steps, self.validation.every
        return {0, steps, *(range(every, steps, every) if every else ())} | self.file_steps(number)

    def members(self) -> tuple["RunConfig", ...]:
        """Returns a run for each copy, as if it were trained alone, or just this run if there are no copies."""
        return tuple(self._member(copy) for copy in self.copies) or (self,)

    def _member(self, copy: Copy) -> "RunConfig":
        stages, prompts = list(self.stages), self.validation.prompts
        for i, stage in enumerate(stages):
            stages[i] = stage = dataclasses.replace(stage, **copy.changes(stage))
            if copy.path:
                stages[i] = stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, path=None))
            if "textual_inversion" not in stage.train:
                continue
            words = copy.placeholder_tokens or stage.placeholder_tokens
            inits = copy.init_tokens or stage.init_tokens
            stages[i] = dataclasses.replace(stage, placeholder_tokens=words, init_tokens=inits)
            for word, new in zip(stage.placeholder_tokens, words, strict=False):
                prompts = tuple(prompt.replace(word, new) for prompt in prompts)
        data = {"path": copy.path or self.data.path, "cache": self.data.cache or f"{self.output}/cache"}
        return dataclasses.replace(
            self,
            output=f"{self.output}/{copy.name}",
            push_to_hub=f"{self.push_to_hub}-{copy.name}" if self.push_to_hub else "",
            data=dataclasses.replace(self.data, **data),
            stages=tuple(stages),
            seed=self.seed if copy.seed is None else copy.seed,
            validation=dataclasses.replace(self.validation, prompts=prompts),
            copies=(),
        )


def check(config: RunConfig) -> None:
    """Checks the rules that involve several settings, and raises ConfigError if one is broken."""
    if not config.stages:
        raise ConfigError("stages is empty: expected at least one [[stages]] table")
    names = [stage.name for stage in config.stages]
    for i, stage in enumerate(config.stages):
        if stage.name in names[:i]:
            raise ConfigError(f"stages.{i}.name = {stage.name!r} is taken by an earlier stage: names must differ")
        _check_stage(stage, f"stages.{i}")
        _check_data(config.data_of(stage), f"stages.{i}.data", masked=stage.masked_loss)
    mesh = config.parallel.mesh
    if mesh.sizes.count(-1) > 1:
        raise ConfigError("parallel.mesh: only one of data, fsdp and tensor may be -1")
    if 0 in mesh.sizes:
        raise ConfigError("parallel.mesh: an axis is 0; expected -1 or at least 1")
    if config.parallel.mode == "pmap" and (mesh.fsdp, mesh.tensor) != (1, 1):
        raise ConfigError(
            "parallel.mode = 'pmap' has a data axis only, but parallel.mesh has "
            f"fsdp = {mesh.fsdp}, tensor = {mesh.tensor}"
        )
    if len(set(config.trackers)) < len(config.trackers):
        raise wrong("trackers", list(config.trackers), "no name twice")
    if config.export.every and not any(map(config.file_steps, range(len(config.stages)))):
        raise ConfigError(
            "export.every writes LoRAs and new words, and every stage trains a whole model or follows one"
        )
    if config.base_dtype and not any({"lora", "textual_inversion"} & set(stage.train) for stage in config.stages):
        raise ConfigError(
            f"base_dtype = {config.base_dtype!r} is for weights beneath LoRA or words, and no stage trains these"
        )
    if config.push_to_hub and not config.license:
        raise ConfigError("push_to_hub needs license: say under which licence the files may be used")
    if config.export.keep and not config.export.every:
        raise ConfigError(f"export.keep = {config.export.keep} needs export.every")
    if config.copies:
        _check_copies(config)


def _check_copies(config: RunConfig) -> None:
    names = [copy.name for copy in config.copies]
    if len(set(names)) < len(names) or {"cache", "copies.md", "copies.png"} & set(names):
        raise wrong("copies: name", names, "names that differ, and none of cache, copies.md and copies.png")
    if config.parallel.mode == "pmap":
        raise ConfigError("copies are trained in one program over a mesh: parallel.mode = 'jit'")
    for i, stage in enumerate(config.stages):
        if "weights" in stage.parts.values():
            raise ConfigError(f"stages.{i} trains all weights of a model, but copies share one: train LoRA or words")
        if config.data_of(stage).buckets:
            raise ConfigError(f"stages.{i}.data.buckets: copies train in one program, so all images need one size")
    for i, (copy, member) in enumerate(zip(config.copies, config.members(), strict=True)):
        if (copy.placeholder_tokens or copy.init_tokens) and not any(
            "textual_inversion" in stage.train for stage in config.stages
        ):
            raise ConfigError(f"copies.{i} names words, but no stage trains any")
        if copy.stage not in ("", *(stage.name for stage in config.stages)):
            raise wrong(f"copies.{i}.stage", copy.stage, f"one of {', '.join(stage.name for stage in config.stages)}")
        used = {name for stage in config.stages for name in copy.changes(stage)}
        if unused := [name for name in NUMBERS if getattr(copy, name) is not None and name not in used]:
            where = f"stage {copy.stage} does not use" if copy.stage else "no stage uses"
            raise ConfigError(f"copies.{i}.{unused[0]} changes nothing: {where} it")
        try:
            check(member)
        except ConfigError as e:
            raise ConfigError(f"copies.{i} ({copy.name}): {e}") from None
    for alike in zip(*(member.stages for member in config.members()), strict=True):
        if len({stage.noise_offset > 0 for stage in alike}) > 1:  # without it the noise is drawn in another way
            raise ConfigError(
                f"copies, stage {alike[0].name}: noise_offset is 0 in some; give all of them one, or none"
            )


def check_copies_table(copies: Any) -> None:
    """Raises ConfigError if a table of copies has a setting of the run in which copies cannot differ."""
    known = [field.name for field in dataclasses.fields(Copy)]
    others = {field.name for record in (Stage, Data, RunConfig) for field in dataclasses.fields(record)} - set(known)
    for i, copy in enumerate(copies if isinstance(copies, list) else []):
        if isinstance(copy, dict) and (same := [name for name in copy if name in others]):
            raise ConfigError(
                f"copies.{i}.{same[0]}: copies train in one program and have the same {same[0]}; "
                f"they may differ in {', '.join(known[1:])}"
            )


def _check_stage(stage: Stage, key: str) -> None:
    lists = {"train": stage.train, "lora_parts": stage.lora_parts, "lora_targets": stage.lora_targets}
    for name, values in lists.items():
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
    _check_consistency(stage, key)
    if stage.min_snr_gamma and stage.debiased:
        raise ConfigError(f"{key}: min_snr_gamma and debiased are two weightings of the same loss: choose one")
    if stage.optimizer == "schedule_free" and stage.ema_decay:
        raise ConfigError(f"{key}: schedule_free averages by itself: leave out ema_decay")
    if stage.schedule == "constant_with_warmup" and not stage.warmup_steps:
        raise ConfigError(f"{key}.schedule = 'constant_with_warmup' needs {key}.warmup_steps above 0")
    if stage.warmup_steps > stage.steps:
        raise ConfigError(f"{key}.warmup_steps = {stage.warmup_steps} is more than {key}.steps = {stage.steps}")
    if stage.timestep_range[0] >= stage.timestep_range[1]:
        raise wrong(f"{key}.timestep_range", list(stage.timestep_range), "the first below the second")


def _check_parts(stage: Stage, key: str) -> None:
    """Checks which parts are trained together, and the settings of new words."""
    both = sorted(set(stage.lora_parts) & set(stage.train)) if "lora" in stage.train else []
    if both:
        raise ConfigError(f"{key}: {both[0]} is trained as a whole and by LoRA: leave it out of train or of lora_parts")
    if stage.lora_init and "lora" not in stage.train:
        raise ConfigError(f"{key}.lora_init needs train = ['lora']")
    if stage.lora_factor and stage.lora_kind != "lokr" and not stage.lora_init:
        raise ConfigError(f"{key}.lora_factor = {stage.lora_factor} needs {key}.lora_kind = 'lokr'")
    if stage.lora_init and stage.lora_continue:
        raise ConfigError(f"{key}: lora_init and lora_continue are two beginnings of the adapter: choose one")
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


def _check_consistency(stage: Stage, key: str) -> None:
    """Checks what goes together with latent consistency distillation."""
    low, high = stage.consistency_guidance
    if low > high:
        raise wrong(f"{key}.consistency_guidance", [low, high], "the first not above the second")
    if not stage.consistency_steps:
        return
    if stage.parts != {"unet": "lora"}:
        raise ConfigError(
            f"{key}.consistency_steps needs train = ['lora'] and lora_parts = ['unet']: its teacher is the model "
            "without the adapter"
        )
    for name in ("min_snr_gamma", "debiased", "input_perturbation", "prior_prompt", "prior_path"):
        if getattr(stage, name):
            raise ConfigError(f"{key}: {name} has no meaning in consistency distillation: leave it out")


def _check_data(data: Data, key: str, *, masked: bool) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(data.background)
    except ValueError:
        raise wrong(f"{key}.background", data.background, "a CSS colour name or #rrggbb") from None
    held_out = {
        "validation_path": data.validation_path,
        "validation_count": data.validation_count,
        "validation_fraction": data.validation_fraction,
    }
    if len(names := [name for name, value in held_out.items() if value]) > 1:
        raise ConfigError(f"{key}: {' and '.join(names)} all say which images are held out: choose one")
    if data.crop == "subject":
        others = {name: getattr(data, name) for name in ("random_crops", "buckets", "mask_path", "inpaint_mask_path")}
        if names := [name for name, value in (others | {"masked_loss": masked}).items() if value]:
            raise ConfigError(f"{key}: crop = 'subject' cuts one square of each image: leave out {' and '.join(names)}")
    if data.inpaint_masks and data.inpaint_mask_path:
        raise ConfigError(f"{key}: inpaint_masks makes random masks, inpaint_mask_path reads masks: choose one")
