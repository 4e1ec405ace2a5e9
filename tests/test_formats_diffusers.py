"""Model folders: what a folder may hold is read, what we save reads back, and every fault is named."""

import dataclasses
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_formats_parameter_names import TABLES, UNET, VAE, load, state_dict

from sdjax.errors import DataError
from sdjax.formats.diffusers_folder import read_folder, save_folder
from sdjax.formats.safetensors_file import read_safetensors, save_safetensors
from sdjax.trees import leaves

# Folders, written by hand.

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
}


def make_folder(path, index=None, configs=None):
    index = INDEX if index is None else index
    path.mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps(index))
    for name, table in TABLES.items():
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps((configs or {}).get(name, {"in_channels": 4})))
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_safetensors(path / name / f"{stem}.safetensors", state_dict(table))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text("{}")
    (path / "tokenizer" / "merges.txt").write_text("")
    return path


def test_reads_a_folder(tmp_path):
    folder = read_folder(make_folder(tmp_path / "m"))
    assert folder.scheduler == {"_class_name": "DDIMScheduler"}
    assert folder.configs.keys() == {"unet", "vae", "text_encoder"}
    assert folder.tokenizers == {"tokenizer": tmp_path / "m" / "tokenizer"}
    assert folder.tensors("unet").keys() == state_dict(UNET).keys()
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder.path = tmp_path


