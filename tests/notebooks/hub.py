"""A stand-in for the model hub on this machine: one repository, served as huggingface_hub asks for it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def listing(folder: Path, repository: str, path: str) -> Any:
    """The answer about a revision: its commit, or with "tree" the files with their sizes."""
    files = sorted(folder.iterdir())
    if "/tree/" in path:
        return [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": COMMIT} for file in files]
    return {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}


@contextmanager
def served(folder: Path, repository: str, revision: str) -> Iterator[tuple[str, dict[str, int]]]:
    """(address of the hub, bytes that were downloaded of each file) while it serves `folder` as a revision."""
    sent: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/{repository}/resolve/"
            if path.startswith(f"/api/models/{repository}/"):
                content = json.dumps(listing(folder, repository, path)).encode()
                self.send(200, content if body else b"", {"Content-Length": str(len(content))})
                return
            name = path.removeprefix(prefix).partition("/")[2]
            file = folder / name
            wanted = path.startswith((f"{prefix}{revision}/", f"{prefix}{COMMIT}/"))
            if not wanted or not name or "/" in name or not file.is_file():
                self.send(404, b"", {"Content-Length": "0", "X-Error-Code": "EntryNotFound"})
                return
            content = file.read_bytes()
            headers = {
                "Content-Length": str(len(content)), "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
            }  # fmt: skip
            self.send(200, content if body else b"", headers)
            if body:
                sent[name] = sent.get(name, 0) + len(content)

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
