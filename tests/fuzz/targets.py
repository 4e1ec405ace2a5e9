"""What the fuzz run feeds: for each reader some good inputs, the function that reads one, and how inputs are damaged.

A reader may return, or raise an `SdjaxError` of one or two lines. Anything else is a fault.
"""

import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sdjax.data import images
from sdjax.data.records import scan
from sdjax.draw import grids, jobs
from sdjax.errors import SdjaxError
from sdjax.formats.diffusers_folder import read_folder
from sdjax.formats.embedding_file import load_embedding
from sdjax.formats.lora_file import load_lora
from sdjax.formats.safetensors_file import encode, read_safetensors
from sdjax.formats.single_file import read_single_file
from sdjax.formats.torch_file import read_state_dict
from sdjax.text import syntax
from sdjax.train import config_file


class Target(NamedTuple):
    """A reader. read: gets the input, and an empty folder of its own."""

    seeds: Sequence[bytes]
    read: Callable[[bytes, Path], object]


class Exploit:
    """Pickled, it makes a file when a pickle runs it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


TOKENS = [
    *(b"\x00", b"\xff", b"\\ud83d", b"\\u0000", b"\xe2\x80\xa8", b"\xed\xa0\xbd", b"\x1b[31m", b"../", b"\n", b"\r"),
    *(b"(" * 50, b"[" * 300, b"[a:", b":1e999)", b"<lora:x:nan>", b"{" * 2000, b"]" * 50, b"AND", b"BREAK", b"|"),
    *(b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"true", b'"', b"'", b",", b"=", b"[[stages]]"),
    *(b"\x85" * 100, b"h\x00", b"\x86" * 50, b"\x93", b"R", b"\x81", b"Q", b".", b"(", b"e", b"u", b"]", b"}"),
]


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The content with one to six damages: flipped, cut, doubled or moved bytes, other numbers, and tokens."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data) + 1)
        end = min(len(data), at + draw.choice((1, 2, 8, 64, 500)))
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[at:end]
        elif kind == 2:
            data[at:at] = data[at:end]
        elif kind == 3:
            data[at:at] = draw.choice(TOKENS)
        elif kind == 4:
            data[at:end] = draw.choice(TOKENS)
        elif kind == 5:
            data[at:end] = draw.randbytes(end - at)
        else:
            del data[at:]
    return bytes(data)


def fault(target: Target, content: bytes, folder: Path) -> str:
    """How a reader misbehaves on an input; empty if it does not."""
    try:
        target.read(content, folder)
    except SdjaxError as error:
        return "" if len(str(error).splitlines()) <= 2 else f"a message of many lines: {str(error)[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


def _torch(content: object) -> bytes:
    graph, file = pickle.dumps(content, 2), io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", graph)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", b"\x00\x00\x80\x3f" * 8)
    return file.getvalue()


def _legacy(content: bytes) -> bytes:
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + content + b"\x80\x02]q\x00X\x01\x00\x00\x000q\x01a." + struct.pack("<q", 8) + b"\x00\x00\x80\x3f" * 8


_TENSOR = (
    b"\x80\x02}q\x00X\x01\x00\x00\x00wq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((X\x07\x00\x00\x00storageq\x03"
    b"ctorch\nFloatStorage\nq\x04X\x01\x00\x00\x000q\x05X\x03\x00\x00\x00cpuq\x06K\x08tq\x07QK\x00K\x02K\x04\x86q\x08"
    b"K\x04K\x01\x86q\t\x89ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs."
)


def _zipped(graph: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", graph)
        archive.writestr("archive/data/0", b"\x00\x00\x80\x3f" * 8)
    return file.getvalue()


def _pictures() -> list[bytes]:
    found = []
    for mode, kind in (("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("RGB", "JPEG"), ("L", "TIFF"),
                       ("RGB", "BMP"), ("RGB", "WEBP")):  # fmt: skip
        file = io.BytesIO()
        Image.new(mode, (24, 24), 5).save(file, kind)
        found.append(file.getvalue())
    return found


def _as_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def reader(content: bytes, folder: Path) -> object:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return reader


def _data(name: str) -> Callable[[bytes, Path], object]:
    def reader(content: bytes, folder: Path) -> object:
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        (folder / name).write_bytes(content)
        return scan(folder, missing_caption="empty")

    return reader


def _shards() -> dict[str, bytes]:
    """Suffix -> a shard of three pictures with captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tar, parquet = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for number, content in enumerate(_pictures()[:3]):
            parts = {"png": content, "txt": b"a caption", "json": b'{"caption": "another"}'}
            for suffix, part in parts.items():
                member = tarfile.TarInfo(f"{'long' * 30 * (number % 2)}{number}.{suffix}")
                member.size = len(part)
                file.addfile(member, io.BytesIO(part))
    images = [{"bytes": content, "path": None} for content in _pictures()[:3]]
    pq.write_table(pa.table({"image": images, "text": ["a", "b", "c"]}), parquet)
    return {".tar": tar.getvalue(), ".parquet": parquet.getvalue()}


