"""Keeps on disk what is computed once from a data set: latents (or pixels), masks and prompt embeddings.

A cache entry is a folder named after the digest of everything that the entry depends on. It holds one raw file per
array, which is memory-mapped, and index.json with the arrays' shapes and digests. An entry is written under another
name and renamed when it is complete, so a killed run leaves no partial entry. An entry that does not match its digests
is computed again.

A large set is kept in several entries. Processes that train together share out those that are missing.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from sdjax.data.holes import make_holes
from sdjax.data.images import Crop, Size, random_crops, read_image, read_mask, read_size, size_conditions
from sdjax.data.joined import joined
from sdjax.data.records import Record, file_digest
from sdjax.errors import DataError
from sdjax.runtime import processes

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the entries, part of what each depends on. Raise it whenever an entry's contents change their meaning."""

_FAULTS = (OSError, ValueError, KeyError, TypeError)
"""What `_open` raises for a damaged entry."""

TEXTS_AT_ONCE = 16
"""Captions that are encoded at a time."""

LARGEST = 256
"""Most images, or captions, of an entry. A multiple of how many are encoded at a time."""

Arrays = Mapping[str, Shaped[np.ndarray, " N *S"]]


class Images(NamedTuple):
    """The readable images of one shape as arrays, which may lie on disk."""

    records: tuple[Record, ...]
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

    def crops_of(self, record: Record) -> tuple[Crop, ...]:
        """The crops of an image."""
        return random_crops(self.crops, seed=self.seed, name=record.name)

    def key(self, records: Iterable[Record], digests: Sequence[str]) -> dict[str, Any]:
        """The part of a cache key that identifies the views of these images. digests: of the files."""
        key = {"size": self.size, "flip": self.flip, "images": digests}
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

    def entry(begin: int, members: Sequence[Record]) -> _Missing:
        key = views.key(members, [file_digest(record.path) for record in members])
        key |= {"kind": "pixels" if encode is None else "latents", "background": views.background}
        key |= {} if encode is None else {"model": model}
        kept: list[int] = []
        skipped: list[str] = []
        return _Missing(key, rows(begin, members, kept, skipped), {"kept": kept, "skipped": skipped})

    def rows(
        begin: int, members: Sequence[Record], kept: list[int], skipped: list[str]
    ) -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(members), batch_size):
            images = []
            for i in range(start, min(start + batch_size, len(members))):
                record = members[i]
                try:
                    pictures = read_image(record.path, views.size, views.background, views.crops_of(record))
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
    return Images(tuple(records[begin + i] for begin, note in notes for i in note["kept"]), arrays, skipped)


