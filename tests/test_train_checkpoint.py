"""Checkpoints under real faults: killed processes, cut and changed files, a full disk. Locks and signals."""

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sdjax.errors import ConfigError, DataError, TrainingStopped
from sdjax.train.checkpoint import StopSignal, locked, prune, restore, save, steps


def state_of(step):
    """A state with an adapter, the state of an optimizer, a key and an array in half precision."""
    down = jax.random.normal(jax.random.key(step), (64, 16), jnp.float32)
    adapter = {"unet": {"down_blocks_0": {"to_q": {"down": down}}}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {
        "trainable": adapter,
        "optimizer": optimizer.init(adapter),
        "key": jax.random.fold_in(jax.random.key(0), step),
        "half": jnp.full((3,), step, jnp.bfloat16),
        "count": jnp.int32(step),
    }


def like(metadata):
    return jax.eval_shape(lambda: state_of(0))


def write(folder, *numbers, keep=3):
    for step in numbers:
        save(folder, step, state_of(step), {"stage": 0, "rate": 0.1, "step": step})
        prune(folder, step, keep=keep)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def restored_step(folder, **settings):
    restored = restore(folder, like, **settings)
    same(restored.state, state_of(restored.step))
    assert restored.metadata == {"stage": 0, "rate": 0.1, "step": restored.step}
    return restored.step


def test_saved_and_restored_bit_for_bit(tmp_path):
    write(tmp_path, 5)
    assert restored_step(tmp_path) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


def test_replicated_over_devices(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    save(tmp_path, 1, jax.device_put(state_of(1)["trainable"], everywhere), {})
    restored = restore(tmp_path, lambda _: state_of(0)["trainable"])
    same(restored.state, state_of(1)["trainable"])


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "{x,y}", "50% off?*", "häuser 木"])
def test_any_folder_name_will_do(tmp_path, name):
    write(tmp_path / "outer" / name, 1, 2)
    assert os.listdir(tmp_path / "outer") == [name]
    assert restored_step(tmp_path / "outer" / name) == 2


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    write(tmp_path, 1)
    state = state_of(2)
    for broken in (np.nan, np.inf):
        with pytest.raises(TrainingStopped, match=r"step 2 not saved: 1 of \d+ arrays hold NaN or infinity, .*half"):
            save(tmp_path, 2, {**state, "half": jnp.full((3,), broken, jnp.bfloat16)}, {})
    assert restored_step(tmp_path) == 1


def test_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 100, keep=2)
    assert steps(tmp_path) == [3, 100]
    write(tmp_path, 100, keep=2)  # again, as a resumed run may
    assert restored_step(tmp_path) == 100


def test_saving_after_going_back_drops_the_abandoned_future(tmp_path):
    write(tmp_path, 10, 20, 30)
    assert restored_step(tmp_path, step=10) == 10
    write(tmp_path, 15)
    assert steps(tmp_path) == [10, 15]


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_is_removed(tmp_path, monkeypatch):
    """After a power cut only what was synced is certain: the files, the names in their folders, and the new name."""
    write(tmp_path, 1, keep=1)
    events = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def record(kind, path):
        events.append((kind, os.path.relpath(path, tmp_path)))

    def synced(descriptor):
        record("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path, target):
        files = [path, *path.rglob("*")]
        missing = {os.path.relpath(file, tmp_path) for file in files} - {name for _, name in events}
        assert not missing
        record("rename", target)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: (record("remove", path), rmtree(path, **options)))
    write(tmp_path, 2, keep=1)
    after = events[events.index(("rename", "step_00000002")) :]
    assert after == [("rename", "step_00000002"), ("sync", "."), ("remove", "step_00000001")]


def test_nothing_saved_is_none_and_a_missing_step_an_error(tmp_path):
    assert restore(tmp_path / "nowhere", like) is None
    assert restore(tmp_path, like) is None
    write(tmp_path, 1, 2)
    with pytest.raises(DataError, match=r"no checkpoint of step 7 .*\[1, 2\]"):
        restore(tmp_path, like, step=7)


