"""PyTorch's files: real files are read without torch, and hostile ones are refused without running anything."""

import io
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdjax.errors import DataError
from sdjax.formats.torch_file import read_state_dict, read_torch
from sdjax.formats.weights_file import read_tensors


class Named:
    """Is pickled as a reference to a global, which this machine need not have."""

    def __init__(self, module, name):
        self.text = f"c{module}\n{name}\n".encode()


class Writer(pickle._Pickler):
    """Pickles as torch.save does, without torch: storages by persistent id, functions by name."""

    def persistent_id(self, obj):
        return obj.description if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(obj.text)
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


class Storage:
    def __init__(self, kind, key, count, module="torch"):
        self.description = ("storage", Named(module, kind), key, "cpu", count)


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


REBUILD = Named("torch._utils", "_rebuild_tensor_v2")
DICT = Call(Named("collections", "OrderedDict"))


def tensor(storage, shape, strides, offset=0):
    return Call(REBUILD, storage, offset, shape, strides, False, DICT)


def dumped(obj):
    stream = io.BytesIO()
    Writer(stream, protocol=2).dump(obj)
    return stream.getvalue()


def zipped(path, graph, storages=None, extra=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", graph)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path


def refused(path, match, reader=read_torch):
    with pytest.raises(DataError, match=match) as caught:
        reader(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


ONE = {"w": tensor(Storage("FloatStorage", "0", 6), (2, 3), (3, 1))}
NUMBERS = np.arange(6, dtype=np.float32)


# Reading.


@pytest.mark.parametrize("order", ["little", "big", None])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", np.float32),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
    ],
)
def test_byte_orders(tmp_path, order, kind, dtype):
    """The entry `byteorder` is accepted, and big-endian numbers are right."""
    numbers = NUMBERS.astype(dtype)
    data = numbers.view(f"u{numbers.itemsize}").astype(f"{'>' if order == 'big' else '<'}u{numbers.itemsize}").tobytes()
    extra = [("archive/byteorder", order)] if order else []
    graph = dumped({"w": tensor(Storage(kind, "0", 6), (3, 2), (1, 3))})
    read = read_state_dict(zipped(tmp_path / "a.pt", graph, {"0": data}, extra))["w"]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, numbers.reshape(2, 3).T)


def test_unknown_byteorder(tmp_path):
    path = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()}, [("archive/byteorder", "middle")])
    refused(path, "byteorder")


def test_tensors_are_read_only_views_of_one_storage(tmp_path):
    storage = Storage("FloatStorage", "0", 6)
    graph = dumped({"a": tensor(storage, (2,), (1,), 4), "b": tensor(storage, (6,), (1,))})
    read = read_torch(zipped(tmp_path / "a.pt", graph, {"0": NUMBERS.tobytes()}))
    np.testing.assert_array_equal(read["a"], [4, 5])
    assert np.shares_memory(read["a"], read["b"])
    with pytest.raises(ValueError, match="read-only"):
        read["a"][0] = 1


def test_state_dict_is_unwrapped_and_bookkeeping_left_out(tmp_path):
    graph = dumped({"state_dict": ONE, "global_step": 875000, "epoch": 3})
    path = zipped(tmp_path / "a.ckpt", graph, {"0": NUMBERS.tobytes()})
    assert read_state_dict(path).keys() == {"w"}
    assert read_torch(path)["global_step"] == 875000
    assert read_tensors(path).tensors.keys() == {"w"}
    refused(zipped(tmp_path / "b.ckpt", dumped({"lr": 1.0})), "no tensors", read_state_dict)
    refused(zipped(tmp_path / "c.ckpt", dumped([1])), "holds a list", read_state_dict)


