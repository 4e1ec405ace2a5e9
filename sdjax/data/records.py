"""The records of a data set: pictures with their captions. Chooses those that are held out."""

import fnmatch
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, TypeVar, cast, overload

import numpy as np
from jaxtyping import Int, Int32

from sdjax.data import sources
from sdjax.data.files import File, file_digest
from sdjax.data.folder import images_below, inside
from sdjax.data.images import SUFFIXES
from sdjax.data.order import MOST_REPEATS
from sdjax.data.sources import Columns
from sdjax.data.strings import Strings
from sdjax.errors import DataError

log = logging.getLogger(__name__)

MOST_NAMED = 10_000
"""Most images that a fingerprint names one by one."""


class Record(NamedTuple):
    """One training example."""

    name: str
    """Path of the image relative to the data folder, with forward slashes. For a shard, the key follows its path."""
    file: File
    caption: str
    repeats: int = 1
    """How often an epoch shows the image, 1 or more."""
    mask: Path | None = None
    """Mask file: white where the image is learned."""
    hole: Path | None = None
    """Mask file for inpainting: white where the image is painted."""
    versions: tuple[str, ...] = ()
    """The versions of the caption that training shows; empty: the caption itself."""

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions that training shows, at least one."""
        return self.versions or (self.caption,)


@dataclass(frozen=True, eq=False)
class Records(Sequence[Record]):
    """Many records in arrays: about 50 bytes each beside their texts. A record is made when it is asked for."""

    names: Strings
    captions: Strings
    repeats: Int32[np.ndarray, " N"]
    rows: Int[np.ndarray, " N"]
    """Their numbers in the source."""
    file: Callable[[int, str], File]
    """The picture of a row of the source, by its name."""
    masks: Strings | None = None
    holes: Strings | None = None
    versions: Callable[[str], tuple[str, ...]] | None = None
    """The versions of a caption that training shows. None: the caption itself."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: Any) -> "Records": ...
    def __getitem__(self, index: Any) -> "Record | Records":
        names, captions, repeats = self.names[index], self.captions[index], self.repeats[index]
        masks, holes = (None if paths is None else paths[index] for paths in (self.masks, self.holes))
        if isinstance(names, Strings):
            changes: Any = {"names": names, "captions": captions, "repeats": repeats, "rows": self.rows[index]}
            return replace(self, **changes, masks=masks, holes=holes)
        return Record(
            names,
            self.file(int(self.rows[index]), names),
            str(captions),
            int(repeats),
            mask=None if masks is None else Path(str(masks)),
            hole=None if holes is None else Path(str(holes)),
            versions=self.versions(str(captions)) if self.versions else (),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)


Many = TypeVar("Many", bound=Sequence[Record])


def chosen(records: Many, rows: Sequence[int] | np.ndarray) -> Many:
    """Some of the records, by their numbers."""
    several: Any = records
    if isinstance(records, Records):
        return several[np.asarray(rows, np.int64)]
    return cast(Many, tuple(several[row] for row in rows))


