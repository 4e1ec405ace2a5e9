"""safetensors files: a saved file reads back, and a broken file gives one error that names the file and the fault."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.numpy import save_file

from sdjax.errors import DataError
from sdjax.formats.safetensors_file import encode, read_safetensors, save_safetensors
from sdjax.formats.weights_file import read_tensors

DTYPES = [
    np.float32,
    np.float64,
    np.float16,
    np.int8,
    np.uint8,
    np.int64,
    np.bool_,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
]


def as_bytes(array):
    return np.ascontiguousarray(array).tobytes()


def load_file(path):
    """Name -> (shape, bytes), by the reference implementation. Its NumPy interface does not support float8."""
    return {name: (tuple(entry["shape"]), bytes(entry["data"])) for name, entry in deserialize(path.read_bytes())}


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refused(path, match):
    with pytest.raises(DataError, match=match) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


names = (
    st.text(min_size=1, max_size=12)
    .filter(lambda name: name != "__metadata__")
    .filter(lambda name: name.encode("utf-8", "ignore").decode() == name)
)


@st.composite
def arrays(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    raw = draw(st.binary(min_size=1, max_size=8)) * (int(np.prod(shape)) * dtype.itemsize)
    size = int(np.prod(shape)) * dtype.itemsize
    array = np.frombuffer(raw[:size], np.uint8)
    array = (array & 1 if dtype == np.bool_ else array).view(dtype).reshape(shape)
    return array.transpose(draw(st.permutations(range(array.ndim))))


@settings(max_examples=60, deadline=None)
@given(tensors=st.dictionaries(names, arrays(), max_size=5), metadata=st.dictionaries(names, names, max_size=3))
def test_round_trip_and_the_reference_reads_the_same(tmp_path_factory, tensors, metadata):
    """For any dtype, shape, strides and name."""
    path = tmp_path_factory.mktemp("st") / "a.safetensors"
    save_safetensors(path, tensors, metadata)
    ours = read_safetensors(path)
    assert ours.metadata == metadata
    assert ours.tensors.keys() == tensors.keys()
    theirs = load_file(path)
    for name, array in tensors.items():
        assert ours.tensors[name].dtype == array.dtype
        assert ours.tensors[name].shape == array.shape
        assert as_bytes(ours.tensors[name]) == as_bytes(array)
        assert theirs[name] == (array.shape, as_bytes(array))
    with safe_open(path, "np") as file:
        assert (file.metadata() or {}) == metadata


def test_reads_what_the_reference_writes(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.ones(3, np.int64)}
    save_file(tensors, tmp_path / "a.safetensors", {"k": "v"})
    read = read_safetensors(tmp_path / "a.safetensors")
    assert read.metadata == {"k": "v"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(read.tensors[name], array)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "bool"])
def test_same_numbers_as_torch(tmp_path, name):
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    tensor = (torch.arange(24).reshape(2, 3, 4) % 7 - 3).to(getattr(torch, name))
    save_torch({"x": tensor}, tmp_path / "t.safetensors")
    ours = read_safetensors(tmp_path / "t.safetensors").tensors["x"]
    np.testing.assert_array_equal(ours.astype(np.float64), tensor.to(torch.float64).numpy())
    save_safetensors(tmp_path / "o.safetensors", {"x": ours})
    assert torch.equal(load_torch(tmp_path / "o.safetensors")["x"].to(torch.float64), tensor.to(torch.float64))


def test_dtype_on_saving_leaves_integers_alone(tmp_path):
    tensors = {"w": np.array([[1.5, 2.5], [3.5, 4.5]], np.float32).T, "i": np.arange(3)}
    save_safetensors(tmp_path / "a.safetensors", tensors, dtype=ml_dtypes.bfloat16)
    read = read_safetensors(tmp_path / "a.safetensors").tensors
    assert read["w"].dtype == ml_dtypes.bfloat16
    assert read["i"].dtype == np.int64
    np.testing.assert_array_equal(read["w"].astype(np.float32), tensors["w"])


def test_reading_is_lazy_and_views_are_read_only(tmp_path):
    """A sparse file of 1 TiB opens at once, because only the header is read."""
    size = 2**40
    path = write(tmp_path / "huge.safetensors", {"a": entry(0, 16), "b": entry(16, size)})
    start = path.stat().st_size
    os.truncate(path, start + size)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(np.arange(4, dtype=np.float32).tobytes())
    tensors = read_safetensors(path).tensors
    assert tensors["b"].shape == ((size - 16) // 4,)
    np.testing.assert_array_equal(tensors["a"], np.arange(4, dtype=np.float32))
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0] = 1


def test_tensors_start_on_their_item_size(tmp_path):
    tensors = {"a": np.ones(3, np.uint8), "b": np.ones(3, np.float64), "c": np.ones(5, np.float16)}
    save_safetensors(tmp_path / "a.safetensors", tensors)
    for array in read_safetensors(tmp_path / "a.safetensors").tensors.values():
        assert array.flags.aligned


# Faults.

FAULTS = {
    "empty": (b"", "too short"),
    "short": (b"\x08\x00\x00", "too short"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "truncated"),
    "header of 2**63 bytes": ((2**63).to_bytes(8, "little") + b"{}", "truncated"),
    "header over the limit": ((200_000_000).to_bytes(8, "little") + b"{}", "limit 100000000"),
    "no header": ((0).to_bytes(8, "little") + b"{}", "header of 0 bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_broken_start(tmp_path, name):
    content, match = FAULTS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    refused(path, match)


HEADERS = {
    "not JSON": (b"{'a': 1}", b"", "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not JSON"),
    "nested too deep": (b"[" * 100_000, b"", "not JSON"),
    "an endless number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "not JSON"),
    "a list": (b"[1, 2]", b"", "not a JSON object"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' at bytes 4..12 overlaps"),
    "same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "overlaps"),
    "hole": ({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16), "'b' at bytes 12..16 leaves a hole"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), "hole"),
    "trailing bytes": ({"a": entry(0, 8)}, bytes(11), "3 trailing bytes"),
    "trailing bytes, no tensors": ({}, bytes(1), "1 trailing byte"),
    "truncated data": ({"a": entry(0, 8)}, bytes(7), "truncated"),
    "unknown dtype": ({"a": entry(0, 8, dtype="Q4")}, bytes(8), "'a': unknown dtype 'Q4'; known: BOOL"),
    "dtype is a list": ({"a": entry(0, 8, dtype=["F32"])}, bytes(8), "unknown dtype"),
    "shape and bytes disagree": ({"a": entry(0, 8, [3])}, bytes(8), r"F32 \[3\] needs 12 bytes, the header gives 8"),
    "negative size": ({"a": entry(0, 8, [-1, -2])}, bytes(8), "shape must be"),
    "fractional size": ({"a": entry(0, 8, [2.0])}, bytes(8), "shape must be"),
    "true as a size": ({"a": entry(0, 4, [True])}, bytes(4), "shape must be"),
    "too many axes": ({"a": entry(0, 4, [1] * 100)}, bytes(4), "shape must be"),
    "empty but astronomic": ({"a": entry(0, 0, [0, 2**62, 2**62])}, b"", "too large"),
    "backwards": ({"a": entry(8, 0, [0])}, bytes(8), "needs 0 bytes"),
    "one offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "two byte positions"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "must hold dtype, shape"),
    "entry is a number": ({"a": 1}, b"", "must hold dtype"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "object of strings"),
    "metadata a list": ({"__metadata__": []}, b"", "object of strings"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_broken_header(tmp_path, name):
    header, data, match = HEADERS[name]
    refused(write(tmp_path / "x.safetensors", header, data), match)


def test_duplicate_key_is_refused_where_the_reference_takes_it(tmp_path):
    first, second = json.dumps(entry(0, 8)), json.dumps(entry(0, 8))
    path = write(tmp_path / "x.safetensors", f'{{"a":{first},"a":{second}}}'.encode(), bytes(8))
    assert load_file(path).keys() == {"a"}
    refused(path, "duplicate key in the header: 'a'")
    inside = b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    refused(write(tmp_path / "y.safetensors", inside, bytes(8)), "duplicate key in the header: 'dtype'")


def test_impostors_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    assert ".ckpt" in refused(path, "PyTorch pickle")
    path.write_bytes(b"\x80\x02}q\x00." + bytes(100))
    refused(path, "Python pickle")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    refused(path, "git-lfs pointer")
    path.write_bytes(b"<!DOCTYPE html><html>" + b" " * 200)
    refused(path, "web page")


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "No such file")
    (tmp_path / "folder.safetensors").mkdir()
    refused(tmp_path / "folder.safetensors", "Is a directory")
    with pytest.raises(DataError, match=r"known: \.safetensors"):
        read_tensors(tmp_path / "a.onnx")


def test_every_truncation_is_an_error(tmp_path):
    save_safetensors(tmp_path / "a.safetensors", {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.float16)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "short|truncated|header")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_fuzzed_headers_never_do_worse_than_a_data_error(tmp_path_factory, data):
    """Any bytes give a DataError, or tensors that the reference implementation also reads."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    content = bytearray(b"".join(encode({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, {"k": "v"})))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        replacement = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b'"', b"0", b"9", b"[", b"}", b","])))
        content[place : place + data.draw(st.integers(0, 3))] = replacement
        if not content:
            break
    path.write_bytes(content)
    try:
        tensors = read_safetensors(path).tensors
    except DataError:
        return
    theirs = load_file(path)
    assert theirs == {name: (array.shape, as_bytes(array)) for name, array in tensors.items()}


