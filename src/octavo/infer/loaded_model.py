"""A model that is ready for generation, and answers from an engine that runs in the caller's thread.

`octavo generate`, `octavo chat`, the Python API and the tasks of lm-evaluation-harness use it; a server runs its engine
in a thread of its own (server/process.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from octavo.errors import ModelError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream, Token
from octavo.infer.sample import Sampling
from octavo.models import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class LoadedModel:
    """A model with its adapter applied, its tokenizer and its stop ids."""

    model: Decoder
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]

    def engine(self, *, max_len: int, slots: int = 1, queue: int = 1) -> Engine:
        """An engine for `slots` concurrent requests, each of up to `max_len` tokens with its answer."""
        limits = Limits(slots=slots, max_len=max_len, queue=queue)
        return Engine(self.model, self.tokenizer, base="model", limits=limits, stop_ids=self.stop_ids)


def answer(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> Generator[Token]:
    """Yields the tokens of one answer. The engine runs in this thread; closing the generator cancels the request.

    Raises the error of the engine, if it fails.
    """
    stream = engine.submit(Request(tuple(prompt), sampling))
    finished = False
    try:
        while not finished:
            engine.step()
            for token in stream.ready():
                if token.finish_reason == "error":
                    raise failure_of(stream)
                finished = token.finish_reason is not None
                yield token
    finally:
        if not finished:
            stream.cancel()
            engine.step()  # releases the slot of the cancelled request


def until_finished(engine: Engine, stream: Stream) -> list[Token]:
    """Runs the engine until a stream is finished; returns all of its tokens."""
    tokens: list[Token] = list(stream.ready())
    while not tokens or tokens[-1].finish_reason is None:
        engine.step()
        tokens += stream.ready()
    return tokens


def failure_of(stream: Stream) -> Exception:
    """The exception with which the engine failed at a request."""
    return stream.failure or ModelError(stream.error or "The engine failed.")
