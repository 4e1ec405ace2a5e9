"""Reads a folder of images as a list of records (image and caption), and chooses those that are held out."""

import fnmatch
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from sdjax.errors import DataError
from sdjax.runtime import strict_json

log = logging.getLogger(__name__)

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})

MOST_REPEATS = 9999
"""How often an epoch may show an image. A larger number before the name of a folder is a date, or a mistake."""


_PACKAGE = Path(__file__).parent.parent


class Record(NamedTuple):
    """One training example."""

    name: str
    """Path of the image relative to the data folder, with forward slashes."""
    path: Path
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


def scan(
    folder: str | Path,
    *,
    caption: str = "",
    missing_caption: Literal["fail", "empty", "skip", "folder", "unused"] = "fail",
    repeats: Mapping[str, int] | None = None,
) -> tuple[Record, ...]:
    """The images of a folder and its sub-folders with their captions, sorted by name.

    If the folder has a metadata.jsonl, with `{"file_name": ..., "text": ...}` on each line, the images are those that
    it lists. Otherwise every image counts, and NAME.txt beside NAME.png holds its caption. A caption that is absent,
    blank or not UTF-8 is missing. Nothing outside the folder is read. The pictures that come with sdjax, such as
    `sdjax/tiny/samples`, are found from everywhere.

    caption: the caption of images that have none.
    missing_caption: what happens to images that still have none. With "folder", their caption is the name of their
    sub-folder, and images in a sub-folder called N_NAME are shown N times an epoch, at most MOST_REPEATS. With
    "unused", no caption matters.
    repeats: pattern (fnmatch) over names -> how often an epoch shows the image, 0 to leave it out. The first pattern
    that matches counts, instead of N.

    Raises DataError for a folder that does not exist or has no images, for missing captions as `missing_caption` says,
    for a path or link that leaves the folder, and for a malformed line of metadata.jsonl.
    """
    repeats = repeats or {}
    root = Path(folder).resolve()
    if not root.is_dir() and Path(folder).parts[:2] == ("sdjax", "tiny"):
        root = _PACKAGE.parent / folder
    if not root.is_dir():
        raise DataError(f"data.path = {str(folder)!r} is not a folder")
    metadata = root / "metadata.jsonl"
    captioned = _from_metadata(root, metadata) if metadata.is_file() else _from_text_files(root)
    records, missing = [], []
    for name, (path, own_caption) in sorted(captioned.items()):
        number, folder_caption = _from_folder_name(name) if missing_caption == "folder" else ("1", "")
        pattern = next((p for p in repeats if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None and int(number) > MOST_REPEATS:
            raise DataError(
                f"{root}: the folder {Path(name).parent.name!r} asks for each image {number} times, at most "
                f"{MOST_REPEATS} are possible: rename it, or set data.repeats"
            )
        times = int(number) if pattern is None else repeats[pattern]
        if not times:
            continue
        text = own_caption or caption or folder_caption
        if not text:
            missing.append(name)
        if text or missing_caption in ("empty", "unused"):
            records.append(Record(name, path, text, times))
    for pattern in repeats:
        if not fnmatch.filter(captioned, pattern):
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
    if not records:
        raise DataError(f"{root}: no images with captions; expected {', '.join(sorted(SUFFIXES))} files")
    return tuple(records)


def with_masks(
    records: Iterable[Record], folder: str | Path, field: Literal["mask", "hole"] = "mask"
) -> tuple[Record, ...]:
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
    records = tuple(records)
    stems = [Path(record.name).with_suffix("").as_posix() for record in records]
    missing = [record.name for record, stem in zip(records, stems, strict=True) if stem not in masks]
    if missing:
        raise DataError(f"{root}: no mask for {_some(missing)}; a white image of that name {white} all of it")
    return tuple(
        record._replace(**{field: _inside(root, masks[stem], str(root))})
        for record, stem in zip(records, stems, strict=True)
    )


def split(
    records: Sequence[Record], *, count: int = 0, fraction: float = 0.0
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The training records and the held-out records, both in the order of `records`.

    The held-out ones depend on the names alone (those with the smallest hashes), so adding an image moves few others.
    count: number of held-out records. fraction: their share instead, rounded to at least one record. Raises DataError
    if no record would be left to train on.
    """
    if fraction:
        count = max(1, round(fraction * len(records)))
    if count >= len(records):
        raise DataError(f"{count} of {len(records)} images held out: nothing left to train on")
    ranked = sorted(records, key=lambda r: hashlib.sha256(r.name.encode()).digest())
    held_out = {record.name for record in ranked[:count]}
    return (
        tuple(r for r in records if r.name not in held_out),
        tuple(r for r in records if r.name in held_out),
    )


def fingerprint(records: Iterable[Record]) -> dict[str, str]:
    """Name -> digest of the caption, image and masks. Any change alters it; the machine and the folder do not."""
    digests = {}
    for record in records:
        masks = [] if record.mask is None else [file_digest(record.mask)]
        masks += [] if record.hole is None else ["hole", file_digest(record.hole)]
        content = json.dumps([record.name, record.caption, file_digest(record.path), *masks])
        digests[record.name] = hashlib.sha256(content.encode()).hexdigest()[:20]
    return digests


_digests: dict[Path, tuple[tuple[int, ...], str]] = {}  # absolute path -> state of the file and its digest


def file_digest(path: Path) -> str:
    """The sha256 of a file's contents; the empty string for a file that cannot be read, which its decoder will report.

    A process reads a file once, and again after the file's inode, size or times have changed. A file changed less than
    two seconds ago is always read, since a file system may give two changes in quick succession the same time. Threads
    may call this at the same time; at worst, two of them read the same file.
    """
    path = path.absolute()
    try:
        stat = path.stat()
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known, digest = _digests.get(path, (None, ""))
        if known != state:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if time.time() - stat.st_mtime > 2:
                _digests[path] = state, digest
        return digest
    except OSError:
        return ""


def _from_folder_name(name: str) -> tuple[str, str]:
    """The repeats and the caption of an image by its sub-folder: 1 and cat for cat/, 3 and cat for 3_cat/."""
    folder = Path(name).parent.name
    number, caption = re.fullmatch(r"(?:(\d+)_)?(.*)", folder, re.DOTALL).groups()  # type: ignore[union-attr]
    return number or "1", caption.strip()


_Captioned = dict[str, tuple[Path, str]]  # name -> path and caption, which may be empty


def _from_metadata(root: Path, metadata: Path) -> _Captioned:
    """The images that metadata.jsonl lists. A file that does not exist is included: reading it raises an error."""
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 in a caption
    except UnicodeDecodeError:
        raise DataError(f"{metadata} is not UTF-8") from None
    except OSError as e:
        raise DataError(f"{metadata}: {e.strerror or e}") from None
    captioned: _Captioned = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{metadata} line {number}"
        try:
            entry = strict_json.parse(line)
        except ValueError as e:
            raise DataError(f"{where} is not JSON: {e}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise DataError(f'{where}: expected {{"file_name": ..., "text": ...}}')
        text = entry.get("text") or ""
        if not isinstance(text, str):
            raise DataError(f"{where}: text = {text!r} is not text")
        path = _inside(root, root / entry["file_name"], where)
        name = path.relative_to(root).as_posix()
        if name in captioned:
            raise DataError(f"{where}: {name} is listed twice")
        captioned[name] = (path, text.strip())
    unlisted = len(images_below(root).difference(path for path, _ in captioned.values()))
    if unlisted:
        log.info("%s: %d images are not in metadata.jsonl and are left out", root, unlisted)
    return captioned


def _from_text_files(root: Path) -> _Captioned:
    """All images of a folder, with the captions in the text files beside them."""
    captioned: _Captioned = {}
    for path in images_below(root):
        name = path.relative_to(root).as_posix()
        _inside(root, path, str(root))
        text = path.with_suffix(".txt")
        captioned[name] = (path, "")
        if text.is_file():
            _inside(root, text, str(root))
            try:
                captioned[name] = (path, text.read_text(encoding="utf-8-sig").strip())
            except UnicodeDecodeError:
                log.warning("%s is not UTF-8: counted as missing", text)
            except OSError as e:
                raise DataError(f"{text}: {e.strerror or e}") from None
    return captioned


def takes_all_below(folder: str | Path, inner: str | Path) -> bool:
    """Whether `scan` of a folder would also take the images that are written to `inner`."""
    root = Path(folder).resolve()
    return Path(inner).resolve().is_relative_to(root) and not (root / "metadata.jsonl").is_file()


def images_below(root: Path) -> set[Path]:
    """The image files in a folder and its sub-folders, known by their suffix, without hidden ones."""
    return {
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not path.is_dir()
    }


def _inside(root: Path, path: Path, where: str) -> Path:
    """`path` without links and dots. Raises DataError if it is not inside `root`, which must have none either."""
    try:
        resolved = path.resolve()
        if any(len(part.encode()) > 255 for part in path.parts):
            raise ValueError("too long")
    except (OSError, ValueError, RuntimeError) as e:  # a null byte, a name that is too long, links in a circle
        raise DataError(f"{where}: {path.name[:100]!r} is no name of a file: {e}") from None
    if not resolved.is_relative_to(root):
        raise DataError(f"{where}: {path.name!r} leads out of the folder; copy the file into {root}")
    return resolved


def _some(names: Sequence[str], most: int = 3) -> str:
    """The names for a message; of many, their number and the first `most`."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{len(names)} images ({shown}, ...)"