def _opened(path: Path) -> object:
    return [record.file.open("rb").read() for record in scan(path, missing_caption="empty")]


def _prompt(content: bytes, folder: Path) -> object:
    text = content.decode("utf-8", "surrogateescape")
    plain, _ = syntax.without_loras(text)
    for part in syntax.subprompts(plain):
        for step in set(syntax.at_each_step(part.text, 5)):
            syntax.emphasis(step)
    return None


def _jobs(content: bytes, folder: Path) -> object:
    wanted = jobs.read_jobs(content.decode("utf-8", "replace").split("\n"), {}, "jobs.jsonl")
    return jobs.check_alone(wanted)


def make_targets(model: Path, marker: Path) -> dict[str, Target]:
    """Name -> reader. model: a small model folder. marker: a file that must not come to be."""
    shapes = {"unet": {"conv_in": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}}
    tensors = {"w": np.ones((2, 4), np.float32), "emb_params": np.ones((1, 8), np.float16)}
    plain = b"".join(bytes(part) for part in encode(tensors, {"format": "pt", "name": "<w>"}))
    lora = {f"lora_unet_conv_in.{key}": np.ones(shape, np.float32) for key, shape in
            (("lora_down.weight", (2, 4, 3, 3)), ("lora_up.weight", (8, 2, 1, 1)), ("alpha", ()))}  # fmt: skip
    adapter = b"".join(bytes(part) for part in encode(lora, {"ss_network_module": "networks.lora"}))
    names = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.out.2.weight",
             "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
             "first_stage_model.encoder.conv_in.weight")  # fmt: skip
    single = b"".join(bytes(part) for part in encode({name: np.ones((4, 4, 3, 3), np.float32) for name in names}))
    exploits = [_zipped(pickle.dumps(Exploit(marker), 2)), _legacy(pickle.dumps({"a": Exploit(marker)}, 2))]
    torch = [_zipped(_TENSOR), _legacy(_TENSOR), *exploits]
    config = config_file.to_toml(config_file.from_table({
        "model": "tiny", "output": "runs/x", "data": {"path": "images", "repeats": {"a/*": 2}},
        "stages": [{"name": "a", "train": ["lora"], "steps": 5, "learning_rate": {"unet": 1e-4}}],
    })).encode()  # fmt: skip
    configs = [json.dumps(json.loads((model / name).read_text())).encode() for name in ("model_index.json",)]

    def folder_with(content: bytes, folder: Path) -> object:
        for path in model.rglob("*.json"):
            place = folder / path.relative_to(model)
            place.parent.mkdir(exist_ok=True, parents=True)
            place.write_bytes(path.read_bytes())
        (folder / "model_index.json").write_bytes(content)
        return read_folder(folder, weights=False)

    return {
        "safetensors": Target([plain, adapter], _as_file("a.safetensors", read_safetensors)),
        "torch": Target(torch, _as_file("a.pt", read_state_dict)),
        "tar": Target([_shards()[".tar"]], _as_file("a.tar", _opened)),
        "parquet": Target([_shards()[".parquet"]], _as_file("a.parquet", _opened)),
        "embedding": Target([plain], _as_file("a.safetensors", load_embedding)),
        "embedding.pt": Target(torch, _as_file("a.pt", load_embedding)),
        "lora": Target([adapter], _as_file("a.safetensors", lambda path: load_lora(path, shapes))),
        "single file": Target(
            [single], _as_file("a.safetensors", lambda path: read_single_file(path, tokenizer=model))
        ),
        "model_index": Target(configs, folder_with),
        "picture": Target(_pictures(), _as_file("a.png", images.read_picture)),
        "training picture": Target(
            _pictures(), _as_file("a.png", lambda path: images.read_image(path, images.Size(16, 16)))
        ),
        "metadata": Target([b'{"file_name": "a.png", "text": "a caption"}\n'], _data("metadata.jsonl")),
        "caption": Target(["a caption, häuser".encode()], _data("a.txt")),
        "config": Target([config], _as_file("a.toml", config_file.load)),
        "jobs": Target([b'{"prompt": "a [b:c:3] (d:1.2)", "steps": 5, "width": 64, "seed": 1}'], _jobs),
        "prompt": Target([b"a (cat:1.2) [dog|fox] [a:b:0.5] AND <lora:x:0.5> b :1.2 BREAK c"], _prompt),
        "grid": Target([b"steps=5,10", rb"prompt=a\, b,c", b"lora=a.pt:0.5,none"], lambda content, folder: (
            grids.parse_axis(content.decode("utf-8", "surrogateescape"))
        )),
    }  # fmt: skip
