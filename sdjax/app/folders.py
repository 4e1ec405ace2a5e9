"""The folders of the page. A file is reached by a name that one of these lists, never by a path from the page."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sdjax.data.images import SUFFIXES
from sdjax.errors import ConfigError
from sdjax.settings import FileName, read_value

KOHYA_FILE, PEFT_FILE = "lora.safetensors", "pytorch_lora_weights.safetensors"
"""Those of `formats.lora_file`, which imports JAX: the page is up before that."""
_RESULTS = "export/*/*.safetensors"
_WEIGHTS = (".safetensors", ".pt", ".ckpt", ".bin")


@dataclasses.dataclass(frozen=True)
class Folders:
    """The folders that the page reads and writes. Links that lead out of them are not followed."""

    pictures: Path
    loras: Path
    words: Path
    data: Path
    runs: Path

    def loras_by_name(self) -> dict[str, Path]:
        """Name -> LoRA file: those of the folder, and those of runs as runs/RUN/STAGE."""
        own = {_name(self.loras, path): path for path in _files(self.loras, _WEIGHTS)}
        made = [(run, path) for run, path in self._exported() if path.name == KOHYA_FILE]
        return own | {f"runs/{run}/{path.parent.name}": path for run, path in made}

    def words_by_name(self) -> dict[str, Path]:
        """Name -> embedding file: those of the folder, and those of runs as runs/RUN/WORD."""
        own = {_name(self.words, path): path for path in _files(self.words, _WEIGHTS)}
        made = [(run, path) for run, path in self._exported() if path.name not in (KOHYA_FILE, PEFT_FILE)]
        return own | {f"runs/{run}/{path.stem}": path for run, path in made}

    def results_by_name(self) -> dict[str, Path]:
        """Name -> LoRA or embedding file of a run, to download."""
        return {
            name: path
            for name, path in (self.loras_by_name() | self.words_by_name()).items()
            if path.is_relative_to(self.runs)
        }

    def _exported(self) -> list[tuple[str, Path]]:
        """(name of the run, file) of the weights that runs made."""
        found = [(name, path) for name, run in self.runs_by_name().items() for path in _below(run, _RESULTS)]
        return sorted(found)

    def data_by_name(self) -> dict[str, Path]:
        """Name -> folder of training pictures."""
        return {path.name: path for path in _below(self.data, "*") if path.is_dir()}

    def runs_by_name(self) -> dict[str, Path]:
        """Name -> folder of a run, the newest first. The copies of a run of a terminal are RUN/COPY."""
        alone = {path.parent for path in _below(self.runs, "*/config.toml")}
        copies = {path.parent for path in _below(self.runs, "*/*/config.toml") if path.parent.parent not in alone}
        found = [run for run in alone | copies if not _leads_out(run)]
        newest = sorted(found, key=lambda run: (-(run / "config.toml").stat().st_mtime, run))
        return {run.relative_to(self.runs).as_posix(): run for run in newest}


def pictures_in(folder: Path) -> list[Path]:
    """The training pictures of a folder."""
    return _files(folder, tuple(SUFFIXES))


def new_folder(parent: Path, name: str, key: str) -> Path:
    """Returns the path of a folder that does not exist. Raises ConfigError for a name that is no name, or taken."""
    path = parent / read_value(FileName, name.strip(), key)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{key} = {name.strip()!r} is taken: choose another name")
    return path


def chosen(names: dict[str, Path], name: str | None, key: str) -> Path:
    """The file or folder of a name. Raises ConfigError for a name that is not listed."""
    if name not in names:
        raise ConfigError(f"{key} = {name!r}: there is none of this name" if name else f"choose {key}")
    return names[name]


def _leads_out(run: Path) -> bool:
    """Whether the folder of a run holds a link to elsewhere where its report would read it."""
    root = run.resolve()
    looked_at = (path for pattern in ("*", "samples/*", "export/*", "export/*/*") for path in run.glob(pattern))
    return any(path.is_symlink() and not path.resolve().is_relative_to(root) for path in looked_at)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [path for path in _below(folder, "**/*") if path.suffix.lower() in suffixes and path.is_file()]


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    """Yields the paths of a pattern that are in the folder, also after links are followed. Hidden ones are left out."""
    root = folder.resolve()
    for path in sorted(folder.glob(pattern)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.resolve().is_relative_to(root):
            yield path
