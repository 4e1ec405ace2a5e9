"""`sdjax push` and `push_to_hub`: a local server takes what the hub would get."""

import base64
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from safetensors import safe_open

from sdjax import push
from sdjax.errors import ConfigError
from sdjax.formats import hub
from sdjax.train import file_metadata
from sdjax.train.loop import train

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # The newest HTTP library of huggingface_hub warns of how that uploads a file.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


class Hub(http.server.BaseHTTPRequestHandler):
    """Takes uploads as the hub does: large files by LFS, small ones in the commit. Nobody may write to `no/entry`."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    objects: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer right":
            return self.send(401, {"error": "Invalid username or password."})
        if self.path == "/api/whoami-v2":
            return self.send(200, {"name": "me", "type": "user"})
        return self.send(404, {}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner, _, name = asked["name"].rpartition("/")
            name = f"{asked.get('organization') or owner or 'me'}/{name}"
            if name == "no/entry":
                return self.send(403, {"error": "You don't have the rights to create a model under this namespace"})
            self.repositories.setdefault(name, {})
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return self.send(200, {"url": f"http://{self.headers['Host']}/{name}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in files]
            return self.send(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            host = f"http://{self.headers['Host']}"
            objects = [
                {**o, "actions": {"upload": {"href": f"{host}/put/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    self.repositories[name][value["path"]] = self.objects[value["oid"]]
            commit = {"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
            return self.send(200, commit)
        return self.send(404, {})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.removeprefix("/put/")
        self.objects[self.path.removeprefix("/put/")] = body
        self.send(200, {})

    def send(self, status, body, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def mode(path):
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"


@pytest.fixture
def server(monkeypatch):
    """The handler class of the server, which huggingface_hub takes for the hub."""
    handler = type("OneHub", (Hub,), {"repositories": {}, "private": {}, "objects": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(finished, tmp_path):
    """The folder of a copy of a finished run, with a file of a single step."""
    shutil.copytree(finished[0], tmp_path / "run")
    steps = tmp_path / "run" / "export" / "style" / "steps"
    steps.mkdir()
    (steps / "lora-000002.safetensors").write_bytes(b"not this")
    return tmp_path / "run"


def head(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_push_uploads_the_export_with_its_licence(server, run, capsys):
    assert push.main([str(run), "me/style", "--license", "openrail++", "--private"]) == 0
    assert capsys.readouterr().out.strip().endswith("/me/style")
    uploaded, folder = server.repositories["me/style"], run / "export" / "style"
    assert uploaded == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert set(uploaded) == {"lora.safetensors", "pytorch_lora_weights.safetensors", "README.md", "samples.png"}
    assert server.private == {"me/style": True}
    card = head(uploaded["README.md"])
    assert card["license"] == "openrail++" and "These weights: `openrail++`." in uploaded["README.md"].decode()
    assert card["widget"] == [{"text": "red circle", "output": {"url": "samples.png"}}]
    assert {"lora", "template:sd-lora", "diffusers", "text-to-image"} <= set(card["tags"])
    assert push.main([str(run), "me/style", "--license", "apache-2.0"]) == 0
    again = server.repositories["me/style"]["README.md"]
    assert head(again)["license"] == "apache-2.0" and b"openrail" not in again


def test_what_keeps_a_push_from_the_hub_is_one_error(server, run, finished, monkeypatch, tmp_path, capsys):
    licensed = ["--license", "openrail++"]
    (tmp_path / "half" / "export").mkdir(parents=True)
    shutil.copy(run / "config.toml", tmp_path / "half" / "config.toml")
    cases = [
        ([run, "me/style"], 2, "say under which licence the files may be used"),
        ([run, "style", *licensed], 2, "'style' is no name of a repository: give OWNER/NAME"),
        ([run, "me/st yle", *licensed], 2, "'me/st yle' is no name of a repository"),
        ([run, "me/style", *licensed, "--stage", "words"], 2, "--stage words: the stages of"),
        ([tmp_path / "none", "me/style", *licensed], 3, "not the folder of a run"),
        ([tmp_path / "half", "me/style", *licensed], 3, "holds no export; the stage is not done"),
        ([run, "no/entry", *licensed], 3, "no/entry: the token may not write there"),
    ]
    for arguments, code, message in cases:
        assert push.main(list(map(str, arguments))) == code, arguments
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert push.main([str(run), "me/style", *licensed]) == 3
    assert "me/style: the token is not valid: log in with `hf auth login`" in capsys.readouterr().err
    assert not any(server.repositories.values())


def test_a_run_pushes_its_export_when_it_is_done(server, settings):
    config = settings(
        stages=[{"steps": 1}],
        validation={},
        license="openrail++",
        push_to_hub="me/copies",
        copies=[{"name": "a"}, {"name": "b", "seed": 1}],
    )
    assert train(config) == 0
    assert set(server.repositories) == {"me/copies-a", "me/copies-b"}
    for copy in ("a", "b"):
        file = Path(config.output) / copy / "export" / "style" / "lora.safetensors"
        assert server.repositories[f"me/copies-{copy}"]["lora.safetensors"] == file.read_bytes()
        with safe_open(file, "np") as opened:
            assert opened.metadata()["modelspec.license"] == "openrail++"
    assert head(server.repositories["me/copies-a"]["README.md"])["license"] == "openrail++"


def test_a_run_that_cannot_push_is_refused_before_weights_are_read(server, settings, monkeypatch, no_weights):
    with pytest.raises(ConfigError, match="push_to_hub needs license"):
        settings(push_to_hub="me/style")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(hub.DataError, match="the token is not valid"):
        train(settings(push_to_hub="me/style", license="openrail++"))


def test_metadata_follows_modelspec_and_kohyas_hashes(finished):
    """https://github.com/Stability-AI/ModelSpec 1.0.1, and sd-scripts' hashes, computed from the bytes of the file."""
    file = finished[0] / "export" / "style" / "lora.safetensors"
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    spec = {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}
    content = file.read_bytes()
    digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    assert spec == {
        "sai_model_spec": "1.0.1",
        "implementation": "diffusers",
        "title": "style",
        "date": file_metadata.today(),
        "resolution": "16x16",
        "prediction_type": "v",
        "encoder_layer": "1",
        "hash_sha256": f"0x{digest}",
    }
    assert metadata["sshs_model_hash"] == digest and len(metadata["sshs_legacy_hash"]) == 8


def test_the_day_is_that_of_source_date_epoch(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert file_metadata.today() == "2023-11-14"
