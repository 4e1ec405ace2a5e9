"""Latents (or pixels), masks and prompt embeddings of a data set, computed once and memory-mapped from disk ever after.

A cache entry is a folder named by the digest of all it depends on; it holds one raw file an array and index.json
with their shapes and digests. It is written under another name and renamed when whole, so a killed run leaves nothing
half done, and an entry that no longer matches its digests is computed again.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from sdjax.data.holes import make_holes
from sdjax.data.images import Crop, Size, random_crops, read_image, read_mask
from sdjax.data.records import Record, file_digest
from sdjax.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever what an entry holds changes its meaning."""

Arrays = Mapping[str, Shaped[np.ndarray, " N *S"]]


class Images(NamedTuple):
    """What was made of the readable images of one shape; the arrays may lie on disk."""

    records: tuple[Record, ...]
    arrays: Arrays
    """By name, each `[N, V, ...]`: N images, V views of each, which are its crops, each plain and then mirrored if
    flipping. `moments [N, V, h, w, 2C]` of the VAE's posterior or `pixels [N, V, H, W, 3]`, 8 bits, and
    `mask [N, V, h, w, 1]`, 0 to 1.

    For inpainting each crop has K masks, plain and mirrored with it: `hole [N, V*K, h, w, 1]`, 1 where a latent is
    painted and else 0, and for models that see it `kept [N, V*K, h, w, C]`, the mean of the VAE's posterior (unscaled)
    of the image with the hole in grey. Crop c with its mask k is view c * K + k, times 2 if flipping.
    """
    skipped: tuple[str, ...]
    """One message for each unusable image."""


class Texts(NamedTuple):
    """What the text models (or the tokenizer) made of each caption."""

    rows: Mapping[str, int]
    """Caption -> its row in every array; the empty caption is always there."""
    arrays: Arrays


class Views(NamedTuple):
    """How images become arrays; entries of the cache depend on all of it."""

    size: Size
    background: str = "white"
    flip: bool = False
    crops: int = 0
    """Random crops of each image; 0: its middle."""
    seed: int = 0
    """Of the crops and the holes."""
    holes: int = 0
    """Masks of each crop, for inpainting."""
    full: float = 0.0
    """Share of the random ones that hide everything."""

    def crops_of(self, record: Record) -> tuple[Crop, ...]:
        """The crops of an image."""
        return random_crops(self.crops, seed=self.seed, name=record.name)

    def key(self, records: Iterable[Record], digests: Sequence[str]) -> dict[str, Any]:
        """What identifies the views of these images."""
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
    """The views of every image, from the cache in `folder` or else made now (and cached there).

    They are posterior moments if there is an `encode`, which gets 8-bit images in batches of exactly `batch_size`
    (padded where needed, so it compiles once for a size) and returns `[B, h, w, 2C]`; else the pixels themselves.
    `model` identifies its weights. `progress(done, total)` is called after each batch. Raises DataError for a bad image
    unless `on_bad_image` is "skip"; none may be left then.
    """
    key = views.key(records, [file_digest(record.path) for record in records])
    key |= {"kind": "pixels" if encode is None else "latents", "background": views.background}
    key |= {} if encode is None else {"model": model}
    encode_named = None if encode is None else lambda images: {"moments": encode(images)}
    kept: list[int] = []
    skipped: list[str] = []

    def rows() -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(records), batch_size):
            images = []
            for i in range(start, min(start + batch_size, len(records))):
                record = records[i]
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
                progress(min(start + batch_size, len(records)), len(records))

    arrays, notes = _entry(Path(folder), key, rows(), {"kept": kept, "skipped": skipped})
    if notes["skipped"]:
        if on_bad_image == "fail":
            raise _bad_image(notes["skipped"][0])
        log.warning("%d of %d images skipped", len(notes["skipped"]), len(records))
    return Images(tuple(records[i] for i in notes["kept"]), arrays, tuple(notes["skipped"]))


