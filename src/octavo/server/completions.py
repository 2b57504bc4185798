"""POST /v1/completions: text or token ids to continue, whole or in pieces, with echo and log-probabilities.

`echo` with `logprobs` and `max_tokens` 1 or 0 is how evaluation harnesses ask how likely a text is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from time import time
from uuid import uuid4

from fastapi import APIRouter, Request

from octavo.infer import requests
from octavo.infer.requests import Token
from octavo.server.generation import DONE, EventStream, Generation, event_of
from octavo.server.logprobs import Vocabulary, completion_logprobs
from octavo.server.requests import CompletionRequest
from octavo.server.responses import STREAMED, Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage
from octavo.server.service import Served, Service

NEW_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    text: str  # what echo gives back


@dataclass
class _Writer:
    """Makes one choice's pieces out of its tokens; its text and offsets go on from piece to piece."""

    asked: CompletionRequest
    prompt: _Prompt
    vocabulary: Vocabulary
    index: int
    length: int = 0  # characters written
    written: int = 0  # tokens that count as the answer's
    begun: bool = False
    parts: list[CompletionChoice] = field(default_factory=list)

    def piece(self, token: Token, prompt: Sequence[Token]) -> CompletionChoice:
        """What `token` adds; the first piece begins with the echo. `prompt` are the prompt's tokens, if asked for."""
        text, tokens, offsets = "", [], []
        if self.asked.echo and not self.begun:
            text = self.prompt.text
            tokens = list(prompt)
            starts = accumulate((len(self.vocabulary.text_of(t.token_id)) for t in tokens), initial=0)
            # Tokens that are parts of characters have texts of their own: the sum may overshoot.
            offsets = [min(start, len(text)) for start, _ in zip(starts, tokens, strict=False)]
            self.length = len(text)
        self.begun = True
        if self.asked.max_tokens != 0:
            text += token.text
            tokens.append(token)
            offsets.append(self.length)
            self.length += len(token.text)
            self.written += 1
        return CompletionChoice(
            index=self.index, text=text, logprobs=self._logprobs(tokens, offsets), finish_reason=self._reason(token)
        )

    def _reason(self, token: Token) -> FinishReason | None:
        if self.asked.max_tokens == 0:
            return "length"
        return "stop" if token.finish_reason == "stop" else "length" if token.finish_reason == "length" else None

    def _logprobs(self, tokens: Sequence[Token], offsets: Sequence[int]) -> CompletionLogprobs | None:
        if self.asked.logprobs is None:
            return None
        return completion_logprobs(tokens, offsets, vocabulary=self.vocabulary, top=self.asked.logprobs)

    def whole(self) -> CompletionChoice:
        """All pieces as one."""
        logprobs = [part.logprobs for part in self.parts if part.logprobs is not None]
        joined = CompletionLogprobs(
            tokens=[x for part in logprobs for x in part.tokens],
            token_logprobs=[x for part in logprobs for x in part.token_logprobs],
            top_logprobs=[x for part in logprobs for x in part.top_logprobs],
            text_offset=[x for part in logprobs for x in part.text_offset],
        )
        return CompletionChoice(
            index=self.index,
            text="".join(part.text for part in self.parts),
            logprobs=joined if logprobs else None,
            finish_reason=self.parts[-1].finish_reason,
        )


@dataclass
class _Job:
    """One request at work."""

    asked: CompletionRequest
    served: Served
    prompts: list[_Prompt]
    writers: list[_Writer]
    generation: Generation
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time()))

    def answer(self, choices: Sequence[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.served.name,
            system_fingerprint=self.generation.fingerprint,
            choices=list(choices),
            usage=usage,
        )

    @property
    def usage(self) -> Usage:
        read = sum(len(prompt.ids) for prompt in self.prompts)
        written = sum(writer.written for writer in self.writers)
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def pieces(self) -> AsyncIterator[CompletionChoice]:
        async with aclosing(self.generation.tokens()) as tokens:
            async for number, token in tokens:
                yield self.writers[number].piece(token, self.generation.streams[number].prompt)

    async def whole(self) -> Completion:
        with self.generation:
            async for piece in self.pieces():
                self.writers[piece.index].parts.append(piece)
        return self.answer([writer.whole() for writer in self.writers], self.usage)

    async def events(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text or piece.logprobs or piece.finish_reason:
                yield event_of(self.answer([piece], None).model_dump_json())
        if self.asked.with_usage:
            yield event_of(self.answer([], self.usage).model_dump_json())
        yield DONE


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED, tags=["OpenAI"])
    async def completions(asked: CompletionRequest, request: Request) -> Completion | EventStream:
        """Continues one or several prompts, each n times."""
        service.check_fields(asked, request.url.path)
        job = await _begin(service, asked, request)
        return EventStream(job.generation, job.events()) if asked.stream else await job.whole()

    return routes


async def _begin(service: Service, asked: CompletionRequest, request: Request) -> _Job:
    served = service.named(asked.model)
    samplings = service.samplings(asked, service.new_tokens(asked.max_tokens, NEW_TOKENS))
    prompts = await _prompts(service, asked)
    scored = bool(asked.echo) and asked.logprobs is not None
    wanted = [
        requests.Request(tuple(prompt.ids), sampling, served.adapter, asked.logprobs, prompt_logprobs=scored)
        for prompt in prompts
        for sampling in samplings
    ]
    writers = [
        _Writer(asked, prompt, service.vocabulary, index)
        for index, prompt in enumerate(prompt for prompt in prompts for _ in samplings)
    ]
    return _Job(asked, served, prompts, writers, service.begin(wanted, request.receive))


async def _prompts(service: Service, asked: CompletionRequest) -> list[_Prompt]:
    """The prompts in their four forms: text, texts, ids, lists of ids."""
    given = asked.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            ids, text = await service.encode_text(prompt), prompt
        else:
            assert isinstance(prompt, list)
            ids, text = [number for number in prompt if isinstance(number, int)], ""
        service.check_prompt(ids, param="prompt")
        if not isinstance(prompt, str) and asked.echo:
            text = service.engine.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        prompts.append(_Prompt(ids, text))
    return prompts