@pytest.mark.parity
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_saves(tmp_path, modern, protocol):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    storage = torch.arange(12, dtype=torch.float32)
    saved = {
        "state_dict": model.state_dict(),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "f16": torch.randn(4).half(),
        "bf16": torch.randn(4).bfloat16(),
        "f64": torch.randn(2, 2).double(),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
        "u16": torch.arange(3).to(torch.uint16),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "transposed": storage.view(3, 4).T,
        "part": storage[4:8],
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "bytes": b"abc",
        "device": torch.device("cpu"),
        "numpy": np.float64(3.0),
        "text": "ä",
        "big": 2**70,
        "none": None,
        "ordered": OrderedDict(a=1),
        "set": {1, 2},
    }
    path = tmp_path / "a.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=modern, pickle_protocol=protocol)
    read = read_torch(path)
    assert read.keys() == saved.keys()
    for name, value in {**saved, **saved["state_dict"]}.items():
        if isinstance(value, torch.Tensor):
            ours = read[name] if name in read else read["state_dict"][name]
            assert ours.shape == tuple(value.shape), name
            np.testing.assert_array_equal(ours.astype(np.float64), value.detach().to(torch.float64).numpy())
    assert [read[key] for key in ("size", "bytes", "text", "big", "none", "ordered")] == [
        (1, 2),
        b"abc",
        "ä",
        2**70,
        None,
        {"a": 1},
    ]
    assert read["dtype"] == np.float16
    assert np.shares_memory(read["transposed"], read["part"])


@pytest.mark.parity
def test_old_embedding_wrapped_in_a_parameter_dict(tmp_path):
    """A1111's early Textual Inversion files hold a pickled torch.nn.ParameterDict."""
    import torch

    parameters = {"_parameters": OrderedDict({"*": torch.randn(2, 768)})}
    graph = {"string_to_token": {"*": torch.tensor(265)}, "name": "x", "step": 500, "string_to_param": parameters}
    torch.save(graph, tmp_path / "a.pt")
    assert read_torch(tmp_path / "a.pt")["string_to_param"]["_parameters"]["*"].shape == (2, 768)
    torch.save({"p": torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(2))})}, tmp_path / "b.pt")
    np.testing.assert_array_equal(read_torch(tmp_path / "b.pt")["p"]["_parameters"]["a"], [1, 1])


@pytest.mark.parity
def test_whole_module_is_refused_by_name(tmp_path):
    import torch

    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "'torch.nn.modules.linear.Linear', which is not on the list")


# Hostile files. A marker file shows whether anything ran.


def attacks(marker):
    command = f"touch {marker}"

    class System:
        def __reduce__(self):
            return os.system, (command,)

    class Popen:
        def __reduce__(self):
            return subprocess.Popen, (["touch", str(marker)],)

    class Eval:
        def __reduce__(self):
            return eval, (f"open({str(marker)!r}, 'w').close()",)

    class State:
        def __reduce__(self):
            return OrderedDict, (), {"__class__": System()}

    quoted = repr(command).encode()
    return {
        **{
            f"{kind.__name__}, protocol {p}": pickle.dumps(kind(), p)
            for kind in (System, Popen, Eval)
            for p in (2, 3, 4, 5)
        },
        "state": pickle.dumps(State(), 2),
        "text opcodes": pickle.dumps(System(), 0),
        "inst": b"(S" + quoted + b"\nios\nsystem\n.",
        "obj": b"\x80\x02(cos\nsystem\nU" + bytes([len(command)]) + command.encode() + b"o.",
        "newobj": b"\x80\x02cos\nsystem\nU" + bytes([len(command)]) + command.encode() + b"\x85\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c"
        + bytes([len(command)])
        + command.encode()
        + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.fromkeys.x.y\x93.",
        "extension": b"\x80\x02\x82\x01.",
        "through an allowed function": dumped(
            Call(Named("torch._tensor", "_rebuild_from_type_v2"), Named("os", "system"), None, (command,), None)
        ),
        "as a parameter": dumped(
            Call(Named("torch._utils", "_rebuild_parameter"), Call(Named("os", "system"), command), 0, 0)
        ),
        "attribute of a function": b"\x80\x02ccollections\nOrderedDict\n}U\x01aK\x01sb.",
        "persistent id": b"\x80\x02cos\nsystem\nQ.",
        "text persistent id": b"Pos.system\n.",
    }


ATTACKS = sorted(attacks("unused"))


@pytest.mark.parametrize("name", ATTACKS)
def test_code_never_runs(tmp_path, name):
    marker = tmp_path / "marker"
    attack = attacks(marker)[name]
    for number, path in enumerate(
        [
            zipped(tmp_path / "a.pt", attack),
            zipped(tmp_path / "b.pt", b"\x80\x02}U\x01a" + attack.removeprefix(b"\x80\x02")[:-1] + b"s."),
        ]
    ):
        with pytest.raises(DataError):
            read_torch(path)
        assert not marker.exists(), number
    plain = tmp_path / "c.bin"
    plain.write_bytes(attack)
    with pytest.raises(DataError):
        read_torch(plain)
    behind_the_magic = tmp_path / "d.bin"
    behind_the_magic.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + attack)
    with pytest.raises(DataError):
        read_torch(behind_the_magic)
    assert not marker.exists()


