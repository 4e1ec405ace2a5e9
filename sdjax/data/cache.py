"""Keeps on disk what is computed once from a data set: latents (or pixels), masks and prompt embeddings.

A large set is kept in several entries (`data.entries`).
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from sdjax.data.entries import Missing, entries
from sdjax.data.files import File, file_digest, loaded, picture_size
from sdjax.data.holes import make_holes
from sdjax.data.images import (
    Crop,
    Size,
    framed_on_subject,
    random_crops,
    read_image,
    read_mask,
    read_picture,
    size_conditions,
)
from sdjax.data.joined import joined
from sdjax.data.records import Record, chosen
from sdjax.errors import DataError

log = logging.getLogger(__name__)

TEXTS_AT_ONCE = 16
"""Captions that are encoded at a time."""

LARGEST = 256
"""Most images, or captions, of an entry. A multiple of how many are encoded at a time."""

Arrays = Mapping[str, Shaped[np.ndarray, " N *S"]]


class Images(NamedTuple):
    """The readable images of one shape as arrays, which may lie on disk."""

    records: Sequence[Record]
    arrays: Arrays
    """By name, each `[N, V, ...]`: N images with V views each. The views are the image's crops, each followed by its
    mirror image if images are flipped.

    `moments [N, V, h, w, 2C]` of the VAE's posterior, or `pixels [N, V, H, W, 3]` of 8 bits; `mask [N, V, h, w, 1]`,
    0 to 1; `sizes [N, V, 6]`, see `images.size_conditions`.

    For inpainting, each crop has K masks, which are mirrored with it: `hole [N, V*K, h, w, 1]` is 1 where a latent is
    painted, else 0. `kept [N, V*K, h, w, C]`, for models that take it, is the mean of the VAE's posterior (unscaled) of
    the image with the hole in grey. Crop c with its mask k is view c * K + k, or 2 * (c * K + k) if images are flipped.
    """
    skipped: tuple[str, ...]
    """One message for each image that cannot be used."""


class Texts(NamedTuple):
    """Captions as arrays: the outputs of the text models, or token ids."""

    rows: Mapping[str, int]
    """Caption -> its row in every array. The empty caption is always included."""
    arrays: Arrays


class Views(NamedTuple):
    """How images become arrays."""

    size: Size
    background: str = "white"
    flip: bool = False
    crops: int = 0
    """Number of random crops of each image; 0: one crop from the middle."""
    seed: int = 0
    """Seed of the random crops and masks."""
    holes: int = 0
    """Number of masks of each crop, for inpainting."""
    full: float = 0.0
    """Share of the random masks that hide the whole crop."""
    on_subject: bool = False
    """Whether images are framed on their subject; see `images.framed_on_subject`."""

    def read(self, record: Record, file: File | None = None) -> UInt8[np.ndarray, "V H W 3"]:
        """The crops of an image. file: that of the record, if it is loaded already."""
        source = record.file if file is None else file
        return read_image(source, self.size, self.background, self.crops_of(record), on_subject=self.on_subject)

    def size_of(self, record: Record) -> Size:
        """The size of what the crops of an image are cut from."""
        if not self.on_subject:
            return picture_size(record.file)
        framed = framed_on_subject(read_picture(record.file), self.background)
        return Size(framed.height, framed.width)

    def crops_of(self, record: Record) -> tuple[Crop, ...]:
        """The crops of an image."""
        return random_crops(self.crops, seed=self.seed, name=record.name)

    def key(self, records: Iterable[Record], digests: Sequence[str]) -> dict[str, Any]:
        """The part of a cache key that identifies the views of these images. digests: of the files."""
        key = {"size": self.size, "flip": self.flip, "images": digests}
        key |= {"on_subject": True} if self.on_subject else {}
        return key | (
            {"crops": self.crops, "seed": self.seed, "names": [r.name for r in records]} if self.crops else {}
        )


def cache_images(
    records: Sequence[Record],
    views: Views,
    encode: Callable[[UInt8[np.ndarray, "B H W 3"]], Any] | None,
    *,
    folder: str | Path,
    model: str,
    on_bad_image: Literal["skip", "fail"] = "fail",
    batch_size: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> Images:
    """Returns the views of every image, from the cache in `folder` or computed now and cached there.

    encode: turns 8-bit images into posterior moments `[B, h, w, 2C]`. Its batches have exactly `batch_size` images,
    padded where needed, so that it compiles once per size. None: the views are the pixels.
    model: identifies the weights of `encode`. progress(done, total): called after each batch.
    Raises DataError for a bad image, unless `on_bad_image` is "skip"; the result may then have no images.
    """
    encode_named = None if encode is None else lambda images: {"moments": encode(images)}

    def entry(begin: int, members: Sequence[Record]) -> Missing:
        key = views.key(members, [file_digest(record.file) for record in members])
        key |= {"kind": "pixels" if encode is None else "latents", "background": views.background}
        key |= {} if encode is None else {"model": model}
        kept: list[int] = []
        skipped: list[str] = []
        return Missing(key, rows(begin, members, kept, skipped), {"kept": kept, "skipped": skipped})

    def rows(
        begin: int, members: Sequence[Record], kept: list[int], skipped: list[str]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(members), batch_size):
            images = []
            for i in range(start, min(start + batch_size, len(members))):
                record = members[i]
                file = loaded(record.file)  # a shard that cannot be read is not a bad image
                try:
                    pictures = views.read(record, file)
                except DataError as e:
                    if on_bad_image == "fail":
                        raise _bad_image(e) from e
                    log.warning("skipped: %s", e)
                    skipped.append(str(e))
                else:
                    images.append(_with_mirrored(pictures, views.flip))
                    kept.append(i)
            if not images:
                pass
            elif encode_named is None:
                yield {"pixels": np.stack(images)}
            else:
                yield _encoded([(image,) for image in images], batch_size, encode_named)
            if progress:
                progress(begin + min(start + batch_size, len(members)), len(records))

    arrays, notes = _entries(Path(folder), records, entry)
    skipped = tuple(message for _, note in notes for message in note["skipped"])
    if skipped:
        if on_bad_image == "fail":
            raise _bad_image(skipped[0])
        log.warning("%d of %d images skipped", len(skipped), len(records))
    kept = np.concatenate([begin + np.array(note["kept"], np.int64) for begin, note in notes])
    return Images(chosen(records, kept), arrays, skipped)


def cache_masks(images: Images, views: Views, factor: int, *, folder: str | Path) -> Images:
    """`images` with the array `mask`: their masks, averaged over the `factor` x `factor` pixels of a latent.

    An image without a mask file has its alpha channel as mask. Raises DataError for a mask that cannot be used.
    """
    size = Size(*(side // factor for side in views.size))

    def entry(_: int, records: Sequence[Record]) -> Missing:
        key = views.key(records, [file_digest(record.mask or record.file) for record in records])
        key |= {"kind": "masks", "factor": factor, "alpha": [record.mask is None for record in records]}
        return Missing(key, map(row, records), {})

    def row(record: Record) -> Mapping[str, np.ndarray]:
        mask = read_mask(record.mask or record.file, size, views.crops_of(record), alpha=record.mask is None)
        return {"mask": _with_mirrored(mask, views.flip)[None]}

    arrays, _ = _entries(Path(folder), images.records, entry)
    return images._replace(arrays={**images.arrays, **arrays})


def cache_sizes(images: Images, views: Views, *, folder: str | Path) -> Images:
    """`images` with the array `sizes`: SDXL's size conditions of each view."""

    def entry(_: int, records: Sequence[Record]) -> Missing:
        key = views.key(records, [file_digest(record.file) for record in records]) | {"kind": "sizes"}
        return Missing(key, map(row, records), {})

    def row(record: Record) -> Mapping[str, np.ndarray]:
        sizes = size_conditions(views.size_of(record), views.size, views.crops_of(record), flip=views.flip)
        return {"sizes": sizes[None]}

    arrays, _ = _entries(Path(folder), images.records, entry)
    return images._replace(arrays={**images.arrays, **arrays})


