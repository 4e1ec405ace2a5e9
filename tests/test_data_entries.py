"""Entries of the cache: compared with their digests once, and shared out over processes. See test_data_cache."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from sdjax.data.entries import Missing, entries
from sdjax.runtime import processes


def numbers(folder, count=5, most=2):
    """The arrays of entries that hold numbers, and the first numbers of those that were computed."""
    computed = []

    def entry(begin, members):
        def rows():
            computed.append(begin)
            yield {"square": np.array(members) ** 2, "none": np.zeros((0, 3))}

        return Missing({"kind": "numbers", "members": list(members)}, rows(), {"begin": begin})

    found = entries(folder, range(count), entry, most=most)
    assert [begin for begin, _ in found] == [each.notes["begin"] for _, each in found]
    assert all(each.arrays["none"].open().shape == (0, 3) for _, each in found)
    return [each.arrays["square"].open().tolist() for _, each in found], computed


@pytest.fixture
def compared(monkeypatch):
    """The files whose digests were computed."""
    names = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: names.append(Path(file.name)) or digest(file, kind))
    return names


def test_an_entry_is_compared_until_its_times_tell(tmp_path, compared):
    assert numbers(tmp_path) == ([[0, 1], [4, 9], [16]], [0, 2, 4])
    compared.clear()
    assert numbers(tmp_path)[1] == []
    assert len(compared) == 6  # the files are too young
    files = [*tmp_path.glob("numbers-*/square.bin"), *tmp_path.glob("numbers-*/none.bin")]
    for path in files:
        os.utime(path, (1e9, 1e9))
    numbers(tmp_path)
    compared.clear()
    assert numbers(tmp_path) == ([[0, 1], [4, 9], [16]], [])
    assert compared == []
    content = files[0].read_bytes()
    files[0].write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(files[0], (1e9, 1e9))  # with the size and the time that it had
    results, computed = numbers(tmp_path)
    assert results == [[0, 1], [4, 9], [16]] and len(computed) == 1
    assert len(compared) >= 1 and not list(tmp_path.glob("numbers-*/.checked*"))


def test_a_note_that_is_no_note_is_left_out(tmp_path, compared):
    numbers(tmp_path)
    for text in ("{", "[]", '{"square": 3}'):
        for place in tmp_path.glob("numbers-*"):
            (place / "checked.json").write_text(text)
        compared.clear()
        assert numbers(tmp_path) == ([[0, 1], [4, 9], [16]], [])
        assert len(compared) == 6


@pytest.mark.parametrize("index", [0, 1, 2])
def test_processes_compute_neighbours_each(tmp_path, monkeypatch, index):
    waited = []
    monkeypatch.setattr(processes, "share", lambda count: range(count * index // 3, count * (index + 1) // 3))
    monkeypatch.setattr(processes, "wait", lambda event: waited.append([*tmp_path.iterdir()]))
    results, computed = numbers(tmp_path, count=7, most=1)
    shares = [[0, 1], [2, 3], [4, 5, 6]]
    assert computed[: len(shares[index])] == shares[index]
    assert [len(names) for names in waited] == [len(shares[index])]
    assert results == [[n * n] for n in range(7)]
