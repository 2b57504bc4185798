"""What all routes share: the engine, the limits, names of models, the encoding of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from secrets import randbelow
from time import time
from typing import TYPE_CHECKING, Protocol

from starlette.types import Receive

from octavo.config import ServeOptions
from octavo.data.encoding import begin_ids
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.data.records import Message
from octavo.errors import AdapterError, DataError, UsageError
from octavo.infer.requests import QueueFullError, Request, ServedAdapter, Stats, Stream
from octavo.infer.sample import Sampling
from octavo.server.errors import ApiError, busy, told, unavailable, wrong
from octavo.server.generation import Generation
from octavo.server.logprobs import Vocabulary
from octavo.server.metrics import Metrics
from octavo.server.requests import SEEDS, ChatMessage, Fields, Sampled
from octavo.server.unsupported import UnknownNames, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Engine(Protocol):
    """What the server asks of an engine; infer/batching.Engine is one."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...
    @property
    def context(self) -> int: ...
    @property
    def base(self) -> str: ...
    @property
    def base_sha256(self) -> str: ...
    def submit(self, request: Request) -> Stream: ...
    def adapters(self) -> Mapping[str, ServedAdapter]: ...
    def load_adapter(self, name: str, folder: Path) -> ServedAdapter: ...
    def draining(self) -> Mapping[str, ServedAdapter]: ...
    def drain_adapter(self, name: str) -> ServedAdapter: ...
    def remove_adapter(self, name: str) -> None: ...
    def stats(self) -> Stats: ...


@dataclass(frozen=True)
class Served:
    """A name that `model` can have. `adapter` is None for the base."""

    name: str
    adapter: str | None
    fingerprint: str
    created: int


