"""What all routes share: the engine, model names, limits and their errors, tokenization of prompts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from secrets import randbelow
from time import time
from typing import TYPE_CHECKING, Protocol

from starlette.types import Receive

from octavo.adapters import Adapter
from octavo.config import ServeOptions
from octavo.data.encoding import bos_ids
from octavo.data.prompt import encode_conversation, encode_prompt
from octavo.data.turns import Message
from octavo.errors import AdapterError, DataError, UsageError
from octavo.infer.requests import QueueFullError, Request, ServedAdapter, Stats, Stream
from octavo.infer.sample import Sampling
from octavo.server.errors import ApiError, bad_request, one_line, overloaded, unavailable
from octavo.server.generation import Generation
from octavo.server.logprobs import Vocabulary
from octavo.server.metrics import Metrics
from octavo.server.requests import SEED_LIMIT, ChatMessage, Fields, GenerationRequest
from octavo.server.unsupported import UnknownFieldLog, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Engine(Protocol):
    """The methods of infer/engine.py that the server calls. Tests implement them without a model."""

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
    def load_adapter(self, name: str, adapter: Adapter) -> ServedAdapter: ...
    def draining(self) -> Mapping[str, ServedAdapter]: ...
    def drain_adapter(self, name: str) -> ServedAdapter: ...
    def remove_adapter(self, name: str) -> None: ...
    def stats(self) -> Stats: ...


LOG = logging.getLogger("octavo.server")


@dataclass(frozen=True)
class Served:
    """A model of /v1/models: the base model or an adapter on it."""

    name: str
    adapter: str | None  # its name in the engine; None for the base model
    fingerprint: str  # sha256 of its weights
    created: int  # Unix time
    attached: dict[str, int] | None = None  # an adapter's modules with LoRA, by last name


@dataclass
class Service:
    """One engine and its serving options. `draining` is True while the server shuts down."""

    engine: Engine
    options: ServeOptions
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time()))
    draining: bool = False
    unknown_fields: UnknownFieldLog = field(default_factory=UnknownFieldLog)
    has_shortened: bool = False  # whether a request asked for more tokens than the context had space for

    def __post_init__(self) -> None:
        self.vocabulary = Vocabulary(self.engine.tokenizer)
        # Characters; in a byte-level vocabulary bytes, of which a character has at least one.
        self._longest_token = max(map(len, self.engine.tokenizer.get_vocab()))
        # Tokenizing a long prompt takes a second, so it runs in a thread, not in the event loop. There is one thread:
        # tokenizers are not thread safe, and the other cores remain available to the engine.
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="octavo-encoder")

    @property
    def longest_prompt(self) -> int:
        """Maximum number of prompt tokens: one position of the context must remain for a new token."""
        max_len = self.engine.context - 1
        return min(max_len, self.options.max_prompt_tokens or max_len)

    def models(self) -> list[Served]:
        """The served models: the base model, then the adapters in the order of loading."""
        engine = self.engine
        base = Served(engine.base, None, engine.base_sha256, self.created)
        adapters = engine.adapters().values()
        return [base, *(Served(a.name, a.name, a.sha256, int(a.loaded_at), dict(a.attached)) for a in adapters)]

    def named(self, model: str | None) -> Served:
        """The served model named `model`. None: the first adapter, else the base model. 404 for an unknown name."""
        models = self.models()
        if model is None:
            return models[1] if len(models) > 1 else models[0]
        match = next((served for served in models if served.name == model), None)
        if match is None and model in self.engine.draining():
            message = f"The adapter `{model}` is being unloaded and accepts no new requests."
            raise ApiError(404, message, code="model_not_found", param="model")
        if match is None:
            available = ", ".join(served.name for served in models)
            raise ApiError(
                404,
                f"The model `{model}` does not exist. Available: {available}.",
                code="model_not_found",
                param="model",
            )
        return match

    def check_open(self) -> None:
        """503 while the server shuts down."""
        if self.draining:
            raise unavailable("The server is stopping.", code="stopping")

    def check_fields(self, body: Fields, route: str) -> None:
        """400 for unsupported fields of a body that would change the output."""
        check_fields(body, self.unknown_fields, route=route)

    async def encode_text(self, text: str, *, bos: bool = True, param: str = "prompt") -> list[int]:
        """Token ids of a text to continue, without the BOS token if `bos` is False."""
        tokenizer = self.engine.tokenizer

        def encode() -> list[int]:
            ids = encode_prompt(text, tokenizer)
            return ids if bos else ids[len(bos_ids(tokenizer)) :]

        return await self._encoded(encode, characters=len(text), param=param)

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation, formatted with the model's template up to the next assistant message."""
        conversation = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
        return await self._encoded(
            lambda: encode_conversation(conversation, self.engine.tokenizer),
            characters=sum(len(turn.content) for turn in conversation),
            param="messages",
        )

    async def _encoded(self, encode: Callable[[], list[int]], *, characters: int, param: str) -> list[int]:
        """Runs `encode` in the tokenizer thread. 400 if it fails, or if the text is certainly too long.

        A text of c characters has at least c / (longest token) tokens. This bound is checked first: megabytes of text
        would block the thread, which all requests share, for seconds.
        """
        if characters > self.longest_prompt * self._longest_token:
            raise bad_request(
                f"The prompt has {characters:,} characters, which is more than this server's limit of "
                f"{self.longest_prompt:,} tokens.",
                param=param,
                code="context_length_exceeded",
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        except (DataError, UsageError) as error:
            # `encode_conversation` names its argument "the conversation", line 1, as if it were a file.
            raise bad_request(error.message.removeprefix("the conversation:1: "), param=param) from error

    def check_prompt(self, ids: Sequence[int], *, param: str) -> None:
        """400 for a prompt that is empty, too long, or contains invalid token ids."""
        if not ids:
            raise bad_request("The prompt is empty. Send at least one character.", param=param)
        if len(ids) > self.longest_prompt:
            raise bad_request(
                f"The prompt has {len(ids):,} tokens; this server's limit is {self.longest_prompt:,}.",
                param=param,
                code="context_length_exceeded",
            )
        self.check_ids(ids, param=param)

    def check_ids(self, ids: Sequence[int], *, param: str) -> None:
        """400 for token ids that are not in the vocabulary."""
        if ids and max(ids) >= self.vocabulary.size:
            message = f"The token id {max(ids)} is invalid: the vocab size is {self.vocabulary.size:,}."
            raise bad_request(message, param=param)

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, including special tokens."""

        def decoded() -> str:
            return str(self.engine.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

        return await asyncio.get_running_loop().run_in_executor(self._encoder, decoded)

    def new_tokens(self, requested: int | None, default: int, *, param: str = "max_tokens") -> int:
        """Maximum number of new tokens of a request. 400 if `requested` exceeds the server's limit."""
        limit = self.options.max_new_tokens
        if requested is not None and requested > limit:
            raise bad_request(f"`{param}` is {requested:,}; this server's limit is {limit:,} new tokens.", param=param)
        return min(default, limit) if requested is None else requested

    def samplings(self, body: GenerationRequest, new_tokens: int) -> list[Sampling]:
        """Sampling parameters of the n choices. They differ only in the seed: seed, seed + 1, ..."""
        seed = randbelow(SEED_LIMIT) if body.seed is None else body.seed
        return [
            Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_k=max(body.top_k or 0, 0),
                top_p=1.0 if body.top_p is None else body.top_p,
                repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
                max_new_tokens=max(new_tokens, 1),  # the engine generates at least 1; routes drop it for 0
                stop=body.stops,
                seed=(seed + number) % SEED_LIMIT,
            )
            for number in range(body.n or 1)
        ]

    def begin(self, requests: Sequence[Request], receive: Receive) -> Generation:
        """Submits all requests or none. ApiError with 400, 404, 429 or 503 if the engine refuses one.

        `receive` is the ASGI function of the HTTP request: it reports when the client disconnects. An answer ends where
        the context does, with the finish_reason "length", although `max_tokens` may be more.
        """
        self._log_shortened(requests)
        streams = self._submit(requests)
        adapter = streams[0].adapter  # the adapter at submission: the name may be reloaded meanwhile
        return Generation(
            streams,
            receive,
            fingerprint=self.engine.base_sha256 if adapter is None else adapter.sha256,
            metrics=self.metrics,
            seconds=self.options.request_seconds,
        )

    def _log_shortened(self, requests: Sequence[Request]) -> None:
        """Logs once that the context has less space than a request asked for: clients send large defaults."""
        beyond = (r for r in requests if len(r.prompt) + r.sampling.max_new_tokens > self.engine.context)
        if not self.has_shortened and (request := next(beyond, None)) is not None:
            self.has_shortened = True
            LOG.info(
                "A prompt of %d tokens and max_tokens %d are more than the context of %d tokens: the answer ends "
                'there, with the finish_reason "length". Later requests are not logged.',
                len(request.prompt), request.sampling.max_new_tokens, self.engine.context,
            )  # fmt: skip

    def _submit(self, requests: Sequence[Request]) -> list[Stream]:
        self.check_open()
        stats = self.engine.stats()
        if len(requests) > (limit := stats.slots + stats.queue_limit):
            raise bad_request(f"The request needs {len(requests)} generations; this server's limit is {limit}.")
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except BaseException as error:
            for stream in streams:
                stream.cancel()
            if isinstance(error, QueueFullError):
                raise overloaded(one_line(error)) from error
            if isinstance(error, UsageError):
                raise bad_request(one_line(error)) from error
            if isinstance(error, AdapterError):  # removed in the meantime
                raise ApiError(404, one_line(error), code="model_not_found", param="model") from error
            raise
        return streams
