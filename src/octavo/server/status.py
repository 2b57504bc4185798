"""What is not generation: an index, the names that are served, token ids, whether the server is well, its counts."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import HTMLResponse, PlainTextResponse

from octavo._version import __version__
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.reference import reference_page
from octavo.server.requests import Detokenize, TokenizeChat, TokenizeText
from octavo.server.responses import REFUSALS, TEXT_REFUSALS, Index, ModelCard, ModelList, State, Text, Tokens, Version
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

    _add_tokens(routes, service)
    _add_state(routes, service)
    return routes


def _add_tokens(routes: APIRouter, service: Service) -> None:
    engine = service.engine

    @routes.post("/tokenize", tags=["tokens"])
    async def tokenize(asked: Annotated[TokenizeText | TokenizeChat, Body()]) -> Tokens:
        """The ids that a prompt or a conversation becomes."""
        service.check_fields(asked, "/tokenize")
        served = service.named(asked.model)
        if isinstance(asked, TokenizeText):
            ids = await service.encode_text(asked.prompt, begin=asked.add_special_tokens)
        else:
            ids = await service.encode_chat(asked.messages)
        return Tokens(tokens=ids, count=len(ids), max_model_len=engine.context, system_fingerprint=served.fingerprint)

    @routes.post("/detokenize", tags=["tokens"])
    async def detokenize(asked: Detokenize) -> Text:
        """The text that ids stand for, that of control tokens too."""
        service.check_fields(asked, "/detokenize")
        service.named(asked.model)
        service.check_ids(asked.tokens, param="tokens")
        return Text(prompt=await service.decode(asked.tokens))


def _add_state(routes: APIRouter, service: Service) -> None:
    @routes.get("/", tags=["the server"])
    async def index(request: Request) -> Index:
        """Says what is here."""
        listed: dict[str, dict[str, object]] = request.app.openapi()["paths"]
        paths = [f"{method.upper()} {path}" for path, methods in listed.items() for method in methods]
        return Index(
            version=__version__,
            models=[served.name for served in service.names()],
            routes=[*paths, "GET /docs", "GET /openapi.json"],
        )

    @routes.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """All routes and fields, for people."""
        return HTMLResponse(reference_page(request.app.openapi(), str(request.base_url)))

    @routes.get("/version", tags=["the server"])
    async def version() -> Version:
        """Says which octavo this is."""
        return Version(version=__version__)

    @routes.get("/ping", tags=["the server"])
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
        text = service.metrics.text(
            service.engine.stats(), [(served.name, served.fingerprint) for served in service.names()]
        )
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})