def together(parts: Sequence[Sequence[Record]]) -> Sequence[Record]:
    """The records of several parts of a data set, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    if not all(isinstance(part, Records) for part in parts):
        return tuple(record for part in parts for record in part)
    kept: list[Records] = [part for part in parts if isinstance(part, Records)]
    texts = lambda values: None if values[0] is None else Strings.joined(values)
    return replace(
        kept[0],
        names=texts([part.names for part in kept]),
        captions=texts([part.captions for part in kept]),
        repeats=np.concatenate([part.repeats for part in kept]),
        rows=np.concatenate([part.rows for part in kept]),
        masks=texts([part.masks for part in kept]),
        holes=texts([part.holes for part in kept]),
    )


def captions_of(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """The captions of each record that training shows."""
    if isinstance(records, Records):
        return ((text,) if records.versions is None else records.versions(text) for text in records.captions)
    return (record.captions for record in records)


def repeats_of(records: Sequence[Record]) -> Int32[np.ndarray, " N"]:
    """How often an epoch shows each image."""
    if isinstance(records, Records):
        return records.repeats
    return np.array([record.repeats for record in records], np.int32)


def scan(
    path: str | Path,
    *,
    caption: str = "",
    missing_caption: Literal["fail", "empty", "skip", "folder", "unused"] = "fail",
    repeats: Mapping[str, int] | None = None,
    columns: Columns = Columns(),  # noqa: B008
    keep: Path | None = None,
    setting: str = "data.path",
) -> Records:
    """The images of a source with their captions; see `sources.find`, also for columns, keep and setting.

    caption: the caption of images that have none.
    missing_caption: what happens to images that still have none. With "folder", their caption is the name of their
    sub-folder, and images in a sub-folder called N_NAME are shown N times an epoch, at most MOST_REPEATS. With
    "unused", no caption matters.
    repeats: pattern (fnmatch) over names -> how often an epoch shows the image, 0 to leave it out. The first pattern
    that matches counts, instead of N.

    Raises DataError for a source that cannot be read or has no images, and for missing captions as `missing_caption`
    says.
    """
    repeats = repeats or {}
    source = sources.find(path, columns=columns, keep=keep, setting=setting)
    root, captions = source.place, source.captions
    if missing_caption == "folder":
        folders = [_from_folder_name(name) for name in source.names]
        named = Strings.of(own or caption or folder for own, (_, folder) in zip(captions, folders, strict=True))
        numbers = [int(number) for number, _ in folders]
    else:
        named, numbers = captions.filled(caption) if caption else captions, []
    times = _times(source, repeats, numbers)
    lacking = (named.starts == named.ends) & (times > 0)
    missing = source.names[lacking]
    if missing_caption not in ("empty", "unused"):
        times[lacking] = 0
    for pattern in repeats:
        if not fnmatch.filter(source.names, pattern):
            log.warning("data.repeats: no image in %s matches %s", root, pattern)
    if missing and missing_caption in ("fail", "folder"):
        raise DataError(
            f"{root}: no caption for {_some(missing)}; "
            "write NAME.txt or metadata.jsonl, set data.caption, or data.missing_caption = 'empty' or 'skip'"
            + (" (these images are in no sub-folder)" if missing_caption == "folder" else "")
        )
    if missing and missing_caption != "unused":
        action = "skipped" if missing_caption == "skip" else "taken with an empty caption"
        log.warning("%s: no caption for %s: %s", root, _some(missing), action)
    rows = np.flatnonzero(times)
    if not len(rows):
        raise DataError(f"{root}: no images with captions; expected {', '.join(sorted(SUFFIXES))} files")
    return Records(source.names[rows], named[rows], times[rows], rows, source.file)


def _times(source: sources.Listing, repeats: Mapping[str, int], numbers: Sequence[int]) -> Int32[np.ndarray, " N"]:
    """How often an epoch shows each image. numbers: what the names of the folders say, if that counts."""
    times = np.ones(len(source.names), np.int32)
    for row, name in enumerate(source.names) if repeats or numbers else ():
        pattern = next((p for p in repeats if fnmatch.fnmatchcase(name, p)), None)
        number = numbers[row] if numbers else 1
        if pattern is None and number > MOST_REPEATS:
            raise DataError(
                f"{source.place}: the folder {PurePosixPath(name).parent.name!r} asks for each image {number} times, "
                f"at most {MOST_REPEATS} are possible: rename it, or set data.repeats"
            )
        times[row] = number if pattern is None else repeats[pattern]
    return times


def with_masks(records: Many, folder: str | Path, field: Literal["mask", "hole"] = "mask") -> Many:
    """The records, each with the image of the same name (and any suffix) below `folder` as its mask file `field`.

    Raises DataError for a folder that does not exist, an image without a mask, and a link that leaves the folder.
    """
    setting, white = {"mask": ("mask_path", "learns"), "hole": ("inpaint_mask_path", "paints")}[field]
    root = Path(folder).resolve()
    if not root.is_dir():
        raise DataError(f"data.{setting} = {str(folder)!r} is not a folder")
    masks = {
        path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(images_below(root), reverse=True)
    }
    names = records.names if isinstance(records, Records) else [record.name for record in records]
    stem = lambda name: PurePosixPath(name).with_suffix("").as_posix()
    missing = [name for name in names if stem(name) not in masks]
    if missing:
        raise DataError(f"{root}: no mask for {_some(missing)}; a white image of that name {white} all of it")
    paths = (inside(root, masks[stem(name)], str(root)) for name in names)
    several: Any = records
    if isinstance(records, Records):
        return replace(several, **{f"{field}s": Strings.of(map(str, paths))})
    return cast(Many, tuple(record._replace(**{field: path}) for record, path in zip(several, paths, strict=True)))


def split(records: Many, *, count: int = 0, fraction: float = 0.0) -> tuple[Many, Many]:
    """The training records and the held-out records, both in the order of `records`.

    The held-out ones depend on the names alone (those with the smallest hashes), so adding an image moves few others.
    count: number of held-out records. fraction: their share instead, rounded to at least one record. Raises DataError
    if no record would be left to train on.
    """
    if fraction:
        count = max(1, round(fraction * len(records)))
    if count >= len(records):
        raise DataError(f"{count} of {len(records)} images held out: nothing left to train on")
    names = records.names if isinstance(records, Records) else [record.name for record in records]
    hashes = np.array([hashlib.sha256(name.encode(errors="surrogateescape")).digest() for name in names], "S32")
    held_out = np.zeros(len(names), bool)
    held_out[np.argsort(hashes)[:count]] = True
    return chosen(records, np.flatnonzero(~held_out)), chosen(records, np.flatnonzero(held_out))


def fingerprint(records: Iterable[Record]) -> dict[str, str]:
    """Name -> digest of the caption, image and masks. Any change alters it; the machine and the folder do not.

    Of more than MOST_NAMED records, those in one shard or folder have one digest under its name.
    """
    digests: dict[str, str] = {}
    groups: dict[str, Any] = {}
    for record in records:
        masks = [] if record.mask is None else [file_digest(record.mask)]
        masks += [] if record.hole is None else ["hole", file_digest(record.hole)]
        content = json.dumps([record.name, record.caption, file_digest(record.file), *masks])
        digest = hashlib.sha256(content.encode()).hexdigest()[:20]
        groups.setdefault(record.name.rpartition("/")[0] or ".", hashlib.sha256()).update(digest.encode())
        if len(digests) <= MOST_NAMED:
            digests[record.name] = digest
    if len(digests) <= MOST_NAMED:
        return digests
    return {name: digest.hexdigest()[:20] for name, digest in groups.items()}


def _from_folder_name(name: str) -> tuple[str, str]:
    """The repeats and the caption of an image by its sub-folder: 1 and cat for cat/, 3 and cat for 3_cat/."""
    folder = Path(name).parent.name
    number, caption = re.fullmatch(r"(?:(\d+)_)?(.*)", folder, re.DOTALL).groups()  # type: ignore[union-attr]
    return number or "1", caption.strip()


def _some(names: Sequence[str], most: int = 3) -> str:
    """The names for a message; of many, their number and the first `most`."""
    shown = ", ".join(names[i] for i in range(min(most, len(names))))
    return shown if len(names) <= most else f"{len(names)} images ({shown}, ...)"
