"""A hub of data sets on this machine: folders, served as huggingface.co serves them."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers what ``huggingface_hub`` asks: what a data set is, its files, parts of them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        found = re.match(r"(?:/api)?/datasets/([^/]+/[^/]+)/?(\w*)/?([^/]*)/?(.*)", path)
        if found is None or not (self.server.root / found[1]).is_dir():
            return self.refuse("RepoNotFound")
        folder = self.server.root / found[1]
        asked = folder / found[4]
        if not path.startswith("/api"):
            return self.send_file(asked) if asked.is_file() else self.refuse("EntryNotFound")
        if found[2] == "tree":
            if not asked.is_dir():
                return self.refuse("EntryNotFound")
            return self.send([entry(folder, path) for path in sorted(asked.iterdir())])
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        siblings = [{"rfilename": name} for name in sorted(names)]
        return self.send({"id": found[1], "sha": COMMIT, "siblings": siblings, "tags": []})

    do_HEAD = do_GET

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        folder = self.server.root / re.match(r"/api/datasets/([^/]+/[^/]+)", self.path)[1]
        paths = [folder / name for name in asked.get("paths", [])]
        self.send([entry(folder, path) for path in paths if path.exists()])

    def send_file(self, file):
        content = file.read_bytes()
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return self.reply(200, content)
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        last = min(last, len(content) - 1)
        where = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self.reply(206, content[first : last + 1], where)

    def send(self, answer):
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def refuse(self, code):
        self.reply(404, b"{}", {"X-Error-Code": code})

    def reply(self, status, content, headers=()):
        self.send_response(status)
        more = {"ETag": f'"{COMMIT}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        for name, value in (more | dict(headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        """Say nothing."""


def entry(folder, path):
    """A file or folder, as the hub lists it."""
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "oid": COMMIT, "size": size, "path": str(path.relative_to(folder))}


@contextmanager
def hub_of(root):
    """Serve ``root/OWNER/NAME``, each a data set; gives the address and the list of requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.requests = root, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
