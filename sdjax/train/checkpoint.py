"""Checkpoints that survive a killed process and notice damaged files; the lock of an output folder; stop signals.

A checkpoint is a folder such as `step_00000100`, which is written under another name and renamed once it is complete.
`state/` in it is written by orbax. `record.json` holds the metadata, the shape and number type of every leaf, and a
digest of every file and of the record itself. The digests are compared before orbax reads anything, because orbax does
not notice flipped bits.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.runtime import processes
from sdjax.runtime.whole_file import sync, sync_below

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: PyTree
    """The saved tree, with NumPy arrays and typed PRNG keys as its leaves."""
    metadata: dict[str, Any]


class Damaged(Exception):
    """A checkpoint is damaged. An earlier one may be intact."""


def save(folder: str | Path, step: int, state: PyTree, metadata: Mapping[str, Any]) -> None:
    """Saves the state as the checkpoint of a step. It is on the disk when this returns. See `prune` for earlier ones.

    state: a tree of typed PRNG keys and of arrays, on the host or on addressable devices. metadata: values for JSON.
    Several processes call this together, each with the whole state. The first one writes.
    Raises TrainingStopped for a state that is not finite, and DataError if the checkpoint cannot be written. Earlier
    ones are then untouched.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    arrays = _to_arrays(state)
    if broken := [path for path, array in arrays.items() if not _is_finite(array)]:
        raise TrainingStopped(
            f"checkpoint of step {step} not saved: {len(broken)} of {len(arrays)} arrays hold NaN or infinity, such as "
            f"{broken[0]}; the last checkpoint is untouched.\nTry a lower learning_rate, or dtype = 'float32'."
        )
    temporary, place = folder / f".saving_{step:08d}", folder / f"step_{step:08d}"
    try:
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            temporary.mkdir()
        processes.wait(f"the folder of checkpoint {step}")
        with _plainly_named(temporary, together=True) as plain, _quiet():
            ocp.save(str(plain / "state"), arrays)
        if processes.is_first():
            if not (temporary / "state").is_dir():
                raise FileNotFoundError(f"orbax did not write {temporary / 'state'}")
            _write_record(temporary, dict(metadata), {path: _kind(array) for path, array in arrays.items()})
            sync_below(temporary)
            if place.exists():
                shutil.rmtree(place)
            temporary.rename(place)
            sync(folder)
        processes.wait(f"checkpoint {step}")
    except Exception as e:  # orbax and tensorstore turn a full disk into many kinds of error
        _remove_leftovers(folder)
        raise DataError(f"checkpoint of step {step} not saved in {folder}: {_one_line(e)}") from e