def test_the_marker_works(tmp_path):
    """Python's unpickler does run such a pickle, so the test above can fail."""
    pickle.loads(attacks(tmp_path / "marker")["System, protocol 2"])
    assert (tmp_path / "marker").exists()


def test_plain_pickle_of_data_is_not_a_torch_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(tmp_path / "a.bin", "plain Python pickle")


def test_a_dict_keyed_by_deeply_nested_tuples_does_not_crash_the_interpreter(tmp_path):
    graph = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."
    refused(zipped(tmp_path / "a.pt", graph), "nested more than 20 deep")
    refused(zipped(tmp_path / "a.pt", b"\x80\x02})\x85Ns."), "tuple for a key")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (b"](" + b")" + b"\x85" * 300_000 + b"e", "nested more than 20 deep"),  # killed the process when it was hashed
        (b"](]e", "the key of a storage is a list"),
        (b"]()e", "the key of a storage is a tuple"),
    ],
)
def test_strange_keys_of_storages_in_a_legacy_file(tmp_path, keys, message):
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}))
    (tmp_path / "a.pt").write_bytes(head + b"\x80\x02" + keys + b".")
    refused(tmp_path / "a.pt", message)


def test_names_that_are_no_text_are_never_printed(tmp_path):
    """A tuple of itself twice, 18 times over, has 260,000 items."""
    graph = b"\x80\x04)\x94" + b"".join(b"h" + bytes([i, ord("h"), i]) + b"\x86\x94" for i in range(18))
    refused(zipped(tmp_path / "a.pt", graph + b"h\x12h\x12\x93."), "by something that is not text")


def test_a_pickle_of_endless_instructions(tmp_path):
    refused(zipped(tmp_path / "a.pt", b"\x80\x02" + b"N0" * 600_000 + b"N."), "1000000 instructions|never does")


def test_memo_bomb(tmp_path):
    """One instruction with a huge memo index makes Python's unpickler in C reserve 64 GiB; here it is a dict key."""
    assert read_torch(zipped(tmp_path / "a.pt", b"\x80\x02Nr\xff\xff\xff\xff.")) is None


def test_zip_bomb(tmp_path):
    graph, zeros = dumped(ONE), bytes(50_000_000)
    packed = zipped(tmp_path / "a.pt", graph, {"0": zeros}, compression=zipfile.ZIP_DEFLATED)
    assert packed.stat().st_size < 100_000
    refused(packed, "compressed or encrypted")
    # An entry that is not compressed and claims more bytes than the file has.
    path = zipped(tmp_path / "b.pt", graph, {"0": NUMBERS.tobytes()})
    content = path.read_bytes()
    place = content.rindex(b"PK\x01\x02")
    claimed = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content[: place + 20] + claimed + content[place + 28 :])
    refused(path, "zip bomb|past the end")


def test_overlapping_zip_entries(tmp_path):
    """Many directory entries for the same bytes: Fifield's bomb, without compression."""
    path = zipped(tmp_path / "a.pt", dumped(ONE), {f"{i:02}": bytes(1000) for i in range(20)})
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    places, place = [], start
    while content[place : place + 4] == b"PK\x01\x02":
        places.append(place)
        lengths = struct.unpack("<HHH", content[place + 28 : place + 34])
        place += 46 + sum(lengths)
    for place in places[1:]:
        content[place + 20 : place + 28] = struct.pack("<II", start - 100, start - 100)
    path.write_bytes(content)
    refused(path, "zip bomb|past the end|[Oo]verlap|truncated")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "archive/../../evil", "archive\\..\\evil", "C:evil"])
def test_unsafe_entry_names(tmp_path, name):
    path = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()})
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("x")
        info.filename = name
        archive.writestr(info, b"x")
    refused(path, "unsafe zip entry name")


def test_duplicate_entries(tmp_path):
    path = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", NUMBERS.tobytes())
    refused(path, "duplicate entries")


@pytest.mark.parametrize(
    ("place", "content", "match"),
    [(6, b"\xff", "zip file version"), (8, b"\x00\x08", "broken"), (46, b"\xff", "broken|exactly one")],
)
def test_broken_directory(tmp_path, place, content, match):
    """A future version, and a name marked as UTF-8 that is not. zipfile raises another exception for each."""
    path = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()})
    whole = bytearray(path.read_bytes())
    start = whole.index(b"PK\x01\x02")
    whole[start + place : start + place + len(content)] = content
    if place == 8:
        whole[start + 46] = 0xFF
    path.write_bytes(whole)
    refused(path, match)


