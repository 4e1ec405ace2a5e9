"""The licence of an export, and its way to the hub."""

import json
from pathlib import Path

from sdjax.errors import ConfigError, DataError
from sdjax.formats import hub
from sdjax.runtime.whole_file import replacing
from sdjax.train import config_file, snapshots

LICENCE = "## Licence\n"
"""The heading of the last section of a card."""


def push_run(run: Path, repository: str, licence: str = "", stage: str | None = None, *, private: bool = False) -> str:
    """Uploads the export of a finished run to a repository on the hub and returns its address.

    licence: by default that in the settings of the run. stage: by default the last, whose export is the whole result.
    Raises ConfigError without a licence or for a wrong name, and DataError for the rest.
    """
    config = config_file.load_run(run, stage)
    licence = licence or config.license
    if not licence:
        raise ConfigError(
            f"say under which licence the files may be used, as far as that of {config.model} allows: "
            "creativeml-openrail-m, openrail++, apache-2.0, cc-by-4.0, other, ... (`sdjax push --license`)"
        )
    hub.check_upload(repository)
    return push(run, stage or config.stages[-1].name, repository, licence, private=private)


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
