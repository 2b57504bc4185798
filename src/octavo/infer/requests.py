"""The interface types of the engine: requests, streams of tokens, limits and statistics."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter

from octavo.errors import OctavoError, UsageError
from octavo.infer.generate import check_prompt
from octavo.infer.sample import Sampling

SEEDS = -(2**63), 2**64 - 1  # smallest and largest seed of a torch.Generator


class QueueFullError(OctavoError):
    """The queue of waiting requests is full."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue. `adapter` is the name of a loaded adapter, None for the base model.

    `logprobs`: return the log-probability of each token and of the `logprobs` likeliest ones; None: return none.
    `prompt_logprobs`: return them for the prompt's tokens too, in `Stream.prompt`.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False


def check_request(request: Request, *, context: int, vocab_size: int) -> None:
    """UsageError for a request that would fail within a step: an exception there ends all requests of the step."""
    check_prompt(request.prompt, context)
    if wrong := [token for token in request.prompt if not 0 <= token < vocab_size]:
        raise UsageError(f"There is no token {wrong[0]}.", hint=f"Tokens are numbered 0 to {vocab_size - 1}.")
    if not 0 <= (request.logprobs or 0) <= vocab_size:
        raise UsageError(f"There are no {request.logprobs} log-probabilities.", hint=f"Ask for 0 to {vocab_size}.")
    if not SEEDS[0] <= request.sampling.seed <= SEEDS[1]:
        raise UsageError(f"The seed {request.sampling.seed} has more than 64 bits.", hint="Give a smaller one.")


@dataclass(frozen=True)
class Token:
    """One token of an answer. `text` may be empty while a character or a stop string is incomplete.

    The last token has a `finish_reason`: "stop" (stop id or stop string), "length", "cancelled" or "error"; the id of
    the last two is -1. `logprob` and `top` (token id, log-probability; likeliest first) are natural logarithms of the
    probabilities without temperature.
    """

    token_id: int
    text: str
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def end(cls, reason: str) -> Token:
        """The last token of a stream that is "cancelled" or ends by an "error": it has no id and no text."""
        return cls(-1, "", reason)


@dataclass
class Stream:
    """The answer to one request: one thread reads tokens while the engine's thread writes them.

    `adapter` is the request's adapter at submission: another adapter may have its name later.
    """

    request: Request
    adapter: ServedAdapter | None = None
    first_token: float | None = None  # perf_counter() at the first token
    prompt: tuple[Token, ...] = ()  # its tokens, with `prompt_logprobs`; set before the first token of the answer
    error: str = ""
    failure: Exception | None = None  # the exception of `error`
    _tokens: SimpleQueue[Token] = field(default_factory=SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _on_token: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they arrive; ends after the one with a finish reason."""
        while True:
            token = self._tokens.get()
            yield token
            if token.finish_reason is not None:
                return

    def ready(self) -> list[Token]:
        """The tokens that have arrived since the last call, without waiting."""
        tokens = []
        while not self._tokens.empty():
            tokens.append(self._tokens.get())
        return tokens

    def next(self, timeout: float | None = None) -> Token:
        """The next token; queue.Empty if none arrives within `timeout` seconds."""
        return self._tokens.get(timeout=timeout)

    def put(self, token: Token) -> None:
        """Adds a token; called by the engine."""
        if self.first_token is None and token.token_id >= 0:
            self.first_token = perf_counter()
        self._tokens.put(token)
        if self._on_token is not None:
            try:
                self._on_token()
            except Exception:  # nobody reads this stream any more; the other requests must continue
                self._on_token = None
                self.cancel()

    def notify(self, on_token: Callable[[], None]) -> None:
        """Calls `on_token` after each token from now on, in the engine's thread: it must not block.

        After this call, read `ready()` once: tokens that arrived before it caused no call.
        """
        self._on_token = on_token

    def cancel(self) -> None:
        """Ends the request: the engine frees its slot before the next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class Limits:
    """The size of the engine's cache, step and queue.

    `deterministic`: no answer's bits depend on other requests, even if a GPU decodes more than 32 of them at once.
    """

    slots: int = 8  # requests at once
    max_len: int = 2048  # tokens of a request: prompt and answer
    chunk: int = 256  # the most prompt tokens of a step
    queue: int = 64  # waiting requests, without those for which a slot is free
    deterministic: bool = False


@dataclass(frozen=True)
class ServedAdapter:
    """A loaded adapter: SHA-256 of its tensor file, Unix time of loading, identity of the base it was trained on."""

    name: str
    sha256: str
    loaded_at: float
    trained_on: str | None = None
    attached: Mapping[str, int] = field(default_factory=dict)  # modules with LoRA by last name


@dataclass(frozen=True)
class Stats:
    """Counters since the start (*_total), limits, and current use."""

    slots: int
    queue_limit: int
    cache_tokens_total: int
    running: int = 0
    waiting: int = 0
    cache_tokens_used: int = 0
    requests_total: int = 0
    finished_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0
    reused_tokens_total: int = 0  # prompt tokens whose keys and values another slot had (prefix caching)
    generated_tokens_total: int = 0
    steps_total: int = 0
