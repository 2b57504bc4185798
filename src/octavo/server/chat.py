"""POST /v1/chat/completions: a conversation through the model's own chat template, whole or in pieces."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request

from octavo.infer import requests
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
    """One request at work."""

    asked: ChatRequest
    served: Served
    prompt_tokens: int
    new_tokens: int
    service: Service
    generation: Generation
    written: int = 0
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time()))

    @property
    def usage(self) -> Usage:
        read, written = self.prompt_tokens, self.written
        return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def tokens(self) -> AsyncIterator[tuple[int, Token, ChatLogprob | None, FinishReason | None]]:
        """(choice, its next token, the log-probabilities if asked for, why it is the last)."""
        async with aclosing(self.generation.tokens()) as tokens:
            async for number, token in tokens:
                if self.new_tokens == 0:
                    yield number, Token(token.token_id, ""), None, "length"
                    continue
                self.written += 1
                top = self.asked.wanted_logprobs
                told = None if top is None else chat_logprob(token, self.service.vocabulary, top=top)
                reason: FinishReason | None = None
                if token.finish_reason is not None:
                    reason = "stop" if token.finish_reason == "stop" else "length"
                yield number, token, told, reason

    async def whole(self) -> Chat:
        texts = ["" for _ in self.generation.streams]
        logprobs: list[list[ChatLogprob]] = [[] for _ in texts]
        reasons: list[FinishReason] = ["length" for _ in texts]
        with self.generation:
            async for number, token, told, reason in self.tokens():
                texts[number] += token.text
                logprobs[number] += [told] if told else []
                reasons[number] = reason or reasons[number]
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=text),
                logprobs=None if self.asked.wanted_logprobs is None else ChatLogprobs(content=logprobs[index]),
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
        async for index, token, told, reason in self.tokens():
            if token.text or told:
                yield self._event(index, {"content": token.text}, told)
            if reason is not None:
                yield self._event(index, {}, reason=reason)
        if self.asked.with_usage:
            yield event_of(json.dumps({**self._chunk([]), "usage": self.usage.model_dump()}))
        yield DONE

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        told: ChatLogprob | None = None,
        reason: FinishReason | None = None,
    ) -> str:
        logprobs = ChatLogprobs(content=[told]).model_dump() if told else None
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
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", response_model=Chat, responses=STREAMED, tags=["OpenAI"])
    async def chat_completions(asked: ChatRequest, request: Request) -> Chat | EventStream:
        """Answers a conversation, n times."""
        service.check_fields(asked, request.url.path)
        job = await _begin(service, asked, request)
        return EventStream(job.generation, job.events()) if asked.stream else await job.whole()

    return routes


async def _begin(service: Service, asked: ChatRequest, request: Request) -> _Job:
    served = service.named(asked.model)
    name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
    new_tokens = service.new_tokens(getattr(asked, name), service.options.max_new_tokens, param=name)
    ids = await service.encode_chat(asked.messages)
    service.check_prompt(ids, param="messages")
    wanted = [
        requests.Request(tuple(ids), sampling, served.adapter, asked.wanted_logprobs)
        for sampling in service.samplings(asked, new_tokens)
    ]
    return _Job(asked, served, len(ids), new_tokens, service, service.begin(wanted, request.receive))
