"""A local server that takes what the Hugging Face hub would get."""

import base64
import hashlib
import http.server
import json
import threading

import huggingface_hub.constants


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


def serve(monkeypatch):
    """Yields the handler class of the server, which huggingface_hub takes for the hub."""
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