def cache_masks(images: Images, views: Views, factor: int, *, folder: str | Path) -> Images:
    """`images` with the array `mask`: their masks, averaged over the `factor` x `factor` pixels of a latent.

    An image without a mask file has its alpha channel as mask. Raises DataError for a mask that cannot be used.
    """
    size = Size(*(side // factor for side in views.size))

    def entry(_: int, records: Sequence[Record]) -> _Missing:
        key = views.key(records, [file_digest(record.mask or record.path) for record in records])
        key |= {"kind": "masks", "factor": factor, "alpha": [record.mask is None for record in records]}
        return _Missing(key, map(row, records), {})

    def row(record: Record) -> Mapping[str, np.ndarray]:
        mask = read_mask(record.mask or record.path, size, views.crops_of(record), alpha=record.mask is None)
        return {"mask": _with_mirrored(mask, views.flip)[None]}

    arrays, _ = _entries(Path(folder), images.records, entry)
    return images._replace(arrays={**images.arrays, **arrays})


def cache_sizes(images: Images, views: Views, *, folder: str | Path) -> Images:
    """`images` with the array `sizes`: SDXL's size conditions of each view."""

    def entry(_: int, records: Sequence[Record]) -> _Missing:
        key = views.key(records, [file_digest(record.path) for record in records]) | {"kind": "sizes"}
        return _Missing(key, map(row, records), {})

    def row(record: Record) -> Mapping[str, np.ndarray]:
        sizes = size_conditions(read_size(record.path), views.size, views.crops_of(record), flip=views.flip)
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

    def entry(begin: int, records: Sequence[Record]) -> _Missing:
        key = views.key(records, [file_digest(record.path) for record in records])
        key |= {"kind": "holes", "model": model, "background": views.background}
        key |= {"holes": views.holes, "full": views.full}
        key |= {"seed": views.seed, "names": [record.name for record in records]}
        key |= {"own": ["" if record.hole is None else file_digest(record.hole) for record in records]}
        return _Missing(key, rows(begin, records), {})

    def shown(record: Record) -> list[np.ndarray]:
        """The image and the mask of each view."""
        crops = views.crops_of(record)
        pictures = read_image(record.path, views.size, views.background, crops)
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

    def entry(_: int, texts: Sequence[str]) -> _Missing:
        key = {"kind": "texts", "model": model, "settings": dict(settings or {}), "captions": texts}
        return _Missing(key, rows(texts), {})

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


class _Missing(NamedTuple):
    """What an entry depends on, and how it is made if it is missing."""

    key: Mapping[str, Any]
    rows: Iterable[Mapping[str, np.ndarray]]
    notes: dict[str, Any]
    """Iterating over the rows may change it."""


def _entries(
    folder: Path, items: Sequence[Any], entry: Callable[[int, Sequence[Any]], _Missing]
) -> tuple[dict[str, Any], list[tuple[int, dict[str, Any]]]]:
    """Returns the joined arrays of the entries of all items, and for each entry its first item and its notes.

    entry(begin, members): of the items from number `begin` on.
    """
    starts = range(0, max(1, len(items)), LARGEST)
    wanted = [entry(start, items[start : start + LARGEST]) for start in starts]
    found = {number: _entry(folder, *each) for number, each in enumerate(wanted) if processes.is_mine(number)}
    processes.wait("cache")
    found |= {number: _entry(folder, *each) for number, each in enumerate(wanted) if number not in found}
    parts = [found[number] for number in range(len(wanted))]
    names = next((list(arrays) for arrays, _ in parts if arrays), [])  # an entry whose images are all bad has none
    arrays = {name: joined([arrays[name] for arrays, _ in parts if arrays]) for name in names}
    return arrays, [(start, notes) for start, (_, notes) in zip(starts, parts, strict=True)]


def _entry(
    folder: Path, key: Mapping[str, Any], rows: Iterable[Mapping[str, np.ndarray]], notes: dict[str, Any]
) -> tuple[dict[str, np.memmap], dict[str, Any]]:
    """Returns the arrays and notes of the entry of `key`; see `_Missing`. If there is no good one, it is written."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()
    place = folder / f"{key['kind']}-{digest[:16]}"
    if place.exists():
        try:
            return _open(place)
        except _FAULTS as e:
            log.warning("cache entry %s is damaged (%s) and is computed again", place, e)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    except OSError as e:
        raise DataError(
            f"cannot write the cache in {folder}: {e.strerror or e}; set data.cache to another folder"
        ) from e
    try:
        _write(temporary, rows, notes)
        return _publish(temporary, place)
    except OSError as e:
        raise DataError(f"cannot write the cache in {folder}: {e.strerror or e}") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(temporary: Path, place: Path) -> tuple[dict[str, np.memmap], dict[str, Any]]:
    """Renames a complete entry to its place and opens it, or opens the good entry that another run has put there.

    An entry is never removed while it is good, since other runs may be reading it.
    """
    for _ in range(10):
        try:
            temporary.rename(place)
        except OSError:
            if not place.exists():
                raise
        try:
            return _open(place)
        except _FAULTS:
            aside = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
            with contextlib.suppress(FileNotFoundError):  # another run has moved it away
                place.rename(aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
    raise DataError(f"cache entry {place} is damaged again and again; set data.cache to another folder")


def _write(place: Path, rows: Iterable[Mapping[str, np.ndarray]], notes: dict[str, Any]) -> None:
    """Writes each array's rows to a raw file, then index.json with shapes, number types, digests and notes."""
    index: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    for arrays in rows:
        os.utime(place)  # see `_sweep`
        for name, array in arrays.items():
            entry = index.setdefault(name, {"dtype": array.dtype.name, "shape": [0, *array.shape[1:]]})
            if entry["shape"][1:] != list(array.shape[1:]) or entry["dtype"] != array.dtype.name:
                row = f"{array.dtype}{list(array.shape[1:])}"
                raise DataError(f"{name}: {row} after {entry['dtype']}{entry['shape'][1:]}; rows must be alike")
            entry["shape"][0] += len(array)
            data = np.ascontiguousarray(array).tobytes()
            digests.setdefault(name, hashlib.sha256()).update(data)
            with (place / f"{name}.bin").open("ab") as file:
                file.write(data)
    for name, entry in index.items():
        entry["sha256"] = digests[name].hexdigest()
    (place / "index.json").write_text(json.dumps({"arrays": index, "notes": notes}), encoding="utf-8")


def _open(place: Path) -> tuple[dict[str, np.memmap], dict[str, Any]]:
    """Memory-maps the arrays of an entry. Raises ValueError if a file does not match its digest."""
    index = json.loads((place / "index.json").read_text(encoding="utf-8"))
    arrays = {}
    for name, entry in index["arrays"].items():
        path = place / f"{name}.bin"
        with path.open("rb") as file:  # read each time: `file_digest` would not see damage that keeps the file's times
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{path.name} does not match its digest")
        arrays[name] = np.memmap(path, dtype=entry["dtype"], mode="r", shape=tuple(entry["shape"]))
    return arrays, index["notes"]


def _sweep(folder: Path) -> None:
    """Removes the temporary folders of killed runs. Those changed within a day may belong to a run."""
    for path in folder.glob(".new-*"):
        with contextlib.suppress(FileNotFoundError):  # another run sweeps too
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
