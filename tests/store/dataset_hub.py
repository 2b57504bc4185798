"""A stand-in for the data sets of the Hugging Face hub on this machine, for the real huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest


@dataclass
class Hub:
    """Data sets: owner/name -> revision -> file -> content. `refuses`: (status, error code) of all downloads."""

    address: str = ""
    datasets: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refuses: tuple[int, str] | None = None
    sent: list[str] = field(default_factory=list)  # files that were downloaded
    requests: int = 0

    def put(self, name: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Stores files as a revision; returns its commit."""
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        revisions = self.datasets.setdefault(name, {})
        revisions[revision] = revisions[commit] = files
        return commit

    def answer(self, path: str, *, body: bool) -> tuple[int, bytes, dict[str, str]]:
        self.requests += 1
        match = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if match:
            revisions = self.datasets.get(match[1])
            if revisions is None:
                return 404, b"", {"X-Error-Code": "RepoNotFound"}
            name = unquote(match[3] or "main")
            if name not in revisions:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            files = revisions[name]
            if match[2] == "tree":
                return (
                    200,
                    _json(
                        [
                            {"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                            for file, data in files.items()
                        ]
                    ),
                    {},
                )
            siblings = [{"rfilename": file} for file in files]
            return 200, _json({"id": match[1], "sha": self.commit(match[1], name), "siblings": siblings}), {}
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            return 404, b"", {}
        if self.refuses:
            return self.refuses[0], b"", {"X-Error-Code": self.refuses[1]}
        files = self.datasets[match[1]].get(unquote(match[2]), {})
        if (content := files.get(unquote(match[3]))) is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        if body:
            self.sent.append(unquote(match[3]))
        commit = self.commit(match[1], unquote(match[2]))
        return 200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}

    def commit(self, name: str, revision: str) -> str:
        revisions = self.datasets[name]
        return next(key for key in revisions if len(key) == 40 and revisions[key] is revisions[revision])


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves `hub`, whose address is set, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            is_get = self.command == "GET"
            status, content, headers = hub.answer(self.path.partition("?")[0], body=is_get)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if is_get:
                self.wfile.write(content)

        do_GET = do_HEAD = reply  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def used_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub that huggingface_hub asks instead of the real one, with an empty cache."""
    from huggingface_hub import constants

    with serving(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose protocol the stand-in has not
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub
