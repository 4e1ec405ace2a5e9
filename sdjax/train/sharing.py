"""The licence of an export, and its way to the hub."""

import json
from pathlib import Path

from sdjax.errors import DataError
from sdjax.formats import hub
from sdjax.runtime.whole_file import replacing
from sdjax.train import snapshots

LICENCE = "## Licence\n"
"""The heading of the last section of a card."""


def push(run: str | Path, stage: str, repository: str, licence: str, *, private: bool = False) -> str:
    """Uploads the export of a stage to a repository on the hub, with the licence in its card. Returns the address.

    run: the folder of the run. Files of single steps stay here.
    Raises DataError if there is no export, or if the hub does not take it.
    """
    folder = Path(run) / "export" / stage
    card = folder / snapshots.CARD
    if not card.is_file():
        raise DataError(f"{folder}: holds no export; the stage is not done")
    licensed = with_licence(card.read_text(encoding="utf-8"), licence)
    with replacing(card) as file:
        file.write(licensed.encode())
    return hub.upload(folder, repository, private=private, ignore=["steps/*", "steps/**"])


def with_licence(card: str, licence: str) -> str:
    """Returns a card with the licence in its head, which the hub reads, and in its last section."""
    _, head, body = card.split("---\n", 2)
    head = "".join(line for line in head.splitlines(keepends=True) if not line.startswith("license:"))
    body, title, _ = body.rpartition(LICENCE)
    text = f"These weights: `{licence}`. The licence of the base model and the rights in the training images apply too."
    return f"---\nlicense: {json.dumps(licence)}\n{head}---\n{body}{title}\n{text}\n"
