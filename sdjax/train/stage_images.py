"""The images of a stage: those to train on and those held out, with the captions and masks that the stage shows."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdjax.data import buckets, captions, records
from sdjax.data.buckets import Buckets
from sdjax.data.images import Size
from sdjax.data.records import Record, Records
from sdjax.data.shards import Columns
from sdjax.errors import ConfigError, DataError
from sdjax.outline import Outline
from sdjax.text import textual_inversion
from sdjax.train.config import Data, Stage

Scan = Callable[[str, tuple[tuple[str, int], ...], tuple[tuple[str, Any], ...]], Records]
"""`records.scan` of (folder, repeats, other settings), each of which is scanned once for all stages and copies."""


def scan_folder(folder: str, repeats: tuple[tuple[str, int], ...], how: tuple[tuple[str, Any], ...]) -> Records:
    """Returns the images of a folder; see `Scan`."""
    return records.scan(folder, repeats=dict(repeats), **dict(how))


class Images(NamedTuple):
    """The images of one stage."""

    training: Sequence[Record]
    held_out: Sequence[Record]
    classes: Sequence[Record]
    """The class images of prior_path, if they keep their own captions."""
    fingerprint: dict[str, str]
    """Name of an image -> digest; see `records.fingerprint`."""


def holes(data: Data, stage: Stage) -> int:
    """Returns the number of masks of each crop in training for inpainting; 0 in other training."""
    return 0 if "vae" in stage.parts else data.inpaint_masks or bool(data.inpaint_mask_path)


def find(data: Data, stage: Stage, key: str, seed: int, scan: Scan, keep: Path | None) -> Images:
    """Returns the images of a stage. keep: see `sources.find`; None if no weights are read, and so no picture."""
    templated = bool(stage.placeholder_tokens) and stage.template != "caption"
    unused = (templated or "vae" in stage.parts) and data.missing_caption in ("fail", "empty")
    how = (
        ("caption", data.caption),
        ("missing_caption", "unused" if unused else data.missing_caption),
        ("columns", Columns(data.image_column, data.caption_column)),
        ("keep", keep),
    )
    everything = scan(data.path, tuple(data.repeats.items()), how)
    if holes(data, stage) and data.inpaint_mask_path:
        everything = records.with_masks(everything, data.inpaint_mask_path, "hole")
    training, held_out = everything, everything[:0]
    if data.validation_path:
        held_out = scan(data.validation_path, (), (*how, ("setting", f"{key}: data.validation_path")))
    elif data.validation_count or data.validation_fraction:
        training, held_out = records.split(everything, count=data.validation_count, fraction=data.validation_fraction)
    if stage.masked_loss and data.mask_path:
        training = records.with_masks(training, data.mask_path)
    classes = _captioned_classes(stage, key, scan, keep) if stage.prior_path and not stage.prior_prompt else ()
    shown = functools.partial(_with_versions, data=data, stage=stage, seed=seed)
    others = f"{Path(data.validation_path).name}: " if data.validation_path else ""  # both folders may hold a name
    fingerprint: dict[str, str] = {}
    if keep is not None:
        fingerprint = records.fingerprint(training)
        fingerprint |= {others + name: digest for name, digest in records.fingerprint(held_out).items()}
        fingerprint |= {f"prior_path: {name}": digest for name, digest in records.fingerprint(classes).items()}
    return Images(shown(training), shown(held_out, vary=False), classes, fingerprint)


def _captioned_classes(stage: Stage, key: str, scan: Scan, keep: Path | None) -> Records:
    """Returns the images of prior_path with the captions they have. Raises DataError if one has none."""
    how = ("missing_caption", "empty"), ("keep", keep), ("setting", f"{key}: prior_path")
    found = scan(stage.prior_path, (), how)
    for number, captions_of_one in enumerate(records.captions_of(found)):
        if not any(captions_of_one):
            raise DataError(
                f"{key}.prior_path: no caption for {found[number].name}; write NAME.txt or metadata.jsonl, or give "
                "prior_prompt, a caption for all"
            )
    return found


def _with_versions(images: Records, *, data: Data, stage: Stage, seed: int, vary: bool = True) -> Records:
    """Returns the images with the versions of their captions that the stage shows; one version unless `vary`."""
    words = stage.placeholder_tokens
    if words and stage.template != "caption":
        versions = captions.from_templates(textual_inversion.templates(stage.template), words)
        return dataclasses.replace(images, versions=lambda _: versions if vary else versions[:1])
    tags = functools.partial(
        captions.tag_versions,
        count=data.caption_variants,
        seed=seed,
        shuffle=data.shuffle_tags and vary,
        keep=data.keep_tags,
        dropout=data.tag_dropout if vary else 0.0,
    )
    return dataclasses.replace(
        images, versions=lambda caption: tuple(captions.with_words(version, words) for version in tags(caption))
    )


def assign(data: Data, training: Sequence[Record], key: str, outline: Outline) -> Buckets:
    """Returns the training images by the size they are trained at."""
    if not data.buckets:
        return {Size(data.resolution, data.resolution): training}
    factor = outline.vae.config.factor
    if data.bucket_step % factor:
        raise ConfigError(
            f"{key}: data.bucket_step = {data.bucket_step} must be a multiple of {factor} for {outline.name}"
        )
    sizes = buckets.sizes(data.resolution, step=data.bucket_step, max_aspect=data.bucket_max_aspect)
    return buckets.assign(training, sizes)
