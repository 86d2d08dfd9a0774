"""A hub of a test's own: what is sent to it lies in a folder afterwards."""

from __future__ import annotations

import base64
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants as constants

OWNER, TOKEN = "someone", "hf_of_a_test"


@contextmanager
def hub(root, monkeypatch, *, token=TOKEN, readonly=False):
    """Serve a hub whose repositories are folders of ``root``; yields the requests, path and body.

    The client of this process then talks to it, with ``token`` if it is not None.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.root, server.readonly, server.requests = root, readonly, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(root / "no token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield server.requests
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self._body()
        self.server.requests.append((self.path, body))
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        if not known or self.server.readonly:
            self._answer({"error": "refused"}, 403 if known else 401)
        else:
            self._answer(self._found(self.path.split("?")[0], body))

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self._chunk, b""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _chunk(self):
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data

    def _found(self, path, body):
        repo = "/".join(path.split("/")[3:5])
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given['organization'] or OWNER}/{given['name']}"
            return {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return {"files": [{"path": row["path"], **mode} for row in json.loads(body)["files"]]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                file = self.server.root / repo / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        oid = "0" * 40
        return {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}

    def _answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
