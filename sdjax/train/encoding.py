"""Encodes the images and captions of a stage with the VAE and the text models, for the batches of its steps."""

import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt8

from sdjax.data import cache
from sdjax.data.dataset import Bucket, Dataset, Prior, join
from sdjax.data.folder import images_below
from sdjax.data.images import Size, to_float
from sdjax.data.records import Record, captions_of, scan
from sdjax.draw import inpainting
from sdjax.draw.pipeline import StableDiffusion
from sdjax.errors import DataError
from sdjax.model import Model
from sdjax.models import layers, vae
from sdjax.runtime import processes
from sdjax.runtime.whole_file import replacing
from sdjax.text.encoding import encode_ids
from sdjax.train.results import Results, base_weights
from sdjax.train.stages import Run, StagePlan


def encode(run: Run, plan: StagePlan, earlier: Results) -> tuple[Dataset, Dataset | None]:
    """Returns the data set of the training images, and that of the held-out images or None.

    An image is encoded as the moments of the VAE's posterior; if the VAE is trained, its pixels are kept instead. A
    caption is encoded as its context; if training changes the context, its token ids are kept instead. Encodings come
    from the cache, or are computed and cached now. Held-out and class images are cropped in the middle. Class images
    are encoded at the size of every bucket, since all images of a batch have one size; missing ones are drawn first.
    Models are loaded only if they are needed, and freed before this returns.
    Raises DataError for an unusable image or, with on_bad_image = "skip", if no image is left.
    """
    data, stage = plan.data, plan.stage
    folder = Path(data.cache or Path(run.config.output) / "cache")
    encode_images = _image_encoder(run, plan, earlier, folder)
    square = Size(data.resolution, data.resolution)
    middle = cache.Views(square, data.background, on_subject=data.crop == "subject")
    shown = middle._replace(flip=data.flip, holes=plan.holes, full=data.inpaint_full)
    views = shown._replace(crops=data.random_crops, seed=run.config.seed)
    training = [
        encode_images("training", members, views._replace(size=size), masked=stage.masked_loss)
        for size, members in plan.buckets.items()
    ]
    _check_usable(training)
    sizes = [size for size, images in zip(plan.buckets, training, strict=True) if images.records]
    training = [images for images in training if images.records]
    # One mask for each held-out image. None hides a whole image: the loss then shows how well the visible part is
    # continued.
    held_out_views = middle._replace(holes=min(1, plan.holes))
    held_out = [encode_images("held-out", plan.held_out, held_out_views)] if plan.held_out else []
    _check_usable(held_out)
    prior = []
    if stage.has_prior:
        members = class_images(run, plan, earlier)
        prior = [encode_images("class", members, shown._replace(size=size)) for size in sizes]
        _check_usable(prior)
        prior = [_learned_everywhere(images) for images in prior] if stage.masked_loss else prior

    shown = itertools.chain.from_iterable(captions_of(images.records) for images in (*training, *held_out, *prior))
    captions = itertools.chain.from_iterable(shown)
    if "vae" in stage.parts:
        texts = cache.Texts(dict.fromkeys(itertools.chain([""], captions), 0), {})
    else:
        texts = _encode_texts(run, plan, captions, earlier, folder)

    def buckets(images: Iterable[cache.Images]) -> tuple[Bucket, ...]:
        return tuple(join(bucket, texts) for bucket in images)

    with_empty = bool(stage.consistency_steps)
    dataset = Dataset(buckets(training), texts.arrays, texts.rows[""], with_empty=with_empty)
    class_data = Prior(buckets(prior), stage.prior_weight) if prior else None
    return dataset._replace(prior=class_data), dataset._replace(buckets=buckets(held_out)) if held_out else None


_DRAWN = re.compile(r"drawn-([0-9a-f]{8}-)?\d{5}\.png")


