"""Routes other than generation: index, models, tokenize and detokenize, health, readiness, version, metrics, docs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request
from fastapi.responses import HTMLResponse, PlainTextResponse

from octavo._version import __version__
from octavo.server.metrics import CONTENT_TYPE
from octavo.server.reference import reference_page
from octavo.server.requests import Detokenize, TokenizeChat, TokenizeText
from octavo.server.responses import (
    ERROR_RESPONSES,
    TEXT_ERROR_RESPONSES,
    Index,
    ModelCard,
    ModelList,
    State,
    Text,
    Tokens,
    Version,
)
from octavo.server.service import Served, Service


def router(service: Service) -> APIRouter:
    """All routes of this module."""
    routes = APIRouter(responses=ERROR_RESPONSES)
    engine = service.engine

    def model_card(served: Served) -> ModelCard:
        return ModelCard(
            id=served.name,
            created=served.created,
            parent=None if served.adapter is None else engine.base,
            attached=served.attached,
            system_fingerprint=served.fingerprint,
            max_model_len=engine.context,
        )

    @routes.get("/v1/models", tags=["OpenAI"])
    async def models() -> ModelList:
        """Lists the base model and its adapters."""
        return ModelList(data=[model_card(served) for served in service.models()])

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"])
    async def model(model: str) -> ModelCard:
        """Returns one model."""
        return model_card(service.named(model))

    _add_tokens(routes, service)
    _add_state(routes, service)
    return routes


def _add_tokens(routes: APIRouter, service: Service) -> None:
    engine = service.engine

    @routes.post("/tokenize", tags=["tokens"])
    async def tokenize(body: Annotated[TokenizeText | TokenizeChat, Body()]) -> Tokens:
        """Returns the token ids of a prompt or a conversation."""
        service.check_fields(body, "/tokenize")
        served = service.named(body.model)
        if isinstance(body, TokenizeText):
            ids = await service.encode_text(body.prompt, bos=body.add_special_tokens)
        else:
            ids = await service.encode_chat(body.messages)
        return Tokens(tokens=ids, count=len(ids), max_model_len=engine.context, system_fingerprint=served.fingerprint)

    @routes.post("/detokenize", tags=["tokens"])
    async def detokenize(body: Detokenize) -> Text:
        """Returns the text of token ids, including special tokens."""
        service.check_fields(body, "/detokenize")
        service.named(body.model)
        service.check_ids(body.tokens, param="tokens")
        return Text(prompt=await service.decode(body.tokens))


def _add_state(routes: APIRouter, service: Service) -> None:
    @routes.get("/", tags=["server"])
    async def index(request: Request) -> Index:
        """Returns the version, the models and the routes."""
        paths_schema: dict[str, dict[str, object]] = request.app.openapi()["paths"]
        paths = [f"{method.upper()} {path}" for path, methods in paths_schema.items() for method in methods]
        return Index(
            version=__version__,
            models=[served.name for served in service.models()],
            routes=[*paths, "GET /docs", "GET /openapi.json"],
        )

    @routes.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """The API reference as an HTML page."""
        return HTMLResponse(reference_page(request.app.openapi(), str(request.base_url)))

    @routes.get("/version", tags=["server"])
    async def version() -> Version:
        """Returns the version of octavo."""
        return Version(version=__version__)

    @routes.get("/ping", tags=["server"])
    @routes.get("/health", tags=["server"])
    async def health() -> State:
        """Liveness: 200 while the server runs."""
        return State()

    @routes.get("/ready", tags=["server"])
    async def ready() -> State:
        """Readiness: 200 while the server accepts requests, 503 while it shuts down."""
        service.check_open()
        return State()

    @routes.get("/metrics", responses=TEXT_ERROR_RESPONSES, response_class=PlainTextResponse, tags=["server"])
    async def metrics() -> PlainTextResponse:
        """Metrics in Prometheus text format."""
        text = service.metrics.text(
            service.engine.stats(), [(served.name, served.fingerprint) for served in service.models()]
        )
        return PlainTextResponse(text, headers={"Content-Type": CONTENT_TYPE})
