"""What the tabs of the page share: the folders, the queue, the painter, and how they show a task."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sdjax.app.drawing import Order, Painter
from sdjax.app.folders import Folders, chosen
from sdjax.app.queue import Queue, Task
from sdjax.settings import parse

_BETWEEN_LOOKS = 0.2  # seconds
_KEPT, _KEPT_BYTES = 3600, 1_000_000_000
"""Files for the browser are kept for so many seconds, and the newest of so many bytes for longer."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """One for all tabs and all people. temporary: a folder that only this process uses, for files that are sent."""

    folders: Folders
    models: tuple[str, ...]
    dtype: str
    queue: Queue
    painter: Painter
    temporary: Path

    def put(self, order: Order) -> Task:
        """Puts an order in the queue. Raises DataError if too many wait."""
        tidy(self.temporary)
        return self.queue.put(self.painter.work(order))

    def follow(self, task: Task) -> Iterator[str]:
        """Yields the state of a task as HTML, again and again until it is done."""
        while not task.done.wait(_BETWEEN_LOOKS):
            ahead = self.queue.ahead(task)
            says = f"waiting for {ahead} before this one" if ahead else task.says
            yield bar(says, task.share)
        yield problem(task.error) if task.error else bar(task.says, 1.0)

    def served(self, path: Path) -> str:
        """Returns a copy of a file that the page may send. Files are never sent from where they lie."""
        copy = self.temporary / f"{abs(hash((path, path.stat().st_mtime_ns)))}" / path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        return str(copy)

    def saved(self, image: Image.Image) -> str:
        """Writes a picture of the page to a file and returns its path."""
        with tempfile.NamedTemporaryFile(dir=self.temporary, suffix=".png", delete=False) as file:
            image.save(file, "PNG")
        return file.name

    def lora_texts(self, rows: Any) -> tuple[str, ...]:
        """FILE:WEIGHT of each row (name, weight). Raises ConfigError for a name that is not listed."""
        listed = self.folders.loras_by_name()
        out = []
        for name, weight in rows:
            weight = parse(float, str(weight), f"the weight of {name}")
            out.append(f"{chosen(listed, name, 'a LoRA')}:{weight}")
        return tuple(out)

    def word_files(self, names: list[str] | None) -> tuple[Path, ...]:
        """The files of words. Raises ConfigError for a name that is not listed."""
        listed = self.folders.words_by_name()
        return tuple(chosen(listed, name, "a word") for name in names or ())


def tidy(folder: Path) -> None:
    """Removes the oldest files of the temporary folder: of pictures that were sent, uploads and previews."""
    files = []
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another visitor's request may have removed it
            if path.is_file():
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    left = sum(size for _, size, _ in files)
    for changed, size, path in sorted(files):
        if left <= _KEPT_BYTES or time.time() - changed < _KEPT:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            if path.parent != folder:
                path.parent.rmdir()  # it held this file alone
        left -= size


def bar(says: str, share: float) -> str:
    """A line of text above a bar. share: 0 to 1."""
    return (
        f'<div class="state" role="status">{escape(says)}</div>'
        f'<div class="bar"><div style="width:{100 * min(share, 1):.0f}%"></div></div>'
    )


def problem(text: str) -> str:
    """An error."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'
