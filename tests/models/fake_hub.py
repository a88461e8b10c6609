"""A model hub on 127.0.0.1: the few addresses that huggingface_hub asks for, answered from a directory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """Serves `repos`: id to directory. Ids in `gated` are refused; `down` answers 503 to everything."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.gated: set[str] = set()
        self.revisions = {"main", "v1"}
        self.down = False
        self.asked: list[str] = []
        """Files whose content was fetched."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.route()

    def do_HEAD(self) -> None:
        self.route()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def route(self) -> None:
        if self.server.down:
            return self.refuse(503, "Down")
        parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.server.repos:
            return self.refuse(401 if api else 404, "RepoNotFound")
        if repo in self.server.gated:
            return self.refuse(403, "GatedRepo")
        directory = self.server.repos[repo]
        commit = hashlib.sha1(repo.encode()).hexdigest()
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in self.server.revisions | {commit}:
            return self.refuse(404, "RevisionNotFound")
        files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        if api and rest[:1] in ([], ["revision"]):
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.json(info)
        if api and rest[0] == "tree":
            return self.json([self.tree_entry(directory, file) for file in files])
        name = "/".join(rest[2:])
        if rest[:1] != ["resolve"] or name not in files:
            return self.refuse(404, "EntryNotFound")
        body = (directory / name).read_bytes()
        if self.command == "GET":
            self.server.asked.append(name)
        return self.send(200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha256(body).hexdigest()}"')

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    @staticmethod
    def tree_entry(directory: Path, file: str) -> dict[str, Any]:
        body = (directory / file).read_bytes()
        return {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}


@contextmanager
def serve(repos: dict[str, Path]) -> Iterator[FakeHub]:
    """The hub, running in a thread."""
    hub = FakeHub(repos)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