def prune(folder: str | Path, step: int, *, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` up to a step, which has just been saved.

    Those of later steps are from before the run was resumed at an earlier step. Copies call this when all of them have
    saved the step, so at any time there is a step that every copy has.
    """
    known = steps(folder)
    for old in [s for s in known if s > step] + [s for s in known if s <= step][:-keep]:
        shutil.rmtree(Path(folder) / f"step_{old:08d}")


def restore(
    folder: str | Path, expect: Callable[[dict[str, Any]], PyTree], *, step: int | None = None
) -> Restored | None:
    """Returns the newest intact checkpoint, or that of `step`. Returns None if there is no checkpoint.

    expect: gets the metadata of a checkpoint, and returns a tree with the structure, shapes and number types of the
    saved one, or raises an error to refuse the checkpoint.
    A damaged checkpoint is logged, and the one before it is tried. Raises DataError if all checkpoints are damaged, if
    that of `step` is missing or damaged, or if the saved tree differs from that of `expect`.
    """
    folder = Path(folder).absolute()
    if processes.is_first():
        _rename_whole(folder)
    processes.wait("checkpoints")
    known = steps(folder)
    if step is not None:
        if step not in known:
            raise DataError(f"no checkpoint of step {step} in {folder}; there are {known or 'none'}")
        known = [step]
    damaged = []
    for candidate in reversed(known):
        place = folder / f"step_{candidate:08d}"
        try:
            record = _read_record(place)
            tree = expect(record["metadata"])
            _check_same_leaves(place, record["leaves"], tree)
            state = _from_arrays(tree, _read_arrays(place))
        except Damaged as e:
            log.warning("checkpoint %s is damaged and skipped: %s", place, e)
            damaged.append(f"{place.name} ({e})")
        else:
            return Restored(candidate, state, record["metadata"])
    if damaged:
        raise DataError(f"no intact checkpoint in {folder}: {'; '.join(damaged)}")
    return None


def steps(folder: str | Path) -> list[int]:
    """Returns the steps that have a checkpoint, intact or damaged, in ascending order."""
    names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in Path(folder).glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def _rename_whole(folder: Path) -> None:
    """Renames a complete checkpoint, whose process was killed just before it could rename it."""
    for path in folder.glob(".saving_*"):
        with contextlib.suppress(Damaged):
            _read_record(path)
            place = folder / path.name.replace(".saving", "step")
            if place.exists():  # an older checkpoint of the same step, perhaps partly removed
                shutil.rmtree(place)
            path.rename(place)


def _remove_leftovers(folder: Path) -> None:
    """Removes the unfinished checkpoint of a process that was killed while it saved."""
    for path in folder.glob(".saving_*"):
        shutil.rmtree(path)


def _write_record(place: Path, metadata: dict[str, Any], leaves: dict[str, Any]) -> None:
    files = {path.relative_to(place).as_posix(): _digest(path) for path in place.rglob("*") if path.is_file()}
    record = {"metadata": metadata, "leaves": leaves, "files": files}
    record["digest"] = _digest_json(record)
    (place / "record.json").write_text(json.dumps(record), encoding="utf-8")


def _read_record(place: Path) -> dict[str, Any]:
    """Returns the record of a checkpoint. Raises Damaged if the record or any file differs from its digest."""
    try:
        record = json.loads((place / "record.json").read_text(encoding="utf-8"))
        digest = record.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError) as e:
        raise Damaged(f"record.json cannot be read: {_one_line(e)}") from e
    if _digest_json(record) != digest:
        raise Damaged("record.json does not match its digest")
    for name, expected in record["files"].items():
        path = place / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if _digest(path) != expected:
            raise Damaged(f"{name} does not match its digest")
    return record


def _read_arrays(place: Path) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    try:
        with _plainly_named(place) as plain:
            return ocp.load(str(plain / "state"))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:  # the files are intact, but this version of orbax cannot read them
        raise Damaged(_one_line(e)) from e


@contextlib.contextmanager
def _plainly_named(folder: Path, *, together: bool = False) -> Iterator[Path]:
    """Gives the folder a name of letters, digits, dots, hyphens and slashes during the block.

    orbax takes brackets, backslashes and some other characters of a path for patterns and separators.
    together: all processes enter and leave the block, and each gets the same name, as orbax demands when it saves.
    """
    if re.fullmatch(r"[\w./-]*", str(folder), re.ASCII):
        yield folder
        return
    if together and processes.are_several():
        link = Path(tempfile.gettempdir(), f"sdjax-{hashlib.sha256(os.fsencode(folder)).hexdigest()}")
        with contextlib.suppress(FileExistsError):  # made by another process of this machine
            link.symlink_to(folder, target_is_directory=True)
        if not link.is_symlink() or link.readlink() != folder:
            raise FileExistsError(f"{link} is not a link to {folder}")
        yield link
        processes.wait(f"{link} is not used")
        link.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "checkpoint"
        link.symlink_to(folder, target_is_directory=True)
        yield link


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what orbax's threads show of an error that the block raises too.

    Each of them logs its traceback. Other writes end later, find their event loop closed, and reach the hook for
    errors that nobody can catch. After an error, that hook therefore leaves them out for good.
    """
    logger, drop, former = logging.getLogger("absl"), lambda record: False, sys.unraisablehook

    def hook(error: Any) -> None:
        if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == "Event loop is closed"):
            former(error)

    logger.addFilter(drop)
    sys.unraisablehook = hook
    try:
        yield
        sys.unraisablehook = former
    finally:
        logger.removeFilter(drop)


def _one_line(e: BaseException, most: int = 120) -> str:
    text = " ".join(str(e).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(number) in text:  # somewhere in the long text of tensorstore
            return os.strerror(number)
    return f"{type(e).__name__}: {text[:most]}{'...' if len(text) > most else ''}"


# ------------------------------------------------------------------------------------------------ trees <-> flat arrays


def _to_arrays(state: PyTree, *, abstract: bool = False) -> dict[str, Any]:
    """Returns path -> array on the host, for every leaf. A PRNG key is given as its integers.

    abstract: the leaves need only a shape and dtype, and so do the results.
    """

    def convert(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf) if abstract else jax.random.key_data(leaf)
        return leaf if abstract else np.asarray(leaf)

    return {jax.tree_util.keystr(path): convert(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _from_arrays(tree: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    def convert(path: Any, leaf: Any) -> Any:
        array = arrays[jax.tree_util.keystr(path)]
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(array), impl=_key_impl(leaf))
        return array

    return jax.tree_util.tree_map_with_path(convert, tree)


def _key_impl(key: Any) -> Any:
    """Returns the generator of a PRNG key, of which only the shape and dtype are known."""
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), key)
    return impls[0]


def _is_finite(array: np.ndarray) -> bool:
    return not jnp.issubdtype(array.dtype, jnp.inexact) or bool(np.isfinite(array).all())


def _kind(leaf: Any) -> list[Any]:
    return [np.dtype(leaf.dtype).name, list(leaf.shape)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_same_leaves(place: Path, saved: Mapping[str, Any], tree: PyTree) -> None:
    wanted = {path: _kind(leaf) for path, leaf in _to_arrays(tree, abstract=True).items()}
    differences = [f"{path} is not in the checkpoint" for path in wanted.keys() - saved.keys()]
    differences += [f"{path} is not expected" for path in saved.keys() - wanted.keys()]
    for path in wanted.keys() & saved.keys():
        if wanted[path] != saved[path]:
            (kind, shape), (wanted_kind, wanted_shape) = saved[path], wanted[path]
            differences.append(f"{path} is {kind}{shape}, expected {wanted_kind}{wanted_shape}")
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise DataError(f"{place} does not fit this run: {'; '.join(sorted(differences)[:5])}{more}")


# ------------------------------------------------------------------------------------------------ lock and signals


@contextlib.contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Makes the output folder, and holds its lock during the block. A lock ends with its process.

    A folder that was made here and is still empty is removed at the end.
    Raises ConfigError if another run holds the lock, or if the folder cannot be written.
    """
    import fcntl

    output = Path(output)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        # A link is not followed: the file that it names would be overwritten.
        descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as e:
        raise ConfigError(f"output = {str(output)!r} cannot be written: {e.strerror or e}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ConfigError(f"output = {str(output)!r} is in use by another run (process {owner})") from None
        except OSError as e:  # network drives, such as Colab's, may not support locks
            log.warning("%s cannot be locked (%s): do not start a second run in it", output, e.strerror)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
        made = []
    finally:
        if made and os.listdir(output) == [".lock"]:
            (output / ".lock").unlink()
            with contextlib.suppress(OSError):  # a folder that holds something else by now
                for folder in made:
                    folder.rmdir()
        os.close(descriptor)


class StopSignal:
    """Within the block, the first SIGTERM or SIGINT is a request to stop, and the second ends the process at once.

    The training loop reads `requested` between steps; then it saves and exits with `exit_code`. Outside the main
    thread, where Python allows no signal handlers, this does nothing.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._signals = signals
        self._received: int | None = None
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal was received."""
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """128 + the number of the received signal, or 0 if there was none."""
        return 0 if self._received is None else 128 + self._received

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in self._signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os._exit(128 + number)
        self._received = number
        # Neither print nor logging is safe here: the signal may have interrupted their buffers.
        os.write(2, b"\nstopping after this step, then saving; a second signal stops at once\n")