def cache_masks(images: Images, views: Views, factor: int, *, folder: str | Path) -> Images:
    """`images` with their masks, averaged over the `factor` x `factor` pixels of a latent.

    A mask is the record's own or else the alpha channel of its image. Raises DataError for one that cannot be used.
    """
    sources = [record.mask or record.path for record in images.records]
    alpha = [record.mask is None for record in images.records]
    key = views.key(images.records, [file_digest(path) for path in sources])
    key |= {"kind": "masks", "factor": factor, "alpha": alpha}
    size = Size(*(side // factor for side in views.size))

    def rows() -> Iterator[Mapping[str, np.ndarray]]:
        for record, path, own in zip(images.records, sources, alpha, strict=True):
            mask = read_mask(path, size, views.crops_of(record), alpha=own)
            yield {"mask": _with_mirrored(mask, views.flip)[None]}

    arrays, _ = _entry(Path(folder), key, rows(), {})
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
    """`images` with their masks for inpainting: the arrays that `encode` makes of an image and where it is hidden.

    It works as that of `cache_images` does, and returns `hole` and perhaps `kept` by name, as `Images` says. Raises
    DataError for an own mask that cannot be used.
    """
    records = images.records
    key = views.key(records, [file_digest(record.path) for record in records])
    key |= {"kind": "holes", "model": model, "background": views.background, "holes": views.holes, "full": views.full}
    key |= {"seed": views.seed, "names": [record.name for record in records]}
    key |= {"own": ["" if record.hole is None else file_digest(record.hole) for record in records]}

    def shown(record: Record) -> list[np.ndarray]:
        """Image and mask, view by view."""
        crops = views.crops_of(record)
        pictures = read_image(record.path, views.size, views.background, crops)
        holes = make_holes(record, views.size, crops, count=views.holes, full=views.full, seed=views.seed)
        pairs = np.repeat(pictures, views.holes, axis=0), holes.reshape(-1, *views.size)
        return [_with_mirrored(array, views.flip) for array in pairs]

    def rows() -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(records), batch_size):
            batch = records[start : start + batch_size]
            yield _encoded([shown(record) for record in batch], batch_size, encode)
            if progress:
                progress(start + len(batch), len(records))

    arrays, _ = _entry(Path(folder), key, rows(), {})
    return images._replace(arrays={**images.arrays, **arrays})


def cache_texts(
    captions: Iterable[str],
    encode: Callable[[list[str]], Mapping[str, Any]],
    *,
    folder: str | Path,
    model: str,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
) -> Texts:
    """What `encode` makes of each different caption and of the empty one, from the cache or computed and cached.

    `encode` gets exactly `batch_size` captions (padded with empty ones) and returns named arrays `[B, ...]`, of the
    same shape every time. `model` and `settings` (clip_skip and the like) identify what it computes.
    """
    unique = sorted({"", *captions})
    key = {"kind": "texts", "model": model, "settings": dict(settings or {}), "captions": unique}

    def rows() -> Iterator[Mapping[str, np.ndarray]]:
        for start in range(0, len(unique), batch_size):
            batch = unique[start : start + batch_size]
            encoded = encode(batch + [""] * (batch_size - len(batch)))
            yield {name: _storable(array)[: len(batch)] for name, array in encoded.items()}

    arrays, _ = _entry(Path(folder), key, rows(), {})
    return Texts({caption: row for row, caption in enumerate(unique)}, arrays)


def _encoded(
    images: Sequence[Sequence[np.ndarray]], batch_size: int, encode: Callable[..., Mapping[str, Any]]
) -> dict[str, Shaped[np.ndarray, "N V *S"]]:
    """What `encode` makes of each view of N images, in batches of exactly `batch_size`: the last image fills them up.

    images: of each image the arrays `[V, ...]` that `encode` gets.
    """
    full = [*images, *[images[-1]] * (batch_size - len(images))]
    arguments = [np.stack(arrays, axis=1) for arrays in zip(*full, strict=True)]  # [V, B, ...] each
    made = [encode(*view) for view in zip(*arguments, strict=True)]
    return {name: np.stack([_storable(view[name]) for view in made], axis=1)[: len(images)] for name in made[0]}


def _with_mirrored(pictures: Shaped[np.ndarray, "V H W *C"], flip: bool) -> Shaped[np.ndarray, "F H W *C"]:
    """Each crop, followed by itself mirrored if `flip`."""
    return np.stack([pictures, pictures[:, :, ::-1]], axis=1).reshape(-1, *pictures.shape[1:]) if flip else pictures


def _bad_image(reason: object) -> DataError:
    return DataError(f"{reason} (data.on_bad_image = 'skip' goes on without it)")


def _storable(array: Any) -> np.ndarray:
    """On the host, in a number type NumPy itself knows: bfloat16 is widened."""
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array


def _entry(
    folder: Path, key: Mapping[str, Any], rows: Iterable[Mapping[str, np.ndarray]], notes: dict[str, Any]
) -> tuple[dict[str, np.memmap], dict[str, Any]]:
    """The arrays and notes kept under `key`; if there are none, `rows` (which may fill `notes`) is run and kept."""
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()
    place = folder / f"{key['kind']}-{digest[:16]}"
    if place.exists():
        try:
            return _open(place)
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("cache %s is damaged (%s): computed again", place, e)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    except OSError as e:
        raise DataError(f"cannot write the cache in {folder}: {e.strerror or e}; set data.cache") from e
    try:
        _write(temporary, rows, notes)
        if place.exists():
            shutil.rmtree(place)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _open(place)


def _write(place: Path, rows: Iterable[Mapping[str, np.ndarray]], notes: dict[str, Any]) -> None:
    """Append the rows to one raw file an array, then write index.json: shapes, number types, digests, notes."""
    index: dict[str, dict[str, Any]] = {}
    digests: dict[str, Any] = {}
    for arrays in rows:
        for name, array in arrays.items():
            entry = index.setdefault(name, {"dtype": array.dtype.name, "shape": [0, *array.shape[1:]]})
            if entry["shape"][1:] != list(array.shape[1:]) or entry["dtype"] != array.dtype.name:
                raise DataError(f"{name}: {array.dtype}{list(array.shape[1:])} a row after {entry}; rows must be alike")
            entry["shape"][0] += len(array)
            data = np.ascontiguousarray(array).tobytes()
            digests.setdefault(name, hashlib.sha256()).update(data)
            with (place / f"{name}.bin").open("ab") as file:
                file.write(data)
    for name, entry in index.items():
        entry["sha256"] = digests[name].hexdigest()
    (place / "index.json").write_text(json.dumps({"arrays": index, "notes": notes}), encoding="utf-8")


def _open(place: Path) -> tuple[dict[str, np.memmap], dict[str, Any]]:
    """Memory-map an entry after comparing every digest; ValueError if one differs."""
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
    """Remove what killed runs left behind; a day old, so that no other run is still writing it."""
    for path in folder.glob(".new-*"):
        if time.time() - path.stat().st_mtime > 86400:
            shutil.rmtree(path, ignore_errors=True)
