"""Reads tars in the layout of WebDataset: NAME.jpg with its caption in NAME.txt or NAME.json. Nothing is extracted."""

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sdjax.data.files import Found
from sdjax.data.images import SUFFIXES
from sdjax.errors import DataError
from sdjax.runtime import strict_json

log = logging.getLogger(__name__)

CAPTIONS = ("caption", "text", "prompt")
"""Keys of a .json file that hold a caption, unless a setting names one."""

LARGEST = 1 << 28
"""Bytes. A larger member is refused, since it would be read whole."""


class TarReader:
    """Reads one tar. The place of a picture is its first byte and its length."""

    def __init__(self, path: Path, caption: str = "") -> None:
        """caption: key of the .json files that holds the captions; empty: the first of CAPTIONS."""
        self._path, self._keys = path, (caption,) if caption else CAPTIONS

    def pictures(self) -> Iterator[Found]:
        """Reads all pictures, in the order of the tar.

        A member's name ends at the first dot of its last part; what follows is its kind. Members of other kinds, and
        links, are left out. Raises DataError for a damaged, cut off or compressed tar, and for two pictures of a name.
        """
        captions: dict[str, str] = {}
        found: dict[str, tuple[str, tuple[int, int]]] = {}
        for member, name, kind in self._members():
            place = (member.offset_data, member.size)
            if kind in SUFFIXES:
                if name in found:
                    raise DataError(f"{self._path} holds {name} twice: {found[name][0]} and {member.name}")
                found[name] = f"{name}{kind}", place
            elif kind == ".txt":
                captions[name] = self._text(member.name, place).strip() or captions.get(name, "")
            elif kind == ".json":
                captions.setdefault(name, self._caption(member.name, place))
        for name, (key, place) in found.items():
            yield Found(key, captions.get(name, ""), place, self.read(place))

    def read(self, place: tuple[int, int]) -> bytes:
        """Reads one member."""
        start, length = place
        if length > LARGEST:
            raise DataError(f"{self._path}: a member of {length} bytes; at most {LARGEST} are possible")
        try:
            with self._path.open("rb") as file:
                content = os.pread(file.fileno(), length, start)
        except OSError as e:
            raise DataError(f"{self._path}: {e.strerror or e}") from None
        if len(content) < length:
            raise DataError(f"{self._path} is cut off")
        return content

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
        """The regular members, each with its name and its kind, such as .jpg."""
        try:
            with self._path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                while member := tar.next():
                    # Otherwise all of them would stay in memory.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                    folder, _, base = member.name.removeprefix("./").rpartition("/")
                    stem, dot, kind = base.partition(".")
                    if stem and member.isreg() and not member.issparse():
                        yield member, f"{folder}/{stem}" if folder else stem, f"{dot}{kind.lower()}"
                self._check_end(file, tar.offset)
        except (tarfile.TarError, EOFError) as e:
            raise DataError(f"{self._path} is no readable tar: {e} (compressed tars are not read)") from None
        except OSError as e:
            raise DataError(f"{self._path}: {e.strerror or e}") from None

    def _check_end(self, file: BinaryIO, end: int) -> None:
        """Raises DataError unless the rest of the file is zeros: tarfile takes a damaged header for the end."""
        file.seek(end)
        rest = file.read(1 << 20)
        if not rest:
            raise DataError(f"{self._path} is cut off: it has no end mark")
        while rest:
            if rest.strip(b"\0"):
                raise DataError(f"{self._path} is damaged at byte {end}, or several tars were joined to one")
            rest = file.read(1 << 20)

    def _text(self, name: str, place: tuple[int, int]) -> str:
        """The text of a member; empty if it is not UTF-8."""
        try:
            return self.read(place).decode("utf-8-sig")
        except UnicodeDecodeError:
            log.warning("%s: %s is not UTF-8: counted as missing", self._path, name)
            return ""

    def _caption(self, name: str, place: tuple[int, int]) -> str:
        """The caption in a .json member; empty if it has none."""
        try:
            entry: Any = strict_json.parse(self._text(name, place) or "{}")
        except ValueError as e:
            raise DataError(f"{self._path}: {name} is not JSON: {e}") from None
        values = [entry[key] for key in self._keys if entry.get(key)] if isinstance(entry, dict) else []
        if values and not isinstance(values[0], str):
            raise DataError(f"{self._path}: the caption of {name} is not text: {str(values[0])[:40]}")
        return values[0].strip() if values else ""
