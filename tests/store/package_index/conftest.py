"""A local package index: it serves the files of a test, breaks connections, and records the requests."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from octavo.store.package_index.simple import Pinned

CONTENT = bytes(range(256)) * 800  # 200 kB
WANTED = Pinned("some-model", "some_model-1.0-py3-none-any.whl", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request; `index` is the server's."""

    protocol_version = "HTTP/1.1"
    index: Index

    def do_GET(self) -> None:
        """Responds as the test configured, else with the file at the path."""
        self.index.requests.append((self.path, dict(self.headers)))
        answer = self.index.answers.get(self.path)
        if answer is None:
            self.send(404, b"")
        else:
            answer(self)

    def send(self, code: int, body: bytes, **headers: str) -> None:
        """A complete response; underscores in header names become hyphens."""
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


@dataclass
class Index:
    """A server on loopback. `answers` by path; `requests` are the paths and headers of all requests so far."""

    answers: dict[str, Answer] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def page(self, text: str, kind: str = "text/html", path: str = "/simple/some-model/") -> None:
        """Lists links at the project's page."""
        self.answers[path] = lambda handler: handler.send(200, text.encode(), Content_Type=kind)

    def file(self, content: bytes = CONTENT, *, path: str = f"/files/{WANTED.filename}", ranges: bool = True) -> None:
        """Serves the file from the requested byte on."""

        def answer(handler: Handler) -> None:
            requested = handler.headers.get("Range") if ranges else None
            if requested is None:
                handler.send(200, content)
                return
            start = int(requested.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                handler.send(416, b"")
                return
            content_range = f"bytes {start}-{len(content) - 1}/{len(content)}"
            handler.send(206, content[start:], Content_Range=content_range)

        self.answers[path] = answer

    def cut(self, *, after: int, times: int, path: str = f"/files/{WANTED.filename}") -> None:
        """The first `times` answers of a file end after `after` bytes."""
        whole = self.answers[path]

        def answer(handler: Handler) -> None:
            nonlocal times
            if times <= 0:
                whole(handler)
                return
            times -= 1
            start = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            code = 206 if "Range" in handler.headers else 200
            handler.send_response(code)
            handler.send_header("Content-Length", str(len(CONTENT) - start))
            if code == 206:
                handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
            handler.end_headers()
            handler.wfile.write(CONTENT[start : start + after])
            handler.close_connection = True

        self.answers[path] = answer

    def ranges(self) -> list[str | None]:
        """The Range header of each request for the file."""
        return [headers.get("Range") for path, headers in self.requests if path.startswith("/files/")]


@pytest.fixture
def index() -> Iterator[Index]:
    """A running server that lists the file in pip's format, with a relative URL and its hash."""
    index = Index()
    handler = type("Bound", (Handler,), {"index": index})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    index.port = server.server_address[1]
    index.page(f'<a href="../../files/{WANTED.filename}#sha256={WANTED.sha256}">{WANTED.filename}</a>')
    index.file()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
