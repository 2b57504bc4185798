"""POST /v1/completions: continues text or token ids, with or without streaming, with echo and logprobs.

Evaluation harnesses send `echo` with `logprobs` and `max_tokens` 0 or 1 to score a text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from time import time
from uuid import uuid4

from fastapi import APIRouter, Request

from octavo.infer import requests as engine_requests
from octavo.infer.requests import Token
from octavo.server.generation import DONE, EventStream, Generation, event_of
from octavo.server.logprobs import Vocabulary, completion_logprobs
from octavo.server.requests import CompletionRequest
from octavo.server.responses import STREAMED, Completion, CompletionChoice, CompletionLogprobs, FinishReason, Usage
from octavo.server.service import Served, Service

DEFAULT_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    text: str  # returned by echo


@dataclass
class _ChoiceBuilder:
    """Turns the tokens of one choice into response chunks, and joins them if the response is not streamed.

    With `echo` the text of a choice is the prompt followed by the answer, and `text_offset` counts from the start of
    the prompt. With `max_tokens` 0 the answer is empty: the engine always generates one token, which is discarded.
    """

    body: CompletionRequest
    prompt: _Prompt
    vocabulary: Vocabulary
    index: int  # of the choice in the response
    length: int = 0  # characters of the text so far
    generated: int = 0  # tokens of the answer so far, for `usage`
    started: bool = False  # whether the first chunk, with the echo, has been built
    collected: list[CompletionChoice] = field(default_factory=list)  # the chunks of a response that is not streamed

    def chunk(self, token: Token, prompt_tokens: Sequence[Token]) -> CompletionChoice:
        """The chunk for `token`. The first one starts with the echo; `prompt_tokens` are () without logprobs."""
        text, tokens, offsets = "", [], []
        if self.body.echo and not self.started:
            text = self.prompt.text
            tokens = list(prompt_tokens)
            starts = accumulate((len(self.vocabulary.text_of(t.token_id)) for t in tokens), initial=0)
            # A token that holds part of a character has a longer text ("bytes:\xe2"), so the sum may exceed the length.
            # Not strict: `accumulate` also yields the end of the last token.
            offsets = [min(start, len(text)) for start, _ in zip(starts, tokens, strict=False)]
            self.length = len(text)
        self.started = True
        if self.body.max_tokens != 0:
            text += token.text
            tokens.append(token)
            offsets.append(self.length)
            self.length += len(token.text)
            self.generated += 1
        return CompletionChoice(
            index=self.index, text=text, logprobs=self._logprobs(tokens, offsets), finish_reason=self._reason(token)
        )

    def _reason(self, token: Token) -> FinishReason | None:
        if self.body.max_tokens == 0:
            return "length"
        return "stop" if token.finish_reason == "stop" else "length" if token.finish_reason == "length" else None

    def _logprobs(self, tokens: Sequence[Token], offsets: Sequence[int]) -> CompletionLogprobs | None:
        if self.body.logprobs is None:
            return None
        return completion_logprobs(tokens, offsets, vocabulary=self.vocabulary, top=self.body.logprobs)

    def merged(self) -> CompletionChoice:
        """The collected chunks joined into one choice."""
        logprobs = [part.logprobs for part in self.collected if part.logprobs is not None]
        joined = CompletionLogprobs(
            tokens=[x for part in logprobs for x in part.tokens],
            token_logprobs=[x for part in logprobs for x in part.token_logprobs],
            top_logprobs=[x for part in logprobs for x in part.top_logprobs],
            text_offset=[x for part in logprobs for x in part.text_offset],
        )
        return CompletionChoice(
            index=self.index,
            text="".join(part.text for part in self.collected),
            logprobs=joined if logprobs else None,
            finish_reason=self.collected[-1].finish_reason,
        )


@dataclass
class _Job:
    """One HTTP request: one builder, and one stream of the engine, for each choice (each prompt n times)."""

    body: CompletionRequest
    served: Served
    prompts: list[_Prompt]
    builders: list[_ChoiceBuilder]
    generation: Generation
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time()))

    def completion(self, choices: Sequence[CompletionChoice], usage: Usage | None) -> Completion:
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
        prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        generated = sum(builder.generated for builder in self.builders)
        total = prompt_tokens + generated
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=generated, total_tokens=total)

    async def chunks(self) -> AsyncIterator[CompletionChoice]:
        """The chunks of all choices as their tokens arrive. The caller enters `generation`, which frees the slots."""
        async with aclosing(self.generation.tokens()) as tokens:
            async for index, token in tokens:
                yield self.builders[index].chunk(token, self.generation.streams[index].prompt)

    async def response(self) -> Completion:
        with self.generation:
            async for chunk in self.chunks():
                self.builders[chunk.index].collected.append(chunk)
        return self.completion([builder.merged() for builder in self.builders], self.usage)

    async def events(self) -> AsyncIterator[str]:
        """The response as server-sent events. `EventStream` enters `generation`, since sending may fail as well."""
        async for chunk in self.chunks():
            if chunk.text or chunk.logprobs or chunk.finish_reason:  # not for a part of a character
                yield event_of(self.completion([chunk], None).model_dump_json())
        if self.body.with_usage:
            yield event_of(self.completion([], self.usage).model_dump_json())
        yield DONE


def router(service: Service) -> APIRouter:
    """The route /v1/completions."""
    routes = APIRouter()

    @routes.post("/v1/completions", response_model=Completion, responses=STREAMED, tags=["OpenAI"])
    async def completions(body: CompletionRequest, request: Request) -> Completion | EventStream:
        """Continues one or several prompts, each n times."""
        service.check_fields(body, request.url.path)
        job = await _begin(service, body, request)
        return EventStream(job.generation, job.events()) if body.stream else await job.response()

    return routes


async def _begin(service: Service, body: CompletionRequest, request: Request) -> _Job:
    served = service.named(body.model)
    samplings = service.samplings(body, service.new_tokens(body.max_tokens, DEFAULT_MAX_TOKENS))
    prompts = await _prompts(service, body)
    score_prompt = bool(body.echo) and body.logprobs is not None
    submitted = [
        engine_requests.Request(
            tuple(prompt.ids), sampling, served.adapter, body.logprobs, prompt_logprobs=score_prompt
        )
        for prompt in prompts
        for sampling in samplings
    ]
    builders = [
        _ChoiceBuilder(body, prompt, service.vocabulary, index)
        for index, prompt in enumerate(prompt for prompt in prompts for _ in samplings)
    ]
    return _Job(body, served, prompts, builders, service.begin(submitted, request.receive))


async def _prompts(service: Service, body: CompletionRequest) -> list[_Prompt]:
    """The prompts of a request, which may be a string, a list of strings, a list of ids, or a list of such lists."""
    value = body.prompt
    inputs = value if isinstance(value, list) and not isinstance(value[0], int) else [value]
    prompts = []
    for prompt in inputs:
        if isinstance(prompt, str):
            ids, text = await service.encode_text(prompt), prompt
        else:
            assert isinstance(prompt, list)
            ids, text = [token for token in prompt if isinstance(token, int)], ""
        service.check_prompt(ids, param="prompt")
        if not isinstance(prompt, str) and body.echo:
            text = service.engine.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        prompts.append(_Prompt(ids, text))
    return prompts
