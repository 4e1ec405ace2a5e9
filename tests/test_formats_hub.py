"""Models on the hub: a local server answers as the hub does, and each answer gives a model or one error."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_formats_diffusers_folder import make_folder
from test_formats_parameter_names import UNET, state_dict

from sdjax.formats.safetensors_file import save_safetensors


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves a folder as `good/model`, and as `cut/model` with an interrupted first download. Others give errors."""

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
        """The result of read_folder for each source. A new process runs it: the hub's address is read at import."""
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
    # The interrupted files were fetched again, and are complete since names == cut_names.
    assert hub.handler.cut == {
        "cut/unet/diffusion_pytorch_model.safetensors",
        "cut/vae/diffusion_pytorch_model.safetensors",
        "cut/text_encoder/model.safetensors",
    }
    assert half == path
    # Offline a fetched model is read from the cache; for another the error tells what to do.
    (cached,), (absent,) = hub(["good/model"], offline=True), hub(["new/model"], offline=True)
    assert cached == [path, names]
    assert absent.startswith("new/model: no such folder, not in the cache, and the hub cannot be reached")