def cache_holes(
    images: Images,
    views: Views,
    encode: Callable[[UInt8[np.ndarray, "B H W 3"], Bool[np.ndarray, "B H W"]], Mapping[str, Any]],
    *,
    folder: str | Path,
    model: str,
    batch_size: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> Images:
    """`images` with the arrays for inpainting, `hole` and perhaps `kept`; see `Images`.

    encode: turns images and their masks (True where hidden) into these arrays by name, in batches as in `cache_images`.
    Raises DataError for a mask file that cannot be used.
    """

    def entry(begin: int, records: Sequence[Record]) -> Missing:
        key = views.key(records, [file_digest(record.file) for record in records])
        key |= {"kind": "holes", "model": model, "background": views.background}
        key |= {"holes": views.holes, "full": views.full}
        key |= {"seed": views.seed, "names": [record.name for record in records]}
        key |= {"own": ["" if record.hole is None else file_digest(record.hole) for record in records]}
        return Missing(key, rows(begin, records), {})

    def shown(record: Record) -> list[np.ndarray]:
        """The image and the mask of each view."""
        crops = views.crops_of(record)
        pictures = views.read(record)
        holes = make_holes(record, views.size, crops, count=views.holes, full=views.full, seed=views.seed)
        pairs = np.repeat(pictures, views.holes, axis=0), holes.reshape(-1, *views.size)
        return [_with_mirrored(array, views.flip) for array in pairs]

    def rows(begin: int, records: Sequence[Record]) -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            yield _encoded([shown(record) for record in batch], batch_size, encode)
            if progress:
                progress(begin + start + len(batch), len(images.records))

    arrays, _ = _entries(Path(folder), images.records, entry)
    return images._replace(arrays={**images.arrays, **arrays})


def cache_texts(
    captions: Iterable[str],
    encode: Callable[[list[str]], Mapping[str, Any]],
    *,
    folder: str | Path,
    model: str,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = TEXTS_AT_ONCE,
) -> Texts:
    """Returns each distinct caption and the empty caption as arrays, from the cache or computed now and cached.

    encode: turns exactly `batch_size` captions (padded with empty ones) into arrays `[B, ...]` by name, with the same
    shapes every time. model, settings: identify what `encode` computes, for example by clip_skip.
    """
    unique = sorted({"", *captions})

    def entry(_: int, texts: Sequence[str]) -> Missing:
        key = {"kind": "texts", "model": model, "settings": dict(settings or {}), "captions": texts}
        return Missing(key, rows(texts), {})

    def rows(texts: Sequence[str]) -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(texts), batch_size):
            batch = [*texts[start : start + batch_size]]
            encoded = encode(batch + [""] * (batch_size - len(batch)))
            yield {name: _storable(array)[: len(batch)] for name, array in encoded.items()}

    arrays, _ = _entries(Path(folder), unique, entry)
    return Texts({caption: row for row, caption in enumerate(unique)}, arrays)