def class_images(run: Run, plan: StagePlan, earlier: Results) -> Sequence[Record]:
    """Returns the class images of a stage, all with the prior prompt as their caption, or with captions of their own.

    Images missing in prior_path are drawn with the model that the stage starts from. Image n has seed n. Each is saved
    at once, so that a run that is killed here goes on with the next image. The names of drawn files hold a digest of
    what they depend on: those of another prompt or model are left out, and stay as they are. The names of the records
    do not hold it, because random masks depend on names and must not depend on the rounding of earlier stages.
    """
    stage, outline = plan.stage, plan.recipe.outline
    if not stage.prior_prompt:
        return plan.classes
    folder = Path(stage.prior_path or Path(run.config.output) / "prior" / stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    drawn_from = [stage.prior_prompt, plan.data.resolution, run.config.clip_skip, run.fingerprint, run.config.dtype]
    drawn_from += [run.beneath.digest] if run.beneath.loras else []
    digest = hashlib.sha256(json.dumps([*drawn_from, earlier.digest(*outline.shapes)]).encode()).hexdigest()[:8]
    provided = [path for path in images_below(folder) if not _DRAWN.fullmatch(path.name)]
    names = [f"drawn-{digest}-{seed:05d}.png" for seed in range(max(0, stage.prior_count - len(provided)))]
    missing = [seed for seed, name in enumerate(names) if not (folder / name).is_file()]
    if missing and processes.is_first():
        params = {part: base_weights(outline, part, earlier) for part in outline.shapes}
        sd = StableDiffusion(Model(outline, params, earlier.rows))
        with _bar(f"{stage.name}: drawing class images", len(missing)) as bar:
            for seed in missing:
                (picture,) = sd.text2image(
                    stage.prior_prompt,
                    seed=seed,
                    height=plan.data.resolution,
                    width=plan.data.resolution,
                    clip_skip=run.config.clip_skip,
                    progress=False,
                )
                with replacing(folder / names[seed]) as file:
                    picture.save(file, "PNG")
                bar.update()
    processes.wait("class images")
    wanted = {path.resolve() for path in provided} | {(folder / name).resolve() for name in names}
    found = scan(folder, caption=stage.prior_prompt, setting="prior_path")
    return tuple(
        record._replace(name=record.name.replace(f"-{digest}-", "-"), caption=stage.prior_prompt)
        for record in found
        if Path(str(record.file)).resolve() in wanted
    )


def _image_encoder(run: Run, plan: StagePlan, earlier: Results, folder: Path) -> Callable[..., cache.Images]:
    """Returns `encode(kind, records, views, masked=False)`, which encodes images of one size with their masks.

    kind: word for the progress bar. masked: add the masks of masked_loss.
    """
    outline = plan.recipe.outline
    factor, sees_kept = outline.vae.config.factor, outline.is_inpainting
    weights = functools.cache(lambda: base_weights(outline, "vae", earlier))
    weights_digest = f"{run.fingerprint} {run.config.dtype} {earlier.digest('vae')}"

    def moments(images: UInt8[np.ndarray, "B H W 3"]) -> Array:
        return compiled_moments(outline.vae, weights(), to_float(images))

    def holes(images: UInt8[np.ndarray, "B H W 3"], hidden: Bool[np.ndarray, "B H W"]) -> dict[str, Any]:
        arrays: dict[str, Any] = {"hole": inpainting.cells(hidden.astype(np.float32), factor)}
        if sees_kept:  # as in drawing, hidden pixels are grey, which is 0
            kept = np.where(hidden[..., None], np.float32(0), to_float(images))
            arrays["kept"] = vae.posterior_mean(compiled_moments(outline.vae, weights(), kept))
        return arrays

    def encode(kind: str, records: Sequence[Record], views: cache.Views, *, masked: bool = False) -> cache.Images:
        options: Any = {"folder": folder, "batch_size": images_at_once(plan.data.resolution)}
        with _bar(f"{plan.stage.name}: encoding {kind} images", len(records)) as bar:
            images = cache.cache_images(
                records,
                views,
                None if "vae" in plan.stage.parts else moments,
                model=weights_digest,
                on_bad_image=plan.data.on_bad_image,
                progress=lambda done, _: bar.update(done - bar.n),
                **options,
            )
        if views.holes:
            with _bar(f"{plan.stage.name}: masking {kind} images", len(images.records)) as bar:
                images = cache.cache_holes(
                    images,
                    views,
                    holes,
                    model=weights_digest if sees_kept else f"factor {factor}",
                    progress=lambda done, _: bar.update(done - bar.n),
                    **options,
                )
        if outline.is_sdxl and "vae" not in plan.stage.parts:
            images = cache.cache_sizes(images, views, folder=folder)
        return cache.cache_masks(images, views, factor, folder=folder) if masked else images

    return encode


def images_at_once(resolution: int) -> int:
    """Returns how many images are encoded at a time: large ones one by one, as drawing decodes them, to save memory."""
    return 8 if resolution <= 128 else 1


def _check_usable(buckets: Sequence[cache.Images]) -> None:
    """Raises DataError if every image was skipped."""
    skipped = [message for images in buckets for message in images.skipped]
    if skipped and not any(images.records for images in buckets):
        raise DataError(f"none of {len(skipped)} images can be used; the first: {skipped[0]}")


def _learned_everywhere(images: cache.Images) -> cache.Images:
    """Returns the images with masks that are white everywhere."""
    moments = images.arrays["moments"]
    white = np.broadcast_to(np.float32(1), (*moments.shape[:-1], 1))
    return images._replace(arrays={**images.arrays, "mask": white})


def _encode_texts(run: Run, plan: StagePlan, captions: Iterable[str], earlier: Results, folder: Path) -> cache.Texts:
    """Returns the context (and SDXL's pooled vector) of each caption, or its token ids if training changes it."""
    recipe, outline = plan.recipe, plan.recipe.outline
    zeroed = outline.is_sdxl and outline.zeros_empty_prompts

    @functools.cache
    def variables() -> dict[str, Any]:
        return {
            part: layers.variables(base_weights(outline, part, earlier), rows=earlier.rows.get(part))
            for part in outline.text_models
        }

    def encode(captions: list[str]) -> dict[str, Any]:
        arrays: dict[str, Any] = {"empty": np.array([not caption for caption in captions])} if zeroed else {}
        ids = outline.tokenize(captions, chunks=plan.chunks)
        if recipe.trains_text:
            return arrays | ids
        context, pooled = encode_ids(outline.text_models, variables(), ids, recipe.hidden)
        return arrays | {"context": context} | ({"pooled": pooled} if outline.is_sdxl else {})

    settings = {
        "ids": recipe.trains_text,
        "windows": plan.chunks,
        "words": plan.words,
        "hidden": dataclasses.asdict(recipe.hidden),
        "dtype": run.config.dtype,
        "earlier": earlier.digest(*outline.text_models),
        "packing": 2,  # number of the rule by which captions are cut into chunks
    }
    settings |= {"beneath": run.beneath.digest} if run.beneath.loras else {}
    return cache.cache_texts(captions, encode, folder=folder, model=run.fingerprint, settings=settings)


@functools.partial(jax.jit, static_argnums=0)
def compiled_moments(module: vae.AutoencoderKL, params: PyTree, images: Array) -> Array:
    """Returns the moments [B, h, w, 2C] of the posterior of images with values in [-1, 1]."""
    return jnp.asarray(module.apply({"params": params}, images, method="encode"))


def _bar(title: str, total: int):
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=title, unit="image", leave=False, disable=None)
