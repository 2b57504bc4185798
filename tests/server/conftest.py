"""What the tests of the server stand on: an engine without a model that says the prompt again, and apps over it."""

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

from octavo.config import ServeOptions
from octavo.errors import AdapterError
from octavo.infer.generate import TextStream
from octavo.infer.requests import QueueFullError, Request, ServedAdapter, Stats, Stream, Token
from octavo.server.app import create_app
from octavo.store import peft
from octavo.store.files import sha256_of
from octavo.store.tokenizer_files import load_tokenizer

BASE_SHA, KING_SHA, QUEEN_SHA = "b" * 64, "c" * 64, "d" * 64


@dataclass
class Run:
    """One request at work: the ids that it is going to say."""

    stream: Stream
    ids: list[int]
    text: TextStream


@dataclass
class FakeEngine:
    """Says the prompt's ids again, over and over; the end token (id 2) ends it.

    By itself an answer is whole as soon as it is asked for. With `by_hand` tokens come only with `step`.
    """

    tokenizer: PreTrainedTokenizerFast
    by_hand: bool = False
    slots: int = 2
    queue_limit: int = 2
    context: int = 64
    base: str = "tiny"
    base_sha256: str = BASE_SHA
    seen: list[Request] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    cancelled: int = 0
    fails: bool = False
    names: tuple[str, ...] = ("king", "queen")
    misfits: dict[str, str | Exception] = field(default_factory=dict)  # folders that do not fit, and why

    def __post_init__(self) -> None:
        self.leaving: dict[str, ServedAdapter] = {}
        hashes = {"king": KING_SHA, "queen": QUEEN_SHA}
        self.held = {name: ServedAdapter(name, hashes[name], Path("/a", name), 1000.5) for name in self.names}

    def submit(self, request: Request) -> Stream:
        if request.adapter is not None and request.adapter not in self.held:
            raise AdapterError(f"There is no adapter {request.adapter!r} here.")
        if len(self.runs) >= self.slots + self.queue_limit:
            raise QueueFullError("2 requests are waiting already.", hint="Try again later.")
        self.seen.append(request)
        stream = Stream(request, self.held.get(request.adapter or ""))
        most = min(request.sampling.max_new_tokens, self.context - len(request.prompt))
        ids = [request.prompt[n % len(request.prompt)] for n in range(most)]
        self.runs.append(Run(stream, ids, TextStream(self.tokenizer, request.sampling.stop)))
        while self.runs and not self.by_hand:
            self.step()
        return stream

    def step(self) -> None:
        """One token for each of the running; those whose clients went away leave."""
        for run in self.runs[:]:
            if run.stream.cancelled:
                self.cancelled += 1
                run.stream.put(Token(-1, "", "cancelled"))
                self.runs.remove(run)
        for run in self.runs[: self.slots]:
            token = self._next(run)
            if token.finish_reason:
                self.runs.remove(run)
            run.stream.put(token)

    def _next(self, run: Run) -> Token:
        if self.fails:
            run.stream.error = "RuntimeError: /secret/path"
            return Token(-1, "", "error")
        request = run.stream.request
        if request.prompt_logprobs:
            run.stream.prompt = (Token(request.prompt[0], ""), *(self.told(i, request) for i in request.prompt[1:]))
        token = run.ids.pop(0)
        reason: str | None = None
        if token == 2:
            text, reason = run.text.finish(), "stop"
        else:
            text, stopped = run.text.push(token)
            reason = "stop" if stopped else None if run.ids else "length"
            text += "" if reason is None else run.text.finish()
        return replace(self.told(token, request), text=text, finish_reason=reason)

    @staticmethod
    def told(token: int, request: Request) -> Token:
        """Even ids are the likeliest; an odd one has the even one below it before it."""
        if request.logprobs is None:
            return Token(token, "")
        likeliest = [(token, -0.25)] if token % 2 == 0 else [(token - 1, -0.25), (token, -0.5)]
        others = [(other, -1.0 - other) for other in range(250, 270)]
        top = tuple((likeliest + others)[: request.logprobs])
        return Token(token, "", logprob=likeliest[-1][1], top=top)

    def adapters(self) -> dict[str, ServedAdapter]:
        return dict(self.held)

    def load_adapter(self, name: str, folder: Path) -> ServedAdapter:
        """The hash is that of a file with the tensors' name."""
        why = self.misfits.get(folder.name)
        if isinstance(why, Exception):
            raise why
        if why is not None:
            raise AdapterError(f"The adapter in {folder} {why}.", hint="Give another one.")
        origin = folder / "octavo.json"
        base = json.loads(origin.read_bytes())["base"]["sha256"] if origin.is_file() else None
        self.held[name] = ServedAdapter(name, sha256_of(folder / peft.TENSORS), folder, 2000.5, base)
        return self.held[name]

    def draining(self) -> dict[str, ServedAdapter]:
        return dict(self.leaving)

    def drain_adapter(self, name: str) -> ServedAdapter:
        if name in self.held:
            self.leaving[name] = self.held.pop(name)
        if name not in self.leaving:
            raise AdapterError(f"There is no adapter {name!r} here.")
        return self.leaving[name]

    def remove_adapter(self, name: str) -> None:
        if users := sum(run.stream.request.adapter == name for run in self.runs):
            raise AdapterError(f"{users} requests are using the adapter {name!r}.", hint="Try later.")
        del self.leaving[name]

    def stats(self) -> Stats:
        running = min(len(self.runs), self.slots)
        return Stats(
            self.slots, self.queue_limit, 128, running=running, waiting=len(self.runs) - running,
            requests_total=len(self.seen), cancelled_total=self.cancelled,
        )  # fmt: skip


@dataclass
class Setting:
    """An app with its engine, and a client that stands on this machine."""

    app: FastAPI
    engine: FakeEngine
    client: TestClient

    def ask(self, path: str, **body: Any) -> Any:
        """The JSON of an answer that must be 200."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """(status, error) of an answer in the shape of OpenAI's errors."""
        answer = self.client.post(path, json=body)
        document = answer.json()
        assert document.keys() == {"error"}
        assert document["error"].keys() == {"message", "type", "param", "code"}
        return answer.status_code, document["error"]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.engine.tokenizer(text)["input_ids"])


Open = Callable[..., Setting]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(tiny_llama)


@pytest.fixture
def opened(tokenizer: PreTrainedTokenizerFast) -> Iterator[Open]:
    """Makes a Setting. Options of the server by name; `engine` holds those of the FakeEngine."""
    clients = []

    def make(*, key: str | None = None, engine: dict[str, Any] | None = None, **options: Any) -> Setting:
        fake = FakeEngine(tokenizer, **(engine or {}))
        app = create_app(fake, ServeOptions(**options), key=key, names=("laptop",))
        clients.append(client := TestClient(app, base_url="http://localhost:8000", raise_server_exceptions=False))
        return Setting(app, fake, client)

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def setting(opened: Open) -> Setting:
    """A server with the defaults."""
    return opened()
