"""Checkpoints that survive being killed, cut or bent; the lock on an output folder; stopping on a signal.

A checkpoint is the folder `step_00000100`, written under another name and renamed when whole. In it, `state/` is
orbax's and `record.json` ours: the caller's metadata, every leaf's shape and number type and, since orbax does not
notice flipped bits, a digest of every file and of the record itself, compared before orbax reads anything.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from sdjax.errors import ConfigError, DataError

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint as read."""

    step: int
    state: PyTree
    """The tree it was saved as; leaves are NumPy arrays, PRNG keys are typed keys."""
    metadata: dict[str, Any]


class Damaged(Exception):
    """This checkpoint cannot be trusted; an earlier one may be."""


def save(folder: str | Path, step: int, state: PyTree, metadata: Mapping[str, Any], *, keep: int = 3) -> None:
    """Write the state as the checkpoint of this step, and drop all but the newest `keep`.

    `state`: any tree of host or addressable device arrays and typed PRNG keys. `metadata`: what JSON can hold.
    Checkpoints of later steps belong to a past that was given up and are dropped too. Raises DataError if the disk
    refuses; what was saved before is then untouched.
    """
    from orbax.checkpoint import v1 as ocp

    folder = Path(folder).absolute()
    arrays = _to_arrays(state)
    temporary, place = folder / f".saving_{step:08d}", folder / f"step_{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        temporary.mkdir()
        ocp.save(str(temporary / "state"), arrays)
        _write_record(temporary, dict(metadata), {path: _kind(array) for path, array in arrays.items()})
        if place.exists():
            shutil.rmtree(place)
        temporary.rename(place)
    except Exception as e:  # orbax and tensorstore turn a full disk into many kinds of error
        _remove_leftovers(folder)
        raise DataError(f"checkpoint of step {step} not saved in {folder}: {_one_line(e)}") from e
    known = steps(folder)
    for old in [s for s in known if s > step] + [s for s in known if s <= step][:-keep]:
        shutil.rmtree(folder / f"step_{old:08d}")


def restore(
    folder: str | Path, expect: Callable[[dict[str, Any]], PyTree], *, step: int | None = None
) -> Restored | None:
    """The newest intact checkpoint (or that of `step`), None if nothing was ever saved.

    `expect` gets the checkpoint's metadata and returns a tree like the saved one (only structure, shapes and number
    types count); it may raise to refuse the run. A damaged checkpoint is named in a warning and the one before is
    tried. Raises DataError if all are damaged, if `step` is missing or damaged, or if the tree differs.
    """
    folder = Path(folder).absolute()
    _rename_whole(folder)
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
            log.warning("checkpoint %s is damaged and passed over: %s", place, e)
            damaged.append(f"{place.name} ({e})")
        else:
            return Restored(candidate, state, record["metadata"])
    if damaged:
        raise DataError(f"no intact checkpoint in {folder}: {'; '.join(damaged)}")
    return None


def steps(folder: str | Path) -> list[int]:
    """The steps that have a checkpoint folder, in order; intact or not."""
    names = (re.fullmatch(r"step_(\d{8,})", path.name) for path in Path(folder).glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def _rename_whole(folder: Path) -> None:
    """Finish the save of a run that was killed between writing the last byte and renaming."""
    for path in folder.glob(".saving_*"):
        with contextlib.suppress(Damaged):
            _read_record(path)
            place = folder / path.name.replace(".saving", "step")
            if place.exists():  # an older one of the same step, perhaps half removed
                shutil.rmtree(place)
            path.rename(place)


def _remove_leftovers(folder: Path) -> None:
    """What a run killed while saving left unfinished."""
    for path in folder.glob(".saving_*"):
        shutil.rmtree(path)


def _write_record(place: Path, metadata: dict[str, Any], leaves: dict[str, Any]) -> None:
    files = {path.relative_to(place).as_posix(): _digest(path) for path in place.rglob("*") if path.is_file()}
    record = {"metadata": metadata, "leaves": leaves, "files": files}
    record["digest"] = _digest_json(record)
    (place / "record.json").write_text(json.dumps(record), encoding="utf-8")


def _read_record(place: Path) -> dict[str, Any]:
    """The record of a checkpoint, all of whose files are what they were."""
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
        return ocp.load(str(place / "state"))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:  # intact, yet this version of orbax cannot read it
        raise Damaged(_one_line(e)) from e


def _one_line(e: BaseException, most: int = 120) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:most]}{'...' if len(text) > most else ''}"


# ------------------------------------------------------------------------------------------------ trees <-> flat arrays


def _to_arrays(state: PyTree, *, abstract: bool = False) -> dict[str, Any]:
    """Path -> host array (or, abstract, anything with shape and dtype); a PRNG key becomes its words."""

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
    """The generator of a PRNG key of which only shape and type are known."""
    found: list[Any] = []
    jax.eval_shape(lambda k: found.append(jax.random.key_impl(k)), key)
    return found[0]


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
    differences += [f"{path} is not wanted" for path in saved.keys() - wanted.keys()]
    for path in wanted.keys() & saved.keys():
        if wanted[path] != saved[path]:
            (kind, shape), (our_kind, our_shape) = saved[path], wanted[path]
            differences.append(f"{path} is {kind}{shape} there, {our_kind}{our_shape} here")
    if differences:
        more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise DataError(f"{place} does not fit this run: {'; '.join(sorted(differences)[:5])}{more}")


# ------------------------------------------------------------------------------------------------ lock and signals


@contextlib.contextmanager
def locked(output: str | Path) -> Iterator[None]:
    """Create the output folder and hold it for this process; the lock of a process that died is gone with it.

    Raises ConfigError if another run holds the folder or it cannot be written.
    """
    import fcntl

    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as e:
        raise ConfigError(f"output = {str(output)!r} cannot be written: {e.strerror or e}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ConfigError(f"output = {str(output)!r} is in use by another run (process {owner})") from None
        except OSError as e:  # network drives (Colab's) may know no locks
            log.warning("%s cannot be locked (%s): do not start a second run in it", output, e.strerror)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class StopSignal:
    """While entered, the first SIGTERM or SIGINT only asks to stop; a second one ends the process at once.

    The loop looks at `requested` between steps, saves, and exits with `exit_code`. Outside the main thread, where
    Python allows no handlers, it does nothing.
    """

    def __init__(self, signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> None:
        self._signals = signals
        self._received: int | None = None
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._received is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal received; 0 if there was none."""
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
        # Not through print or logging, whose buffers the signal may have interrupted.
        os.write(2, b"\nstopping after this step, then saving; a second signal stops at once\n")
