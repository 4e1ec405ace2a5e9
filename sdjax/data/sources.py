"""Finds where the pictures of a data set lie: in a folder, or in shards, which are parquet or tar files.

A source is a `Listing`: it names pictures with their captions and gives the file of each. Nothing else in sdjax knows
where a picture came from.
"""

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sdjax.data.files import MANY, File, learn
from sdjax.data.folder import METADATA, captions_in, files_below, image_names
from sdjax.data.shards import READERS, Columns, Shard, index
from sdjax.data.strings import Strings
from sdjax.errors import DataError

_PACKAGE = Path(__file__).parent.parent

_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "eval")
"""Words by which names of shards tell the parts of a data set apart."""


class Listing(NamedTuple):
    """The pictures of a source."""

    place: Path
    """For messages."""
    names: Strings
    captions: Strings
    """Empty where a picture has none of its own."""
    file: Callable[[int, str], File]
    """The file of a picture, by its number and name."""


def find(path: str | Path, *, columns: Columns, keep: Path | None = None, setting: str = "data.path") -> Listing:
    """The pictures of `path`: a folder of pictures or of shards, one shard, or a pattern (glob) for several.

    A folder of shards holds `.parquet` or `.tar` files, also in sub-folders, and no pictures beside them. The pictures
    that come with sdjax, such as `sdjax/tiny/samples`, are found from everywhere.

    Shards may be links that lead elsewhere, as in the hub's own cache; pictures of a folder may not.

    columns: those of parquet files that are read. keep: the folder where what is read from many pictures is kept for
    the next start; None: nowhere. setting: names `path` in messages.

    Raises DataError for a path without pictures or shards, and for what `folder.captions_in` and `shards.index` refuse.
    """
    root = Path(path).resolve()
    if not root.exists() and Path(path).parts[:2] == ("sdjax", "tiny"):
        root = _PACKAGE.parent / path
    named = f"{setting} = {str(path)!r}"
    if root.is_file():
        return _of_shards(root, [Shard(root, root.name)], columns, keep, named)
    if not root.exists() and glob.has_magic(str(path)):
        shards = _matching(str(path))
        if not shards:
            raise DataError(f"{named} matches no file")
        return _of_shards(root, shards, columns, keep, named)
    if not root.is_dir():
        raise DataError(f"{named} is not a folder, a .parquet or .tar file, or a pattern for such files")
    names = [] if (root / METADATA).is_file() else sorted(files_below(root, frozenset(READERS)))
    if not names:
        return _of_folder(root, keep)
    if picture := next(image_names(root), None):
        raise DataError(
            f"{named} holds pictures ({picture}) and shards ({names[0]}): name the shards by a pattern such as "
            f"'{path}/*{PurePosixPath(names[0]).suffix}', or move one of them elsewhere"
        )
    parts = {word: name for name in reversed(names) for word in _SPLITS if word in re.split(r"[-_./]", name.lower())}
    if len(parts) > 1:
        raise DataError(
            f"{named} holds several parts of a data set ({', '.join(sorted(parts))}): name one by a pattern such as "
            f"'{path}/{_pattern(next(iter(parts.items())))}'"
        )
    return _of_shards(root, [Shard(root / name, name) for name in names], columns, keep, named)


def _pattern(part: tuple[str, str]) -> str:
    """A pattern for the shards of a part, from its word and the name of one of them."""
    word, name = part
    return name[: name.lower().index(word) + len(word)] + "*" + PurePosixPath(name).suffix


def _matching(pattern: str) -> list[Shard]:
    """The files that match a pattern, named from the folder before its first special character."""
    fixed = Path(re.split(r"[*?[]", pattern)[0] + "x").parent
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    return [Shard(path.absolute(), path.relative_to(fixed).as_posix()) for path in found if path.is_file()]


def _of_folder(root: Path, keep: Path | None) -> Listing:
    listed = captions_in(root)
    if keep is not None and len(listed) >= MANY:
        learn([root / name for name, _ in listed], keep)
    return Listing(
        root,
        Strings.of(name for name, _ in listed),
        Strings.of(caption for _, caption in listed),
        lambda _, name: root / name,
    )


def _of_shards(place: Path, shards: Sequence[Shard], columns: Columns, keep: Path | None, named: str) -> Listing:
    kinds = {shard.path.suffix.lower() for shard in shards}
    if unknown := kinds - set(READERS):
        other = next(shard.name for shard in shards if shard.path.suffix.lower() in unknown)
        raise DataError(f"{named}: {other} is not a shard; expected {' or '.join(READERS)}")
    if len(kinds) > 1:
        raise DataError(f"{named} holds both .parquet and .tar files: name one kind by a pattern")
    return Listing(place, *index(shards, columns, keep))