def folder_fault(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        read_folder(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


WRONG_KINDS = {
    "Flux": (
        {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
        "a FluxPipeline, which has no U-Net; sdjax reads Stable Diffusion 1.x",
    ),
    "SD3": (
        {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]},
        "a StableDiffusion3Pipeline",
    ),
    "refiner": (
        INDEX | {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None],
                 "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
        "an SDXL refiner",
    ),
    "AltDiffusion": (
        INDEX | {"_class_name": "AltDiffusionPipeline",
                 "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]},
        "a AltDiffusionPipeline whose text_encoder is a RobertaSeriesModelWithTransformation, not CLIPTextModel",
    ),
    "video": (
        INDEX | {"_class_name": "TextToVideoSDPipeline", "unet": ["diffusers", "UNet3DConditionModel"]},
        "unet is a UNet3DConditionModel",
    ),
    "no VAE": ({key: value for key, value in INDEX.items() if key != "vae"}, "names no vae"),
    "broken": ([1, 2], "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_KINDS)
def test_other_kinds_of_model_are_named(tmp_path, kind):
    index, match = WRONG_KINDS[kind]
    folder_fault(make_folder(tmp_path / "m", index), match)


def test_other_input_channels_are_named(tmp_path):
    index = INDEX | {"_class_name": "StableDiffusionInstructPix2PixPipeline"}
    path = make_folder(tmp_path / "m", index, {"unet": {"in_channels": 8}})
    folder_fault(path, "StableDiffusionInstructPix2PixPipeline whose U-Net takes 8 channels")


def test_single_models_and_other_folders_are_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    folder_fault(tmp_path, "holds a single ControlNetModel, not a whole pipeline")
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    folder_fault(tmp_path, "holds a single LORA")
    (tmp_path / "adapter_config.json").unlink()
    folder_fault(tmp_path, "no model_index.json, .* it holds nothing")
    (tmp_path / "notes.txt").write_text("x")
    folder_fault(tmp_path, "it holds notes.txt")
    folder_fault(tmp_path / "notes.txt", "a file where a model folder is expected")
    folder_fault(tmp_path / "none" / "at" / "all", "no such folder, and not a hub id")


def test_missing_files_are_named_with_what_was_looked_for(tmp_path):
    path = make_folder(tmp_path / "m")
    (path / "unet" / "diffusion_pytorch_model.safetensors").rename(path / "unet" / "other.safetensors")
    message = folder_fault(path, r"unet: no weights; looked for diffusion_pytorch_model\.safetensors, ")
    assert "diffusion_pytorch_model.fp16.safetensors" in message
    assert "diffusion_pytorch_model.bin" in message
    (path / "vae" / "config.json").unlink()
    folder_fault(path, r"vae/config\.json: missing")
    (path / "vae" / "config.json").write_text("{'a': 1}")
    folder_fault(path, r"vae/config\.json: not JSON")
    (path / "vae" / "config.json").write_text("{}")
    (path / "tokenizer" / "vocab.json").unlink()
    folder_fault(path, "tokenizer/ has neither tokenizer.json nor vocab.json")
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    (path / "unet" / "other.safetensors").rename(path / "unet" / "diffusion_pytorch_model.safetensors")
    read_folder(path)
    (path / "scheduler" / "scheduler_config.json").unlink()
    folder_fault(path, r"scheduler_config\.json: missing")


def test_choice_among_weight_files(tmp_path):
    path = make_folder(tmp_path / "m")
    unet = path / "unet"
    plain = unet / "diffusion_pytorch_model.safetensors"
    half = unet / "diffusion_pytorch_model.fp16.safetensors"
    save_safetensors(half, state_dict(UNET, dtype=np.float16))
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"never opened")
    assert read_folder(path).weights["unet"] == (plain,)
    assert read_folder(path, variant="fp16").weights["unet"] == (half,)
    assert read_folder(path, variant="fp16").weights["vae"][0].name == "diffusion_pytorch_model.safetensors"
    assert read_folder(path, variant="ema").weights["unet"] == (plain,)
    plain.unlink()
    assert read_folder(path).weights["unet"] == (half,)
    half.unlink()
    assert read_folder(path).weights["unet"] == (unet / "diffusion_pytorch_model.bin",)


def test_shards(tmp_path):
    path = make_folder(tmp_path / "m")
    unet = path / "unet"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    tensors = state_dict(UNET)
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    halves = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for file, keys in halves.items():
        save_safetensors(unet / file, {key: tensors[key] for key in keys})
    places = {key: file for file, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read = read_folder(path).tensors("unet")
    assert read.keys() == tensors.keys()
    for key, array in tensors.items():
        np.testing.assert_array_equal(read[key], array)

    save_safetensors(unet / next(iter(halves)), tensors)
    with pytest.raises(DataError, match="tensors another shard holds too"):
        read_folder(path).tensors("unet")
    (unet / next(iter(halves))).unlink()
    folder_fault(path, "shards missing: diffusion_pytorch_model-00001-of-00002.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    folder_fault(path, "names a file outside its folder")
    index.write_text(json.dumps({"weight_map": ["a"]}))
    folder_fault(path, "no table weight_map")


# Saving.


def save(path, **changes):
    source = path.with_name(f"{path.name}-tokenizer")
    source.mkdir(exist_ok=True)
    (source / "vocab.json").write_text("{}")
    arguments = {
        "configs": {
            "unet": {"in_channels": 4},
            "vae": {},
            "text_encoder": {"architectures": ["FlaxCLIPTextModel"], "_name_or_path": "/home/me"},
        },
        "params": {name: load(state_dict(table), table) for name, table in TABLES.items()},
        "tokenizers": {"tokenizer": source},
        "scheduler": {"_class_name": "FlaxDDIMScheduler", "beta_start": 0.00085},
    } | changes
    save_folder(path, **arguments)


def test_saved_folder_reads_back(tmp_path):
    path = tmp_path / "m"
    save(path, model_index={"_class_name": "FlaxStableDiffusionPipeline", "safety_checker": ["x", "FlaxY"]})
    text = json.dumps([json.loads(file.read_text()) for file in path.rglob("*.json")])
    assert "Flax" not in text
    folder = read_folder(path)
    assert folder.model_index["_class_name"] == "StableDiffusionPipeline"
    for name in ("feature_extractor", "safety_checker", "image_encoder"):
        assert folder.model_index[name] == [None, None]
    assert folder.scheduler == {"_class_name": "DDIMScheduler", "beta_start": 0.00085}
    assert folder.configs["unet"] == {"_class_name": "UNet2DConditionModel", "in_channels": 4}
    for name, table in TABLES.items():
        for (_, one), (_, other) in zip(
            leaves(load(folder.tensors(name), table)), leaves(load(state_dict(table), table)), strict=True
        ):
            np.testing.assert_array_equal(one, other)
    assert "text_model.final_layer_norm.bias" in folder.tensors("text_encoder")
    assert "text_projection.weight" in folder.tensors("text_encoder")
    (stored,) = folder.weights["unet"]
    assert read_safetensors(stored).metadata == {"format": "pt"}


def test_saving_in_another_dtype(tmp_path):
    configs = {"unet": {}, "vae": {}, "text_encoder": {"dtype": "float32"}}
    save(tmp_path / "m", dtype=jnp.bfloat16, configs=configs)
    folder = read_folder(tmp_path / "m")
    assert folder.configs["text_encoder"]["dtype"] == "bfloat16"
    assert all(array.dtype == ml_dtypes.bfloat16 for array in folder.tensors("unet").values())


def test_saving_replaces_a_model_and_spares_anything_else(tmp_path):
    path = tmp_path / "m"
    save(path)
    (path / "stray.txt").write_text("of the old model")
    save(path, scheduler={"_class_name": "PNDMScheduler"})
    assert read_folder(path).scheduler["_class_name"] == "PNDMScheduler"
    assert not (path / "stray.txt").exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m", "m-tokenizer"]
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match="not a model folder; it is left alone"):
        save(photos)
    assert (photos / "a.png").exists()


def test_a_folder_saved_onto_itself_keeps_its_tokenizer(tmp_path):
    save(tmp_path / "m")
    save(tmp_path / "m", tokenizers=read_folder(tmp_path / "m").tokenizers)
    assert (tmp_path / "m" / "tokenizer" / "vocab.json").exists()


def test_failed_save_leaves_the_old_folder(tmp_path):
    path = tmp_path / "m"
    save(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    complex_kernel = {"conv_in": {"kernel": np.ones((2, 2), np.complex64)}}
    with pytest.raises(DataError, match="complex64"):
        save(path, params={"vae": load(state_dict(VAE), VAE), "unet": complex_kernel})
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["m", "m-tokenizer"]


def test_killed_while_saving_leaves_the_old_folder_and_the_next_save_cleans_up(tmp_path):
    path = tmp_path / "m"
    save(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    code = f"""
import numpy as np
from sdjax.formats.diffusers_folder import save_folder
big = {{f"layers_{{i}}": {{"kernel": np.ones((1000, 4000), np.float32)}} for i in range(100)}}
save_folder({str(path)!r}, configs={{"unet": {{}}}}, params={{"unet": big}}, tokenizers={{}},
            scheduler={{"_class_name": "x"}})
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".m.*.partial/unet/.diff*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert len(list(tmp_path.glob(".m.*.partial"))) == 1
    save(path)
    assert list(tmp_path.glob(".m.*")) == []


# The hub (47, 48): a real server on this machine that answers as the hub does.


class Hub(http.server.BaseHTTPRequestHandler):
    """`good/model` is a folder; `cut/model` breaks off its first download; others answer with the hub's errors."""

    folder: Path
    requested: list[str]
    cut: set[str]
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.requested.append(self.path)
        owner = re.search(r"^/(?:api/models/)?(\w+)/", self.path)
        name = owner[1] if owner else ""
        errors = {"gated": (403, "GatedRepo"), "none": (404, "RepoNotFound")}
        if name in errors:
            status, code = errors[name]
            return self.send(status, b"", {"X-Error-Code": code})
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if "/revision/other" in self.path:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if self.path.startswith("/api/") and "/tree/" in self.path:
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
                for name, file in files.items()
            ]
            return self.send(200, json.dumps(tree).encode())
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in files]
            return self.send(200, json.dumps({"id": "x", "sha": "0" * 40, "siblings": siblings}).encode())
        if "/resolve/" not in self.path:
            return self.send(404, b"")
        wanted = self.path.split("/resolve/")[1].split("/", 1)[1]
        content = files[wanted].read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(wanted.encode()).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        key = f"{name}/{wanted}"
        broken = name == "cut" and self.command == "GET" and wanted.endswith(".safetensors") and key not in self.cut
        if broken:
            self.cut.add(key)
        return self.send(206 if start else 200, content[start:], headers, broken)

    def send(self, status, body, headers=None, broken=False):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = broken

    do_GET = do_HEAD = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    folder = make_folder(tmp_path / "remote")
    save_safetensors(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors", state_dict(UNET, dtype=np.float16))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"the same again")
    (folder / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"and again")
    (folder / "big-single-file.ckpt").write_bytes(b"and again")
    handler = type("OneHub", (Hub,), {"folder": folder, "requested": [], "cut": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(*sources, offline=False, address=None):
        """What read_folder makes of each source in a process of its own (the hub's address is read at import)."""
        code = """
import json, sys
from sdjax.errors import DataError
from sdjax.formats.diffusers_folder import read_folder
for source in json.loads(sys.argv[1]):
    try:
        folder = read_folder(*source[:1], **(source[1] if len(source) > 1 else {}))
        print(json.dumps([str(folder.path), sorted(folder.tensors("unet"))]))
    except DataError as error:
        print(json.dumps(str(error)))
"""
        environment = {
            **os.environ,
            "HF_ENDPOINT": address or f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", code, json.dumps(sources)]
        result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return [json.loads(line) for line in result.stdout.splitlines()]

    ask.handler = handler
    yield ask
    server.shutdown()
    server.server_close()


def test_hub(hub):
    answers = hub(
        ["good/model"],
        ["cut/model"],
        ["gated/model"],
        ["none/model"],
        ["good/model", {"revision": "other"}],
        ["none//model"],
        ["bad..id/model"],
        ["good/model", {"variant": "fp16"}],
    )
    (path, names), (_, cut_names), gated, missing, revision, bad, dots, (half, _) = answers
    assert names == cut_names == sorted(state_dict(UNET))
    assert "snapshots" in path
    assert gated == "gated/model: a gated model: accept its terms on its hub page and log in with `hf auth login`"
    assert missing.startswith("none/model: no such folder, and no such model on the hub: check the name")
    assert "has no revision 'other'" in revision
    assert bad == "none//model: no such folder, and not a hub id of the form owner/name"
    assert "not a hub id" in dots
    fetched = {request.split("/", 4)[-1] for request in hub.handler.requested if "/resolve/" in request}
    assert any("diffusion_pytorch_model.safetensors" in name for name in fetched)
    assert not any(name.endswith((".bin", ".msgpack", ".ckpt")) for name in fetched)
    # What was cut off was fetched again, and names == cut_names says whole.
    assert hub.handler.cut == {
        "cut/unet/diffusion_pytorch_model.safetensors",
        "cut/vae/diffusion_pytorch_model.safetensors",
        "cut/text_encoder/model.safetensors",
    }
    assert half == path
    # Once fetched, it is there offline; what is not says what to do.
    (found,), (nowhere,) = hub(["good/model"], offline=True), hub(["new/model"], offline=True)
    assert found == [path, names]
    assert nowhere.startswith("new/model: no such folder, not in the cache, and the hub cannot be reached")
