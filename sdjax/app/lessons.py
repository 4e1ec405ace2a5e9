"""Training pictures for the page: dropped pictures become a folder with captions, which `sdjax train` reads as well."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdjax.app.folders import new_folder
from sdjax.data.folder import METADATA, captions_in
from sdjax.data.images import SUFFIXES, read_picture
from sdjax.errors import ConfigError, DataError
from sdjax.runtime.whole_file import replacing


def add_pictures(parent: Path, name: str, files: Sequence[str]) -> Path:
    """Makes a folder of pictures and returns it. Raises ConfigError for the name, and DataError for no picture."""
    folder = new_folder(parent, name, "name")
    if not files:
        raise ConfigError("drop some pictures first")
    for file in files:
        if Path(file).suffix.lower() not in SUFFIXES:
            raise DataError(f"{Path(file).name} is no picture")
        try:
            read_picture(file)
        except (DataError, OSError, ValueError) as error:
            raise DataError(f"{Path(file).name}: {str(error).removeprefix(f'{file}: ')}") from None
    folder.mkdir()
    for number, file in enumerate(files):
        path = Path(file)
        stem = re.sub(r"[^\w-]+", "-", path.stem)[:60].strip("-") or "picture"
        shutil.copyfile(path, folder / f"{number:03d}-{stem}{path.suffix.lower()}")
    write_captions(folder, [(path.name, _words(path.stem)) for path in sorted(folder.iterdir())])
    return folder


def _words(stem: str) -> str:
    """The words of a file's name as a first caption: red-cat-2 -> red cat. A code such as IMG_0042 gives none."""
    words = [word for word in re.split(r"[\W_]+", stem) if word]
    named = [word for word in words if word.isalpha() and word.lower() not in ("img", "dsc", "image", "picture")]
    return " ".join(named)


def write_captions(folder: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Writes the captions of a folder: rows of (file name, caption). Raises DataError for a file that is not in it."""
    known = {path.name for path in folder.iterdir() if path.suffix.lower() in SUFFIXES}
    lines = []
    for name, caption in rows:
        if name not in known:
            raise DataError(f"{folder.name} has no picture {name!r}")
        lines.append(json.dumps({"file_name": name, "text": str(caption or "").strip()}, ensure_ascii=False) + "\n")
    with replacing(folder / METADATA) as file:
        file.write("".join(lines).encode())


def captions(folder: Path) -> list[list[str]]:
    """The rows (file name, caption) of a folder."""
    return [list(row) for row in captions_in(folder.resolve())]
