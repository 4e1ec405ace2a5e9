"""Reads a folder of pictures: their names and captions, in metadata.jsonl or in text files beside them."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sdjax.data.images import SUFFIXES
from sdjax.errors import DataError
from sdjax.runtime import strict_json

log = logging.getLogger(__name__)

METADATA = "metadata.jsonl"


def captions_in(root: Path) -> list[tuple[str, str]]:
    """The names of the images of a folder and its sub-folders with their captions, perhaps empty, sorted by name.

    If the folder has a metadata.jsonl, with `{"file_name": ..., "text": ...}` on each line, the images are those that
    it lists, also if such a file does not exist. Otherwise every image counts, and NAME.txt beside NAME.png holds its
    caption. A caption that is absent, blank or not UTF-8 is empty. Nothing outside the folder is read.

    root: without links. Raises DataError for a path or link that leaves the folder, and for a malformed line of
    metadata.jsonl.
    """
    metadata = root / METADATA
    return sorted(_from_metadata(root, metadata) if metadata.is_file() else _from_text_files(root))


def _from_metadata(root: Path, metadata: Path) -> list[tuple[str, str]]:
    """The images that metadata.jsonl lists. A file that does not exist is included: reading it raises an error."""
    captions: dict[str, str] = {}
    try:
        # Lines end only at \n: a caption may hold U+2028, where splitlines would cut.
        with metadata.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{metadata} line {number}"
                try:
                    entry = strict_json.parse(line.removesuffix("\n"))
                except ValueError as e:
                    raise DataError(f"{where} is not JSON: {e}") from None
                if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                    raise DataError(f'{where}: expected {{"file_name": ..., "text": ...}}')
                text = entry.get("text") or ""
                if not isinstance(text, str):
                    raise DataError(f"{where}: text = {text!r} is not text")
                name = inside(root, root / entry["file_name"], where).relative_to(root).as_posix()
                if name in captions:
                    raise DataError(f"{where}: {name} is listed twice")
                captions[name] = text.strip()
    except UnicodeDecodeError:
        raise DataError(f"{metadata} is not UTF-8") from None
    except OSError as e:
        raise DataError(f"{metadata}: {e.strerror or e}") from None
    unlisted = sum(name not in captions for name in image_names(root))
    if unlisted:
        log.info("%s: %d images are not in metadata.jsonl and are left out", root, unlisted)
    return list(captions.items())


def _from_text_files(root: Path) -> Iterator[tuple[str, str]]:
    """All images of a folder, with the captions in the text files beside them."""
    for name in image_names(root):
        path = root / name
        text = path.with_suffix(".txt")
        for each in (path, text):
            if each.is_symlink():  # no folder below the root is a link, since those are not followed
                inside(root, each, str(root))
        try:
            yield name, text.read_text(encoding="utf-8-sig").strip()
        except (FileNotFoundError, IsADirectoryError):
            yield name, ""
        except UnicodeDecodeError:
            log.warning("%s is not UTF-8: counted as missing", text)
            yield name, ""
        except OSError as e:
            raise DataError(f"{text}: {e.strerror or e}") from None


def takes_all_below(folder: str | Path, inner: str | Path) -> bool:
    """Whether a folder of pictures would also take the images that are written to `inner`."""
    root = Path(folder).resolve()
    return Path(inner).resolve().is_relative_to(root) and not (root / METADATA).is_file()


def images_below(root: Path) -> set[Path]:
    """The image files in a folder and its sub-folders, known by their suffix, without hidden ones."""
    return {root / name for name in image_names(root)}


def image_names(root: Path) -> Iterator[str]:
    """The names of these files, with forward slashes, relative to the folder."""
    return files_below(root, SUFFIXES)


def files_below(root: Path, suffixes: frozenset[str]) -> Iterator[str]:
    """The names, relative to the folder, of the files below it that end so, in any case. Hidden ones are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(folder).relative_to(root).as_posix()
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield name if relative == "." else f"{relative}/{name}"


def inside(root: Path, path: Path, where: str) -> Path:
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
