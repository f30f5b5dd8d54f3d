"""A Hugging Face hub on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories of files; a download waits while `hold` is set, and a file of `torn` breaks off in its middle."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), Request)
        self.repositories = repositories
        self.asked: list[str] = []  # files that were downloaded
        self.flowing = threading.Event()
        self.flowing.set()
        self.torn: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Request(BaseHTTPRequestHandler):
    """The four calls that a download makes: the commit, the list of files, and each file's head and body."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        _, *parts = self.path.partition("?")[0].split("/")
        if parts[:2] == ["api", "models"]:
            name, kind = "/".join(parts[2:4]), (parts[4:] or ["revision"])[0]
            files = self.server.repositories.get(name)
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}
                for path, data in (files or {}).items()
            ]
            answer = listed if kind == "tree" else {"id": name, "modelId": name, "sha": COMMIT, "siblings": []}
            revision = parts[5] if len(parts) > 5 else "main"
            missing = "Repo" if files is None else "" if revision in ("main", COMMIT) else "Revision"
            self._send(json.dumps(answer).encode(), "application/json", missing=missing)
            return
        name, path = "/".join(parts[:2]), "/".join(parts[4:])
        files = self.server.repositories[name]
        if path not in files:
            self._send(b"", "text/plain", missing="Entry")
            return
        if self.command == "GET":
            self.server.asked.append(f"{name}:{path}")
            self.server.flowing.wait(60)
        self._send(files[path], "application/octet-stream", torn=path in self.server.torn)

    do_HEAD = do_GET

    def _send(self, data: bytes, kind: str, missing: str = "", torn: bool = False) -> None:
        self.send_response(404 if missing else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{_digest(data)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if missing:
            self.send_header("X-Error-Code", f"{missing}NotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if torn else data)
            self.close_connection = torn

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(hub: Hub) -> Iterator[None]:
    """While it answers."""
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
