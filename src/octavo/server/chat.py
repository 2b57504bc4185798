"""POST /v1/chat/completions: applies the model's chat template and generates, with or without streaming."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request

from octavo.infer import requests as engine_requests
from octavo.infer.requests import Token
from octavo.server.generation import DONE, EventStream, Generation, event_of
from octavo.server.logprobs import chat_logprob
from octavo.server.requests import ChatRequest
from octavo.server.responses import (
    STREAMED,
    AnswerMessage,
    Chat,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    FinishReason,
    Usage,
)
from octavo.server.service import Served, Service


@dataclass
class _Job:
    """One running request."""

    body: ChatRequest
    served: Served
    prompt_tokens: int
    new_tokens: int
    service: Service
    generation: Generation
    generated: int = 0  # tokens over all choices
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time()))

    @property
    def usage(self) -> Usage:
        prompt, generated = self.prompt_tokens, self.generated
        return Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)

    async def tokens(self) -> AsyncIterator[tuple[int, Token, ChatLogprob | None, FinishReason | None]]:
        """Yields (choice index, token, logprob if requested, finish reason if it is the choice's last token)."""
        async with aclosing(self.generation.tokens()) as tokens:
            async for index, token in tokens:
                if self.new_tokens == 0:
                    yield index, Token(token.token_id, ""), None, "length"
                    continue
                self.generated += 1
                top = self.body.logprob_count
                logprob = None if top is None else chat_logprob(token, self.service.vocabulary, top=top)
                reason: FinishReason | None = None
                if token.finish_reason is not None:
                    reason = "stop" if token.finish_reason == "stop" else "length"
                yield index, token, logprob, reason

    async def response(self) -> Chat:
        texts = ["" for _ in self.generation.streams]
        logprobs: list[list[ChatLogprob]] = [[] for _ in texts]
        reasons: list[FinishReason] = ["length" for _ in texts]
        with self.generation:
            async for index, token, logprob, reason in self.tokens():
                texts[index] += token.text
                logprobs[index] += [logprob] if logprob else []
                reasons[index] = reason or reasons[index]
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=text),
                logprobs=None if self.body.logprob_count is None else ChatLogprobs(content=logprobs[index]),
                finish_reason=reasons[index],
            )
            for index, text in enumerate(texts)
        ]
        return Chat(
            id=self.id,
            created=self.created,
            model=self.served.name,
            system_fingerprint=self.generation.fingerprint,
            choices=choices,
            usage=self.usage,
        )

    async def events(self) -> AsyncIterator[str]:
        for index in range(len(self.generation.streams)):
            yield self._event(index, {"role": "assistant", "content": ""})
        async for index, token, logprob, reason in self.tokens():
            if token.text or logprob:
                yield self._event(index, {"content": token.text}, logprob)
            if reason is not None:
                yield self._event(index, {}, reason=reason)
        if self.body.with_usage:
            yield event_of(json.dumps({**self._chunk([]), "usage": self.usage.model_dump()}))
        yield DONE

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        logprob: ChatLogprob | None = None,
        reason: FinishReason | None = None,
    ) -> str:
        logprobs = ChatLogprobs(content=[logprob]).model_dump() if logprob else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event_of(json.dumps(self._chunk([choice])))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.generation.fingerprint,
            "choices": choices,
            "usage": None,
        }


def router(service: Service) -> APIRouter:
    """The route /v1/chat/completions."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=Chat, responses=STREAMED, tags=["OpenAI"])
    async def chat_completions(body: ChatRequest, request: Request) -> Chat | EventStream:
        """Generates n answers to a conversation."""
        service.check_fields(body, request.url.path)
        job = await _begin(service, body, request)
        return EventStream(job.generation, job.events()) if body.stream else await job.response()

    return routes


async def _begin(service: Service, body: ChatRequest, request: Request) -> _Job:
    served = service.named(body.model)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    new_tokens = service.new_tokens(getattr(body, name), service.options.max_new_tokens, param=name)
    ids = await service.encode_chat(body.messages)
    service.check_prompt(ids, param="messages")
    submitted = [
        engine_requests.Request(tuple(ids), sampling, served.adapter, body.logprob_count)
        for sampling in service.samplings(body, new_tokens)
    ]
    return _Job(body, served, len(ids), new_tokens, service, service.begin(submitted, request.receive))