def _encoded(
    images: Sequence[Sequence[np.ndarray]], batch_size: int, encode: Callable[..., Mapping[str, Any]]
) -> dict[str, Shaped[np.ndarray, "N V *S"]]:
    """The arrays that `encode` returns for each view of N images, of which there are at most `batch_size`.

    Each batch has exactly `batch_size` images: copies of the last image fill it up.
    images: for each image, the arrays `[V, ...]` that `encode` takes.
    """
    full = [*images, *[images[-1]] * (batch_size - len(images))]
    arguments = [np.stack(arrays, axis=1) for arrays in zip(*full, strict=True)]  # [V, B, ...] each
    views = [encode(*view) for view in zip(*arguments, strict=True)]
    return {name: np.stack([_storable(view[name]) for view in views], axis=1)[: len(images)] for name in views[0]}


def _with_mirrored(pictures: Shaped[np.ndarray, "V H W *C"], flip: bool) -> Shaped[np.ndarray, "F H W *C"]:
    """The pictures, each followed by its mirror image if `flip`."""
    return np.stack([pictures, pictures[:, :, ::-1]], axis=1).reshape(-1, *pictures.shape[1:]) if flip else pictures


def _bad_image(reason: object) -> DataError:
    return DataError(f"{reason} (data.on_bad_image = 'skip' leaves the image out)")


def _storable(array: Any) -> np.ndarray:
    """The array on the host, in a number type that is stored."""
    array = np.asarray(array)
    return array.astype(storable(array.dtype), copy=False)


def storable(dtype: np.dtype) -> np.dtype:
    """The number type that arrays of this type are stored in: one of NumPy's, so float32 for bfloat16."""
    return np.dtype(np.float32) if dtype.kind == "V" or dtype.name == "bfloat16" else dtype


def _entries(
    folder: Path, items: Sequence[Any], entry: Callable[[int, Sequence[Any]], Missing]
) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """Returns the joined arrays of the entries of all items, and for each entry its first item and its notes."""
    found = entries(folder, items, entry, most=LARGEST)
    parts = [each.arrays for _, each in found if each.arrays]  # an entry whose images are all bad has none
    arrays = {name: joined([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    return arrays, [(start, each.notes) for start, each in found]