def files_of(checkpoint):
    return sorted(p for p in checkpoint.rglob("*") if p.is_file())


def largest(checkpoint):
    return max(files_of(checkpoint), key=lambda p: p.stat().st_size)


def empty_folder(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def flip_array_bit(checkpoint):
    """Flips a bit in the middle of the largest file: a random number, which orbax has not compressed."""
    content = bytearray(largest(checkpoint).read_bytes())
    content[len(content) // 2] ^= 16
    largest(checkpoint).write_bytes(content)


DAMAGES = {
    "truncated": lambda c: os.truncate(largest(c), largest(c).stat().st_size // 2),
    "emptied": lambda c: os.truncate(largest(c), 0),
    "deleted": lambda c: largest(c).unlink(),
    "empty folder": empty_folder,
    "no record": lambda c: (c / "record.json").unlink(),
    "cut record": lambda c: os.truncate(c / "record.json", 50),
    "no arrays": lambda c: shutil.rmtree(c / "state"),
    "flipped bit": flip_array_bit,
    "changed record": lambda c: (c / "record.json").write_text(
        (c / "record.json").read_text().replace('"rate": 0.1', '"rate": 0.2')
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage, caplog):
    write(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002")
    assert restored_step(tmp_path) == 1
    assert "step_00000002 is damaged" in caplog.text
    with pytest.raises(DataError, match="no intact checkpoint"):
        restore(tmp_path, like, step=2)
    write(tmp_path, 2)
    assert restored_step(tmp_path) == 2


def test_a_flipped_bit_that_orbax_does_not_see_is_caught(tmp_path, caplog):
    from orbax.checkpoint import v1 as ocp

    write(tmp_path, 1, 2)
    flip_array_bit(tmp_path / "step_00000002")
    ocp.load(str(tmp_path / "step_00000002" / "state"))
    assert restored_step(tmp_path) == 1
    assert "does not match its digest" in caplog.text


@pytest.mark.parametrize("seed", range(12))
def test_any_flipped_bit_is_caught_or_harmless(tmp_path, seed):
    write(tmp_path, 1, 2)
    draw = random.Random(seed)
    path = draw.choice([p for p in files_of(tmp_path / "step_00000002") if p.stat().st_size])
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    assert restored_step(tmp_path) in (1, 2)  # and equal to what was saved, either way


def test_every_checkpoint_damaged_is_an_error_with_the_list(tmp_path):
    write(tmp_path, 1, 2)
    for step in (1, 2):
        empty_folder(tmp_path / f"step_0000000{step}")
    with pytest.raises(DataError, match=r"no intact checkpoint .*step_00000002 .*step_00000001 "):
        restore(tmp_path, like)


def test_another_tree_is_refused_with_the_differences(tmp_path):
    write(tmp_path, 1)
    other = like({}) | {"half": jax.ShapeDtypeStruct((3,), jnp.float32), "more": jax.ShapeDtypeStruct((), jnp.int32)}
    del other["count"]
    with pytest.raises(DataError) as error:
        restore(tmp_path, lambda _: other)
    for part in ("['count'] is not expected", "['more'] is not in the checkpoint", "['half'] is bfloat16[3], expected"):
        assert part in str(error.value)


def test_errors_of_expect_are_raised(tmp_path):
    write(tmp_path, 1, 2)

    def refuse(metadata):
        raise DataError("another run")

    with pytest.raises(DataError, match="another run"):
        restore(tmp_path, refuse)


CHILD = """
import os, resource, signal, sys
sys.path.insert(0, {tests!r})
import conftest
from test_train_checkpoint import *
folder = {folder!r}
"""


def child(code, folder, **settings):
    text = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder)) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


@pytest.mark.parametrize("first", [1, 2], ids=["after another", "over the same"])
@pytest.mark.parametrize("event", [0, 8, "last os.rename", "shutil.rmtree"])
def test_killed_at_a_file_boundary_of_a_save(tmp_path, event, first):
    """kill -9 at one of the file operations of the second save, when there is only one other checkpoint."""
    code = f"""
        write(folder, {first}, keep=1)
        wanted, seen = {event!r}, 0
        def hook(name, arguments):
            global seen
            if name not in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
                return
            if not any(isinstance(a, (str, os.PathLike)) and folder in str(a) for a in arguments):
                return
            ours = name == "os.rename" and str(arguments[1]).endswith("step_00000002")
            if seen == wanted or name == wanted or (ours and wanted == "last os.rename"):
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
        sys.addaudithook(hook)
        write(folder, 2, keep=1)
    """
    with child(code, tmp_path) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    # The new checkpoint is complete before it is renamed, and only then the old one is removed.
    assert restored_step(tmp_path) == (first if isinstance(event, int) else 2)
    write(tmp_path, 3, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]  # leftovers are gone


@pytest.mark.parametrize("delay", [0.01, 0.04])
def test_killed_at_any_moment_of_a_save(tmp_path, delay):
    code = """
        for step in range(1, 1000):
            write(folder, step, keep=2)
            print(step, flush=True)
    """
    with child(code, tmp_path) as process:
        assert process.stdout.readline() == "1\n"
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        told = [2, *map(int, process.stdout.read().split())]
    assert restored_step(tmp_path) in (told[-1], told[-1] + 1)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path):
    code = """
        write(folder, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            big = state_of(2) | {"noise": np.random.default_rng(0).normal(size=100_000)}
            save(folder, 2, big, {})
        except DataError as e:
            print(e)
    """
    with child(code, tmp_path) as process:
        output, errors = process.communicate(timeout=60)
    assert output == f"checkpoint of step 2 not saved in {tmp_path}: File too large\n"
    assert "Traceback" not in errors
    assert restored_step(tmp_path) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


# ---------------------------------------------------------------------------------------------------- locks and signals


def test_the_second_run_in_a_folder_is_refused(tmp_path):
    folder = tmp_path / "new" / "run"
    with locked(folder):
        assert folder.is_dir()
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()}\)"), locked(folder):
            pass
    with locked(folder):
        pass


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(ConfigError, match="cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "keep me"


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path):
    (tmp_path / "old").mkdir()
    for folder, left in (("a/b/run", False), ("old", True)):
        with pytest.raises(DataError), locked(tmp_path / folder):
            raise DataError("no images")
        assert (tmp_path / folder).exists() == left
    assert not (tmp_path / "a").exists()
    with pytest.raises(DataError), locked(tmp_path / "a/run"):
        (tmp_path / "a/run/config.toml").touch()
        raise DataError("later")
    assert (tmp_path / "a/run/config.toml").exists()


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path):
    code = """
        with locked(folder):
            print("locked", flush=True)
            sys.stdin.read()
    """
    with child(code, tmp_path, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {process.pid}"), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: Not a directory"), locked(tmp_path / "file/x"):
        pass


def test_the_first_signal_asks():
    former = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.exit_code == 128 + 15
    assert signal.getsignal(signal.SIGTERM) is former


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_stops_at_once(tmp_path, number):
    code = """
        with StopSignal() as stop:
            print("ready", flush=True)
            while not stop.requested:
                signal.pause()
            print("asked", flush=True)
            while True:
                signal.pause()
    """
    with child(code, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert "a second signal stops at once" in process.stderr.read()


def test_a_signal_during_a_save_lets_it_finish(tmp_path):
    code = """
        with StopSignal() as stop:
            print("ready", flush=True)
            step = 0
            while not stop.requested:
                step += 1
                write(folder, step)
        print(step)
        sys.exit(stop.exit_code)
    """
    with child(code, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.terminate()
        last = int(process.stdout.read())
        assert process.wait(10) == 128 + 15
    assert restored_step(tmp_path) == last
    assert not list(tmp_path.glob(".saving*"))


def test_outside_the_main_thread_signals_are_left_alone():
    def run():
        with StopSignal() as stop:
            assert not stop.requested

    former = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is former
