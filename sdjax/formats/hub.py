"""Files from the Hugging Face hub, through the cache of huggingface_hub."""

from pathlib import Path

from sdjax.errors import DataError


def snapshot(repository: str, patterns: list[str], revision: str | None = None) -> Path:
    """Returns the folder in the cache that holds the files of a hub repository. Files not in the cache are downloaded.

    patterns: which files, such as `unet/*.json`. revision: a branch, tag or commit; None is the newest.
    Raises DataError, which says why the files cannot be had and what to do.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Connection errors are those of the HTTP library, which differs between versions of huggingface_hub.
    transport: tuple[type[Exception], ...] = HfHubHTTPError.__bases__  # pyright: ignore[reportAssignmentType]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        cause = "a gated model: accept its terms on its hub page and log in with `hf auth login`"
    except RepositoryNotFoundError:
        cause = "no such folder, and no such model on the hub: check the name, or `hf auth login` if it is private"
    except RevisionNotFoundError:
        cause = f"the model has no revision {revision!r}: leave it out for the newest"
    except LocalEntryNotFoundError:
        cause = "no such folder, not in the cache, and the hub cannot be reached: go online once, or give a folder"
    except HFValidationError as error:
        cause = f"no such folder, and not a hub id: {_first_line(error)}"
    except (OSError, EntryNotFoundError, *transport) as error:
        cause = f"the download failed ({_first_line(error)}): run the command again, it continues where it stopped"
    raise DataError(f"{repository}: {cause}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
