"""Builds the FastAPI app: the routes, the error handlers, and the middleware (guard, CORS)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from octavo._version import __version__
from octavo.config import ServeOptions
from octavo.server import adapters, chat, completions, legacy, status
from octavo.server.addresses import LOOPBACK, is_loopback, is_wildcard
from octavo.server.errors import install
from octavo.server.guard import OPEN_PATHS, Guard, Rules
from octavo.server.service import Engine, Service
from octavo.server.unsupported import describe_fields

# Requests allowed in addition to the engine's slots and queue: those whose body is being read or whose prompt is being
# tokenized, and those that need no generation.
SPARE_REQUESTS = 16


def create_app(
    engine: Engine, options: ServeOptions, *, key: str | None = None, names: tuple[str, ...] = ()
) -> FastAPI:
    """The app that serves `engine`. `app.state.service` is its Service.

    `key` is the API key that clients must send, or None. `names` are this machine's host names: the guard accepts them
    in the Host header in addition to --hosts.
    """
    service = Service(engine, options)
    app = FastAPI(
        title="octavo", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="Text generation with a base model and its LoRA adapters, compatible with OpenAI's API.",
    )  # fmt: skip
    app.state.service = service
    install(app)
    for routes in (completions.router(service), chat.router(service), legacy.router(service), status.router(service)):
        app.include_router(routes)
    if options.adapters_from is not None:
        app.include_router(adapters.router(service, options.adapters_from))
    rules = guard_rules(options, key=key, names=names)
    app.add_middleware(Guard, rules=rules, metrics=service.metrics)
    if rules.origins:
        # Starlette runs the middleware added last first. CORS must precede the guard: a preflight carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's JavaScript client sends about twelve headers of its own
            expose_headers=["Retry-After", "X-System-Fingerprint"],
        )
    _describe(app, key=key is not None)
    return app


def guard_rules(options: ServeOptions, *, key: str | None, names: tuple[str, ...]) -> Rules:
    """The guard's rules. A server on a loopback address accepts only loopback names in the Host header."""
    allowed = {*LOOPBACK, options.host} if is_loopback(options.host) else {*LOOPBACK, options.host, *names}
    return Rules(
        key=key,
        hosts=frozenset(name.lower() for name in (*allowed, *options.hosts) if name),
        origins=frozenset(origin.lower().rstrip("/") for origin in options.origins),
        requests=options.slots + options.queue + SPARE_REQUESTS,
        body_bytes=options.max_body_bytes,
        any_address=is_wildcard(options.host),
    )


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _describe(app: FastAPI, *, key: bool) -> None:
    """Adds to the OpenAPI schema what FastAPI omits: the API key, the rejected fields, and exact integer bounds.

    FastAPI's schema classes store every bound as a float, which cannot represent all integers above 2^53.
    """
    fastapi_schema = app.openapi
    cached: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if cached:
            return cached
        cached.update(schema := _integer_bounds(fastapi_schema()))
        describe_fields(schema["components"]["schemas"])
        if key:
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
        return cached

    app.openapi = openapi  # type: ignore[method-assign]


def _integer_bounds(schema: Any) -> Any:
    """The schema, with the bounds of every integer field converted to int."""
    if isinstance(schema, list):
        return [_integer_bounds(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    is_integer = schema.get("type") == "integer"
    return {
        name: int(value) if is_integer and name in BOUNDS and isinstance(value, float) else _integer_bounds(value)
        for name, value in schema.items()
    }
