"""Fixtures of the server tests: a fake engine that repeats the prompt, and apps that use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerFast

from octavo.adapters import Adapter
from octavo.config import ServeOptions
from octavo.errors import AdapterError
from octavo.infer.generate import TextStream
from octavo.infer.requests import QueueFullError, Request, ServedAdapter, Stats, Stream, Token
from octavo.layers.lora import LoraSpec
from octavo.server.app import create_app
from octavo.store import peft
from octavo.store.files import sha256_of
from octavo.store.tokenizer_files import load_tokenizer

BASE_SHA, KING_SHA, QUEEN_SHA = "b" * 64, "c" * 64, "d" * 64


@dataclass
class ActiveRequest:
    """One running request and the ids that it will generate."""

    stream: Stream
    ids: list[int]
    text: TextStream


@dataclass
class FakeEngine:
    """Generates the prompt's ids again and again; the EOS token (id 2) ends a request.

    A request finishes when it is submitted. With `manual` each call of `step` generates one token.
    """

    tokenizer: PreTrainedTokenizerFast
    manual: bool = False
    slots: int = 2
    queue_limit: int = 2
    context: int = 64
    base: str = "tiny"
    base_sha256: str = BASE_SHA
    submitted: list[Request] = field(default_factory=list)
    active: list[ActiveRequest] = field(default_factory=list)
    cancelled: int = 0
    failing: bool = False
    names: tuple[str, ...] = ("king", "queen")
    read_errors: dict[str, str | Exception] = field(default_factory=dict)  # folder name -> error of read_adapter

    def __post_init__(self) -> None:
        self.draining_adapters: dict[str, ServedAdapter] = {}
        hashes = {"king": KING_SHA, "queen": QUEEN_SHA}
        self.loaded = {name: ServedAdapter(name, hashes[name], 1000.5, attached={"q_proj": 2}) for name in self.names}

    def submit(self, request: Request) -> Stream:
        if request.adapter is not None and request.adapter not in self.loaded:
            raise AdapterError(f"There is no adapter {request.adapter!r} here.")
        if len(self.active) >= self.slots + self.queue_limit:
            raise QueueFullError("2 requests are waiting already.", hint="Try again later.")
        self.submitted.append(request)
        stream = Stream(request, self.loaded.get(request.adapter or ""))
        most = min(request.sampling.max_new_tokens, self.context - len(request.prompt))
        ids = [request.prompt[n % len(request.prompt)] for n in range(most)]
        self.active.append(ActiveRequest(stream, ids, TextStream(self.tokenizer, request.sampling.stop)))
        while self.active and not self.manual:
            self.step()
        return stream

    def step(self) -> None:
        """Generates one token for each running request; removes cancelled requests."""
        for run in self.active[:]:
            if run.stream.cancelled:
                self.cancelled += 1
                run.stream.put(Token.end("cancelled"))
                self.active.remove(run)
        for run in self.active[: self.slots]:
            token = self._next(run)
            if token.finish_reason:
                self.active.remove(run)
            run.stream.put(token)

    def _next(self, run: ActiveRequest) -> Token:
        if self.failing:
            run.stream.error = "RuntimeError: /secret/path"
            return Token.end("error")
        request = run.stream.request
        if request.prompt_logprobs:
            run.stream.prompt = (
                Token(request.prompt[0], ""),
                *(self.token_with_logprobs(i, request) for i in request.prompt[1:]),
            )
        token = run.ids.pop(0)
        reason: str | None = None
        if token == 2:
            text, reason = run.text.finish(), "stop"
        else:
            text, stopped = run.text.push(token)
            reason = "stop" if stopped else None if run.ids else "length"
            text += "" if reason is None else run.text.finish()
        return replace(self.token_with_logprobs(token, request), text=text, finish_reason=reason)

    @staticmethod
    def token_with_logprobs(token: int, request: Request) -> Token:
        """An even id is the likeliest token; for an odd id the likeliest is the even id below it."""
        if request.logprobs is None:
            return Token(token, "")
        likeliest = [(token, -0.25)] if token % 2 == 0 else [(token - 1, -0.25), (token, -0.5)]
        others = [(other, -1.0 - other) for other in range(250, 270)]
        top = tuple((likeliest + others)[: request.logprobs])
        return Token(token, "", logprob=likeliest[-1][1], top=top)

    def adapters(self) -> dict[str, ServedAdapter]:
        return dict(self.loaded)

    def read_adapter(self, folder: Path, *, allow_pickle: bool = False) -> Adapter:
        """Replaces `peft.read`: an adapter without tensors. Its hash is that of the tensor file, of any content."""
        why = self.read_errors.get(folder.name)
        if isinstance(why, Exception):
            raise why
        if why is not None:
            raise AdapterError(f"The adapter in {folder} {why}.", hint="Give another one.")
        origin_file = folder / "octavo.json"
        origin = json.loads(origin_file.read_bytes()) if origin_file.is_file() else {}
        return Adapter(LoraSpec(), {}, {}, origin, sha256=sha256_of(folder / peft.TENSORS))

    def load_adapter(self, name: str, adapter: Adapter) -> ServedAdapter:
        self.loaded[name] = ServedAdapter(name, adapter.sha256, 2000.5, adapter.trained_on)
        return self.loaded[name]

    def draining(self) -> dict[str, ServedAdapter]:
        return dict(self.draining_adapters)

    def drain_adapter(self, name: str) -> ServedAdapter:
        if name in self.loaded:
            self.draining_adapters[name] = self.loaded.pop(name)
        if name not in self.draining_adapters:
            raise AdapterError(f"There is no adapter {name!r} here.")
        return self.draining_adapters[name]

    def remove_adapter(self, name: str) -> None:
        if users := sum(run.stream.request.adapter == name for run in self.active):
            raise AdapterError(f"{users} requests are using the adapter {name!r}.", hint="Try later.")
        del self.draining_adapters[name]

    def stats(self) -> Stats:
        running = min(len(self.active), self.slots)
        return Stats(
            self.slots, self.queue_limit, 128, running=running, waiting=len(self.active) - running,
            requests_total=len(self.submitted), cancelled_total=self.cancelled,
        )  # fmt: skip


@dataclass
class AppServer:
    """An app, its engine, and a client that connects from localhost."""

    app: FastAPI
    engine: FakeEngine
    client: TestClient

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of a response whose status must be 200."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """(status, error) of a response in OpenAI's error format."""
        response = self.client.post(path, json=body)
        document = response.json()
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        return response.status_code, document["error"]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.engine.tokenizer(text)["input_ids"])


OpenServer = Callable[..., AppServer]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_llama)


@pytest.fixture
def open_server(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenServer]:
    """Makes an AppServer. Keywords are server options; `engine` has those of the FakeEngine, which reads adapters."""
    clients = []

    def make(*, key: str | None = None, engine: dict[str, Any] | None = None, **options: Any) -> AppServer:
        fake = FakeEngine(tokenizer, **(engine or {}))
        monkeypatch.setattr(peft, "read", fake.read_adapter)
        app = create_app(fake, ServeOptions(**options), key=key, names=("laptop",))
        clients.append(client := TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False))
        return AppServer(app, fake, client)

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def server(open_server: OpenServer) -> AppServer:
    """A server with default options."""
    return open_server()
