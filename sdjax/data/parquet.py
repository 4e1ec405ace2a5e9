"""Reads parquet files with a column of pictures and one of captions, as data sets on the Hugging Face hub have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdjax.data.files import Found
from sdjax.errors import ConfigError, DataError

IMAGES = ("image", "jpg", "png", "webp", "img", "picture")
"""Columns that hold pictures, unless a setting names one. Otherwise the only column of bytes is taken."""

CAPTIONS = ("text", "caption", "prompt", "txt")
"""Columns that hold captions, unless a setting names one."""

_AT_ONCE = 64
"""Rows that are read at a time."""

_BUFFER = 1 << 20
"""Bytes that are read from the file at a time. Otherwise a whole column of a row group would be in memory."""


class ParquetReader:
    """Reads one parquet file. The place of a picture is its row group, and its row in that."""

    def __init__(self, path: Path, image: str = "", caption: str = "") -> None:
        """image, caption: names of the columns; empty: the first of IMAGES and CAPTIONS that is there.

        Raises ConfigError without pyarrow, and DataError for a file without these columns.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ConfigError(f'{path.name} is read by pyarrow: pip install "sdjax[data]"') from None
        self._path = path
        self._errors = (pa.ArrowException, OSError, UnicodeDecodeError)
        try:
            self._file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        except self._errors as e:
            raise self._damaged(e) from None
        types = {field.name: field.type for field in self._file.schema_arrow}
        self._image = self._choose("data.image_column", image, types, IMAGES)
        self._caption = self._choose("data.caption_column", caption, types, CAPTIONS)
        if not self._image:
            pictures = [name for name, kind in types.items() if _holds_pictures(kind)]
            if len(pictures) != 1:
                raise self._no_column("data.image_column", "pictures", types)
            self._image = pictures[0]
        if not _holds_pictures(types[self._image]):
            raise DataError(f"{path}: column {self._image} holds {types[self._image]}; expected the bytes of pictures")
        if self._caption and not _holds_text(types[self._caption]):
            raise DataError(f"{path}: column {self._caption} holds {types[self._caption]}; expected text")
        self._rows: Iterator[tuple[bytes, str]] | None = None
        self._at = (0, 0)

    def pictures(self) -> Iterator[Found]:
        """Reads all pictures. The key of each is the number of its row."""
        number = 0
        for group in range(self._file.num_row_groups):
            columns = [self._image, *([self._caption] if self._caption else [])]
            for row, (content, caption) in enumerate(self._read_group(group, columns)):
                yield Found(f"{number:06}", caption, (group, row), content)
                number += 1

    def read(self, place: tuple[int, int]) -> bytes:
        """Reads one picture. The rows of its row group are read up to it, from the place of the last call on."""
        group, row = place
        if self._rows is None or self._at[0] != group or self._at[1] > row:
            self._rows, self._at = self._read_group(group, [self._image]), (group, 0)
        content = b""
        for _ in range(self._at[1], row + 1):
            content, _ = next(self._rows)
        self._at = (group, row + 1)
        return content

    def _read_group(self, group: int, columns: list[str]) -> Iterator[tuple[bytes, str]]:
        """Yields the picture and the caption of each row, both empty where there is none."""
        try:
            for batch in self._file.iter_batches(_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
                images = batch.column(self._image).to_pylist()
                captions = batch.column(self._caption).to_pylist() if self._caption in columns else [""] * len(images)
                for image, caption in zip(images, captions, strict=True):
                    yield self._content(image), (caption or "").strip()
        except self._errors as e:
            raise self._damaged(e) from None

    def _content(self, image: Any) -> bytes:
        """The bytes of a picture from the value of its column."""
        if isinstance(image, dict):
            if image.get("bytes") is None and image.get("path"):
                raise DataError(f"{self._path} names pictures ({image['path']}) but does not hold them")
            image = image.get("bytes")
        return image or b""

    def _choose(self, setting: str, wanted: str, types: dict[str, Any], usual: tuple[str, ...]) -> str:
        if wanted and wanted not in types:
            raise self._no_column(setting, repr(wanted), types)
        return wanted or next((name for name in usual if name in types), "")

    def _no_column(self, setting: str, what: str, types: dict[str, Any]) -> DataError:
        return DataError(f"{self._path} has no column of {what}; it has {', '.join(types)} ({setting} names one)")

    def _damaged(self, e: Exception) -> DataError:
        return DataError(f"{self._path} is no readable parquet file: {str(e).splitlines()[0][:200]}")


def _holds_pictures(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_pictures(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_text(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)
