"""Files and folders stay as they were when a write fails or the process is killed."""

import re
import signal
import subprocess
import sys

import pytest

from sdjax.runtime.whole_file import replacing, replacing_folder

WRITE = {
    "file": "with replacing(path) as file:\n    file.write(b'new')",
    "folder": "with replacing_folder(path) as folder:\n    (folder / 'a').write_bytes(b'new')",
}
# A limit on the size of files acts like a full disk.
FAULTS = {
    "full disk": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


def content(path):
    return {file: file.read_bytes() for file in [path, *path.rglob("*")] if file.is_file()}


def make(path, kind):
    if kind == "folder":
        path.mkdir()
        path = path / "old"
    path.write_bytes(b"old")


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_write_that_stops_leaves_the_old_content(tmp_path, kind, fault):
    path = tmp_path / "target"
    make(path, kind)
    before = content(path)
    opened, written = WRITE[kind].split("\n")
    code = f"""
import signal
from pathlib import Path
from sdjax.runtime.whole_file import replacing, replacing_folder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(path)!r})
{opened}
    {FAULTS[fault]}
{written}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == (-signal.SIGKILL if fault == "killed" else 1)
    assert "File too large" in result.stderr or fault == "killed"
    assert content(path) == before
    leftovers = [item.name for item in tmp_path.iterdir() if item != path]
    assert len(leftovers) == (fault == "killed") and all(name.startswith(".target.") for name in leftovers)
    if kind == "folder":
        with replacing_folder(path) as folder:
            (folder / "a").write_bytes(b"new")
        assert content(path) == {path / "a": b"new"}
        assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_is_hidden_and_beside_the_old_one_until_it_is_complete(tmp_path):
    """In the same folder the rename stays within a file system; a hidden name is not taken for a model."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with replacing(path) as file:
        (other,) = set(tmp_path.iterdir()) - {path}
        assert re.fullmatch(r"\.a\.safetensors\.\d+\.tmp", other.name)
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert content(tmp_path) == {path: b"new"}


@pytest.mark.parametrize("old", [False, True])
def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path, old):
    path = tmp_path / "parent" / "target"
    if old:
        path.parent.mkdir()
        make(path, "folder")
    with replacing_folder(path) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_bytes(b"new")
        assert path.exists() == old
    assert content(path) == {path / "below" / "a": b"new"}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", WRITE)
def test_an_error_in_the_block_is_raised_and_leaves_the_old_content(tmp_path, kind):
    path = tmp_path / "target"
    make(path, kind)
    before = content(path)
    with pytest.raises(ZeroDivisionError), (replacing if kind == "file" else replacing_folder)(path):
        _ = 1 / 0
    assert content(tmp_path) == before