@dataclass
class Service:
    """One engine and how it is served. `draining` is set once the server is told to stop."""

    engine: Engine
    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time()))
    draining: bool = False
    unknown: UnknownNames = field(default_factory=UnknownNames)

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.engine.tokenizer)
        self._longest_token = max(map(len, self.engine.tokenizer.get_vocab()))  # characters, or bytes in its alphabet
        # Long prompts take a tokenizer a second: that is for a thread. One alone, since tokenizers are not made to be
        # shared, and so that the encoding of many prompts leaves the other cores to the engine.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="octavo-encoder")

    @property
    def longest_prompt(self) -> int:
        """Tokens; one place of the context stays for an answer."""
        max_len = self.engine.context - 1
        return min(max_len, self.options.max_prompt_tokens or max_len)

    def names(self) -> list[Served]:
        """The base, then the adapters in the order they were loaded."""
        engine = self.engine
        base = Served(engine.base, None, engine.base_sha256, self.created)
        return [base, *(Served(a.name, a.name, a.sha256, int(a.loaded_at)) for a in engine.adapters().values())]

    def named(self, model: str | None) -> Served:
        """What answers for `model`: None takes the first adapter, or the base where there is none. 404 if unknown."""
        names = self.names()
        if model is None:
            return names[1] if len(names) > 1 else names[0]
        found = next((served for served in names if served.name == model), None)
        if found is None and model in self.engine.draining():
            message = f"The adapter `{model}` is being unloaded and takes no more requests."
            raise ApiError(404, message, code="model_not_found", param="model")
        if found is None:
            there = ", ".join(served.name for served in names)
            raise ApiError(
                404, f"The model `{model}` does not exist. There are: {there}.", code="model_not_found", param="model"
            )
        return found

    def check_open(self) -> None:
        """503 once the server is told to stop."""
        if self.draining:
            raise unavailable("The server is stopping.", code="stopping")

    def check_fields(self, asked: Fields, where: str) -> None:
        """400 for fields of a body that would change the answer and are not supported; `where` is the route."""
        check_fields(asked, self.unknown, where=where)

    async def encode_text(self, text: str, *, begin: bool = True, param: str = "prompt") -> list[int]:
        """The ids of a text to continue; without `begin` no begin token."""
        tokenizer = self.engine.tokenizer

        def encode() -> list[int]:
            ids = encode_prompt(text, tokenizer)
            return ids if begin else ids[len(begin_ids(tokenizer)) :]

        return await self._encoded(encode, characters=len(text), param=param)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The ids of a conversation through the model's own template, up to the assistant's next turn."""
        turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
        return await self._encoded(
            lambda: encode_conversation(turns, self.engine.tokenizer),
            characters=sum(len(turn.content) for turn in turns),
            param="messages",
        )

    async def _encoded(self, encode: Callable[[], list[int]], *, characters: int, param: str) -> list[int]:
        """400 for what cannot be encoded, or cannot fit: megabytes would take the thread that all share seconds."""
        if characters > self.longest_prompt * self._longest_token:
            raise wrong(
                f"The prompt has {characters:,} characters: more than {self.longest_prompt:,} tokens, the most that "
                "this server takes, can hold.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except (DataError, UsageError) as error:
            raise wrong(error.message.removeprefix("the conversation:1: "), param=param) from error

    def check_prompt(self, ids: Sequence[int], *, param: str) -> None:
        """400 for a prompt that is empty, too long, or names tokens that there are not."""
        if not ids:
            raise wrong("The prompt is empty: give at least one character to go on from.", param=param)
        if len(ids) > self.longest_prompt:
            raise wrong(
                f"The prompt has {len(ids):,} tokens; this server takes {self.longest_prompt:,} at most.",
                param=param,
                code="context_length_exceeded",
            )
        self.check_ids(ids, param=param)

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """400 for tokens that there are not."""
        if ids and max(ids) >= self.vocabulary.size:
            raise wrong(f"There is no token {max(ids)}: the model has {self.vocabulary.size:,}.", param=param)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens included."""

        def decoded() -> str:
            return str(self.engine.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        return await asyncio.get_running_loop().run_in_executor(self._encoder, decoded)

    def new_tokens(self, asked: int | None, default: int, *, param: str = "max_tokens") -> int:
        """How many new tokens a request gets. 400 if it asks for more than the server gives."""
        most = self.options.max_new_tokens
        if asked is not None and asked > most:
            raise wrong(f"`{param}` is {asked:,}; this server gives {most:,} new tokens at most.", param=param)
        return min(default, most) if asked is None else asked

    def samplings(self, asked: Sampled, new_tokens: int) -> list[Sampling]:
        """One for each of the n answers; they differ in their seeds, which count up from the request's own."""
        seed = randbelow(SEEDS) if asked.seed is None else asked.seed
        return [
            Sampling(
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_k=max(asked.top_k or 0, 0),
                top_p=1.0 if asked.top_p is None else asked.top_p,
                repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
                max_new_tokens=max(new_tokens, 1),  # the engine writes one; whoever asked for none drops it
                stop=asked.stops,
                seed=(seed + number) % SEEDS,
            )
            for number in range(asked.n or 1)
        ]

    def begin(self, requests: Sequence[Request], receive: Receive) -> Generation:
        """All of the requests at work for the client behind `receive`, or none of them: 400, 404, 429 or 503."""
        streams = self._submit(requests)
        adapter = streams[0].adapter  # not what the name meant while the prompt was encoded
        return Generation(
            streams,
            receive,
            fingerprint=self.engine.base_sha256 if adapter is None else adapter.sha256,
            metrics=self.metrics,
            seconds=self.options.request_seconds,
        )

    def _submit(self, requests: Sequence[Request]) -> list[Stream]:
        self.check_open()
        stats = self.engine.stats()
        if len(requests) > (most := stats.slots + stats.queue_limit):
            raise wrong(f"{len(requests)} answers were asked for at once; this server takes {most} at most.")
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, QueueFullError):
                raise busy(told(error)) from error
            if isinstance(error, UsageError):
                raise wrong(told(error)) from error
            if isinstance(error, AdapterError):  # removed a moment ago
                raise ApiError(404, told(error), code="model_not_found", param="model") from error
            raise
        return streams
