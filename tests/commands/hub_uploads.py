"""A stand-in for the parts of the Hugging Face hub to which an adapter is uploaded, for the real huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OID = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The repositories: name -> branch -> file -> content. `refuses` (path, status) makes a request fail."""

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256: files that are no part of a commit's text
    commits: int = 0
    refuses: tuple[str, int] | None = None
    tokens: set[str] = field(default_factory=set)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if self.refuses and re.search(self.refuses[0], path):
            return self.refuses[1], {"error": "refused"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = {"main": {}}
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return 200, {"url": f"{self.address}/{name}", "id": name}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, {}
        if match := re.fullmatch(r"/(.+/.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.address}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|branch|revision)/(.+))?", path)
        if match is None or match[1] not in self.repositories:
            return 404, {"error": "RepoNotFound"}
        branches = self.repositories[match[1]]
        if match[2] == "branch":
            branches[match[3]] = dict(branches["main"])
            return 200, {}
        if match[2] == "preupload":
            files = [
                {
                    "path": one["path"], "shouldIgnore": False,
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                }
                for one in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if match[2] == "commit":
            return self._commit(match[1], match[3], body)
        siblings = [{"rfilename": name} for name in branches["main"]]
        return 200, {"id": match[1], "sha": OID, "siblings": siblings, "private": self.private.get(match[1], False)}

    def _commit(self, name: str, branch: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories[name][branch]
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            if record["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif record["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                files[value["path"]] = content
        self.commits += 1
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{OID}", "commitOid": OID}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves `hub`, whose address is set, on this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization") or "")
            status, answer = hub.answer(self.command, self.path.partition("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            if answer == {"error": "RepoNotFound"}:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = reply  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
