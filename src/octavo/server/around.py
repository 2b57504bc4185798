"""What is not generation: the names that are served, token ids, whether the server is well, and its counts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body
from fastapi.responses import PlainTextResponse

from octavo.server.answers import REFUSALS, TEXT_REFUSALS, ModelCard, ModelList, State, Tokens
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.schemas import TokenizeChat, TokenizeText
from octavo.server.service import Served, Service


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(responses=REFUSALS)
    engine = service.engine

    def card(served: Served) -> ModelCard:
        return ModelCard(
            id=served.name,
            created=served.created,
            parent=None if served.adapter is None else engine.base,
            system_fingerprint=served.fingerprint,
            max_model_len=engine.context,
        )

    @routes.get("/v1/models", tags=["OpenAI"])
    async def models() -> ModelList:
        """The base and the adapters on it."""
        return ModelList(data=[card(served) for served in service.names()])

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"])
    async def model(model: str) -> ModelCard:
        """One of them."""
        return card(service.named(model))

    @routes.post("/tokenize", tags=["tokens"])
    async def tokenize(asked: Annotated[TokenizeText | TokenizeChat, Body()]) -> Tokens:
        """The ids that a prompt or a conversation becomes."""
        served = service.named(asked.model)
        if isinstance(asked, TokenizeText):
            ids = await service.encode_text(asked.prompt, begin=asked.add_special_tokens)
        else:
            ids = await service.encode_chat(asked.messages)
        return Tokens(tokens=ids, count=len(ids), max_model_len=engine.context, system_fingerprint=served.fingerprint)

    @routes.get("/health", tags=["the server"])
    async def health() -> State:
        """Says that the server runs."""
        return State()

    @routes.get("/ready", tags=["the server"])
    async def ready() -> State:
        """Says that the server takes requests: 503 once it is told to stop."""
        service.check_open()
        return State()

    @routes.get("/metrics", responses=TEXT_REFUSALS, response_class=PlainTextResponse, tags=["the server"])
    async def metrics() -> PlainTextResponse:
        """Counts for Prometheus."""
        text = service.metrics.text(engine.stats(), [(served.name, served.fingerprint) for served in service.names()])
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})

    return routes