def test_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(tmp_path / "a.pt", "exactly one NAME/data.pkl")


SIX = Storage("FloatStorage", "0", 6)
WRONG_TENSORS = {
    "past the end": (tensor(SIX, (2, 3), (4, 1)), "reaches past its storage"),
    "offset past the end": (tensor(SIX, (1,), (1,), 6), "reaches past"),
    "expanded to terabytes": (tensor(SIX, (2**38,), (0,)), "reaches past"),
    "huge sizes": (tensor(SIX, (2**62, 2**62), (1, 1)), "shape"),
    "negative stride": (tensor(SIX, (2,), (-1,)), "described wrongly"),
    "negative offset": (tensor(SIX, (2,), (1,), -1), "described wrongly"),
    "true as a size": (tensor(SIX, (True,), (1,)), "described wrongly"),
    "strides too short": (tensor(SIX, (2, 3), (1,)), "strides"),
    "many axes": (tensor(SIX, (1,) * 40, (1,) * 40), "strides"),
    "sizes of text": (tensor(SIX, ("a",), ("b",)), "described wrongly"),
    "no storage": (tensor(3, (1,), (1,)), "described wrongly"),
    "storage missing": (tensor(Storage("FloatStorage", "7", 6), (1,), (1,)), "'7' is missing"),
    "storage outside": (tensor(Storage("FloatStorage", "../data.pkl", 6), (1,), (1,)), "is missing"),
    "storage too long": (tensor(Storage("FloatStorage", "0", 7), (1,), (1,)), "needs 28 bytes, the file has 24"),
    "storage described in two ways": (
        [tensor(SIX, (1,), (1,)), tensor(Storage("HalfStorage", "0", 6), (1,), (1,))],
        "in two ways",
    ),
    "unknown storage": (tensor(Storage("QInt8Storage", "0", 6), (1,), (1,)), "not on the list"),
    "wrong arguments": (Call(REBUILD), "wrong arguments"),
    "calling a number": (Call(3), "not a function"),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_wrong_tensors(tmp_path, name):
    graph, match = WRONG_TENSORS[name]
    refused(zipped(tmp_path / "a.pt", dumped({"w": graph}), {"0": NUMBERS.tobytes()}), match)


def test_every_truncation_is_an_error(tmp_path):
    whole = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()}).read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, "truncated|empty|not a PyTorch file")


@pytest.mark.parity
def test_every_truncation_of_a_legacy_file_is_an_error(tmp_path):
    import torch

    torch.save({"a": torch.arange(5.0), "b": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "a.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        refused(path, "truncated|empty|broken|missing|not a PyTorch file")


def test_unreadable(tmp_path):
    refused(tmp_path / "none.pt", "No such file")
    (tmp_path / "a.pt").write_bytes(b"hello")
    refused(tmp_path / "a.pt", "neither a zip nor a pickle")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fuzzed_pickles_never_do_worse_than_a_data_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.pt"
    graph = bytearray(dumped({"w": [tensor(SIX, (2, 3), (3, 1)), 1, (1.5, "x")], "d": DICT}))
    codes = st.sampled_from([opcode.code.encode("latin1") for opcode in pickletools.opcodes])
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, len(graph) - 1))
        graph[place : place + data.draw(st.integers(0, 2))] = data.draw(codes | st.binary(max_size=2))
    zipped(path, bytes(graph), {"0": NUMBERS.tobytes()})
    try:
        read_torch(path)
    except DataError:
        return


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_fuzzed_zips_never_do_worse_than_a_data_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.zip.pt"
    content = bytearray(zipped(path, dumped(ONE), {"0": NUMBERS.tobytes()}).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    path.write_bytes(content)
    try:
        read_torch(path)
    except DataError:
        return


def test_reading_needs_no_torch(tmp_path):
    path = zipped(tmp_path / "a.pt", dumped(ONE), {"0": NUMBERS.tobytes()})
    code = f"""
import sys
sys.modules["torch"] = None
from sdjax.formats.torch_file import read_state_dict
assert read_state_dict({str(path)!r})["w"].sum() == 15
assert not any(name.startswith(("torch.", "jax")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