@settings(max_examples=100, deadline=None)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["F32", "F16"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_fuzzed_structures_never_do_worse_than_a_data_error(tmp_path_factory, header):
    path = write(tmp_path_factory.getbasetemp() / "fuzz2.safetensors", header, bytes(8))
    try:
        read_safetensors(path)
    except DataError:
        return
    load_file(path)


def test_the_reference_agrees_on_the_rest_of_the_faults(tmp_path):
    """The reference refuses all broken headers above except those listed here, where sdjax is stricter on purpose."""
    accepted = set()
    for name, (header, data, _) in HEADERS.items():
        path = write(tmp_path / "x.safetensors", header, data)
        try:
            load_file(path)
            accepted.add(name)
        except SafetensorError:
            pass
    assert accepted <= {"too many axes", "empty but astronomic", "trailing bytes, no tensors"}


# Writing.


def test_unwritable_dtype_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="'c': safetensors has no dtype complex64"):
        save_safetensors(tmp_path / "a.safetensors", {"c": np.ones(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_do_not_fit_in_float16_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"w": np.float32([65504, -1, np.inf])}, dtype=np.float16)
    before = path.read_bytes()
    with pytest.raises(DataError, match="'w' holds numbers above 65504, which do not fit in float16"):
        save_safetensors(path, {"w": np.float32([65504, -7e4])}, dtype=np.float16)
    assert path.read_bytes() == before


def test_disk_full_keeps_the_old_file(tmp_path):
    """A limit on the size of files, which acts like a full disk, stops the write in the middle of the data."""
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": np.zeros(4, np.float32)})
    before = path.read_bytes()
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import numpy as np
from sdjax.formats.safetensors_file import save_safetensors
save_safetensors({str(path)!r}, {{"a": np.ones(100_000, np.float32)}})
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "File too large" in result.stderr
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_killed_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_safetensors(path, {"a": np.zeros(4, np.float32)})
    before = path.read_bytes()
    code = f"""
import numpy as np
from sdjax.formats.safetensors_file import save_safetensors
print("ready", flush=True)
while True:
    save_safetensors({str(path)!r} , {{f"t{{i}}": np.full(300_000, i, np.float32) for i in range(20)}})
"""
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if path.read_bytes() != before:
            tensors = read_safetensors(path).tensors
            assert len(tensors) == 20
            assert all((tensors[f"t{i}"] == i).all() for i in range(20))
