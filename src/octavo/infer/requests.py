"""What is asked of an engine and what it answers: requests in, streams of tokens out, from any thread; its limits and
counts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

from octavo.errors import OctavoError, UsageError
from octavo.infer.generate import check_prompt
from octavo.infer.sample import Sampling

SEEDS = -(2**63), 2**64 - 1  # what PyTorch's generators take


class QueueFullError(OctavoError):
    """More requests wait than the engine takes."""


@dataclass(frozen=True)
class Request:
    """A prompt to go on from. `adapter` names one that the engine holds, None for the base.

    `logprobs`: with each token its log-probability and those of so many likeliest ones; None for none.
    `prompt_logprobs`: the same for the prompt's tokens, in `Stream.prompt`.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None
    logprobs: int | None = None
    prompt_logprobs: bool = False


def check_request(request: Request, *, context: int, vocab_size: int) -> None:
    """UsageError for what would fail in the midst of a step, where others are at work too."""
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

    `finish_reason` comes with the last one: "stop" (end token, stop string), "length", "cancelled" or "error".
    `logprob` and `top` (token id, log-probability; likeliest first) are natural logarithms before temperature.
    """

    token_id: int
    text: str
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Stream:
    """The answer to one request, read token by token from one thread while the engine writes from another.

    `adapter` is what the request's adapter was when it was taken: the name may mean another one by now.
    """

    request: Request
    adapter: ServedAdapter | None = None
    first_token: float | None = None  # perf_counter() when it came
    prompt: tuple[Token, ...] = ()  # with `prompt_logprobs`: set before the first token; the first has no logprob
    error: str = ""
    failure: Exception | None = None  # what `error` tells of
    _tokens: SimpleQueue[Token] = field(default_factory=SimpleQueue)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _on_token: Callable[[], None] | None = None

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come; ends after the one with a finish reason."""
        while True:
            token = self._tokens.get()
            yield token
            if token.finish_reason is not None:
                return

    def ready(self) -> list[Token]:
        """The tokens that have come since the last call, without waiting."""
        found = []
        while not self._tokens.empty():
            found.append(self._tokens.get())
        return found

    def next(self, timeout: float | None = None) -> Token:
        """The next token; queue.Empty if none comes in `timeout` seconds."""
        return self._tokens.get(timeout=timeout)

    def put(self, token: Token) -> None:
        """The engine's side."""
        if self.first_token is None and token.token_id >= 0:
            self.first_token = perf_counter()
        self._tokens.put(token)
        if self._on_token is not None:
            try:
                self._on_token()
            except Exception:  # whoever listened is gone; the engine has others to serve
                self._on_token = None
                self.cancel()

    def notify(self, on_token: Callable[[], None]) -> None:
        """Has `on_token` called after each token that comes from now on, in the engine's thread: it must not block.

        Whoever then takes what is there with `ready()` and waits for the call misses nothing.
        """
        self._on_token = on_token

    def cancel(self) -> None:
        """The engine frees the request's slot before its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()


@dataclass(frozen=True)
class Limits:
    """What is taken at once: slots, positions of each (prompt and answer), prompt tokens a step, and how many requests
    may wait beyond those that free slots will take. `deterministic`: no answer's bits depend on other requests, even
    where a GPU decodes more than 32 of them at once.
    """

    slots: int = 8
    max_len: int = 2048
    chunk: int = 256
    queue: int = 64
    deterministic: bool = False


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that the engine holds. `sha256` is that of its tensors' file, `trained_on` its base's, if known."""

    name: str
    sha256: str
    folder: Path
    loaded_at: float
    trained_on: str | None = None


@dataclass(frozen=True)
class Stats:
    """Counts since the start, and what is taken now."""

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
    reused_tokens_total: int = 0  # of prompts: found in a slot that began alike
    generated_tokens_total: int = 0
    steps_total: int = 0
