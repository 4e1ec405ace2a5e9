"""Checks of a run's settings against its images and its model, before any weight is read.

`train.config.check` has checked the settings alone. All functions raise ConfigError or DataError, which name the
setting. `key` is that of the stage, such as "stages.0".
"""

import functools
import logging
from collections.abc import Mapping, Sequence

from sdjax.data import records
from sdjax.data.folder import takes_all_below
from sdjax.draw import sampling
from sdjax.errors import ConfigError, DataError
from sdjax.formats.embedding_file import file_name
from sdjax.formats.lora_file import KOHYA_FILE, PEFT_FILE
from sdjax.models.unet import DOWN_BLOCKS
from sdjax.outline import Outline
from sdjax.settings import LONGEST_NAME
from sdjax.train.config import Data, RunConfig, Stage
from sdjax.train.parallel import Parallel
from sdjax.train.stage_images import Images, holes

log = logging.getLogger(__name__)

MOST_CHUNKS = 16
"""Most windows of the text model that a caption may take in training."""


def check_output(config: RunConfig, data: Sequence[Data]) -> None:
    """Raises ConfigError if the pictures that the run writes would become training pictures when it is resumed."""
    for stage, own in zip(config.stages, data, strict=True):
        for key, folder in (
            ("data.path", own.path),
            ("data.validation_path", own.validation_path),
            ("prior_path", stage.prior_path),
        ):
            if folder and takes_all_below(folder, config.output):
                raise ConfigError(
                    f"output = {config.output!r} lies in {key} = {folder!r}: its samples would become training "
                    "pictures; choose an output outside"
                )


def check_model(config: RunConfig, outline: Outline) -> None:
    """Checks that the model can be trained and drawn with, and that its files are whole."""
    _ = outline.is_inpainting  # or else a standard model: others are refused
    if outline.takes_score:
        raise ConfigError(f"{config.model} is SDXL's refiner, which takes aesthetic scores that pictures do not have")
    outline.hidden_state(config.clip_skip)
    if config.validation.prompts or any(holes(config.data_of(stage), stage) for stage in config.stages):
        sampling.tabulate(outline.schedule, config.validation.sampler, config.validation.steps)
    for part in outline.folder.weights:  # none if the run is only planned
        outline.folder.tensors(part)  # a truncated or foreign file is refused by its header


def check_stage(config: RunConfig, stage: Stage, key: str, data: Data, outline: Outline) -> None:
    """Checks that the model has what a stage trains, and takes its images."""
    for part in (*stage.parts, *(stage.lora_parts if "lora" in stage.train else ())):
        if part not in (*outline.shapes, "textual_inversion"):
            choices = ", ".join(name for name in outline.shapes if name != "vae")
            raise ConfigError(f"{key}: {config.model} has no {part}; it has {choices}")
    if stage.vae_normalise and not (outline.vae.config.use_quant_conv and outline.vae.config.use_post_quant_conv):
        raise ConfigError(f"{key}.vae_normalise needs an autoencoder with quant_conv and post_quant_conv")
    if stage.consistency_steps > (count := len(outline.schedule.alphas_cumprod)):
        raise ConfigError(f"{key}.consistency_steps = {stage.consistency_steps}: {config.model} has {count} time steps")
    _check_resolution(config, key, data, outline)
    if outline.is_inpainting and "vae" not in stage.parts and not holes(data, stage):
        raise ConfigError(
            f"{key}: {config.model} is made for inpainting: give data.inpaint_masks (4, say) or data.inpaint_mask_path"
        )


def _check_resolution(config: RunConfig, key: str, data: Data, outline: Outline) -> None:
    factor, native = outline.vae.config.factor, outline.native_size
    if data.resolution % factor:
        raise ConfigError(
            f"{key}: data.resolution = {data.resolution} must be a multiple of {factor} for {config.model}"
        )
    if not native / 4 <= data.resolution <= native * 4:
        raise ConfigError(
            f"{key}: data.resolution = {data.resolution} is far from the {native} pixels of {config.model}"
        )
    if data.resolution != native:
        log.warning("%s: resolution %d, but the model was trained at %d", key, data.resolution, native)


def check_tensor(parallel: Parallel, outline: Outline, model: str) -> None:
    """Raises ConfigError if the axis tensor divides the heads of no attention of the U-Net."""
    size = parallel.mesh.shape["tensor"] if parallel.mesh is not None else 1
    config = outline.unet.config
    levels = zip(config.down_block_types, config.heads, strict=True)
    heads = sorted({heads for block, heads in levels if DOWN_BLOCKS[block]})
    if heads and all(count % size for count in heads):
        fitting = [n for n in range(2, heads[-1] + 1) if any(count % n == 0 for count in heads)]
        raise ConfigError(
            f"parallel.mesh.tensor = {size} divides the heads of no attention of {model} "
            f"({', '.join(map(str, heads))} heads); choices: {', '.join(map(str, fitting)) or 1}"
        )


def check_file_names(words: Mapping[str, int], key: str) -> None:
    """Raises ConfigError if two words, or a word and the LoRA, would have the same file in the export."""
    taken = {name: "the LoRA" for name in (PEFT_FILE, KOHYA_FILE)}
    for word in words:
        name = file_name(word).lower()  # some file systems do not tell capitals apart
        if len(name.encode()) > LONGEST_NAME:
            raise ConfigError(f"{key}.placeholder_tokens: {word[:40]}... is too long for the name of a file")
        if name in taken:
            raise ConfigError(f"{key}.placeholder_tokens: {word} and {taken[name]} would both be exported as {name}")
        taken[name] = word


def count_chunks(images: Images, prior_prompt: str, outline: Outline, key: str) -> int:
    """Returns the number of chunks of the longest caption. All captions are encoded with as many.

    Warns of a caption of more than 4 chunks; raises DataError for one of more than MOST_CHUNKS. Both name its image.
    """
    count = functools.lru_cache(4096)(lambda text: outline.chunks([text]))  # templates come again and again
    longest, name, chunks = prior_prompt, "prior_prompt", count(prior_prompt)
    for several in (images.training, images.held_out, images.classes):
        for number, texts in enumerate(records.captions_of(several)):
            for text in texts:
                if count(text) > chunks:
                    longest, name, chunks = text, several[number].name, count(text)
    words = f"the caption of {name} ({len(longest)} characters: {longest[:40]!r}...) takes {chunks} windows"
    if chunks > MOST_CHUNKS:
        raise DataError(f"{key}: {words} of the text model; at most {MOST_CHUNKS} are possible: shorten it")
    if chunks > 4:
        log.warning("%s: %s of the text model, and so every caption is encoded with %d", key, words, chunks)
    return chunks
