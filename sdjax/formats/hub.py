"""Files from the Hugging Face hub, through the cache of huggingface_hub, and files that are uploaded to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sdjax.errors import ConfigError, DataError


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


def check_upload(repository: str) -> None:
    """Checks that files can be uploaded to a repository, OWNER/NAME: its name, and that somebody is logged in.

    Raises ConfigError for the name and DataError for the rest, before anything slow is done for the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except ValueError as error:
        raise ConfigError(f"{repository!r} is no name of a repository, OWNER/NAME: {_first_line(error)}") from None
    if "/" not in repository:
        raise ConfigError(f"{repository!r} is no name of a repository: give OWNER/NAME")
    try:
        HfApi().whoami()
    except Exception as error:  # of the HTTP library, or of a missing token
        _upload_failed(repository, error)


def upload(folder: Path, repository: str, *, private: bool = False, ignore: Sequence[str] = ()) -> str:
    """Uploads the files of a folder to a model repository, which is made if there is none, and returns its address.

    private: whether a new repository is private. ignore: patterns of files to leave out.
    Raises DataError, which says why the files cannot be uploaded and what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=list(ignore),
            commit_message="Upload with sdjax",
        )
    except Exception as error:  # of the HTTP library, or of the answers of the hub
        _upload_failed(repository, error)
    return str(address)


def _upload_failed(repository: str, error: Exception) -> NoReturn:
    """Raises DataError with the cause of a failed upload and the next step."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        cause = "nobody is logged in: log in with `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, OfflineModeIsEnabled):
        cause = "HF_HUB_OFFLINE is set: unset it to upload"
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 0
        causes = {401: "the token is not valid: log in with `hf auth login`", 403: "the token may not write there"}
        cause = causes.get(status, f"the hub refused the upload ({_first_line(error)})")
    else:
        cause = f"the upload failed ({_first_line(error)}): push again, complete files are not sent twice"
    raise DataError(f"{repository}: {cause}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
