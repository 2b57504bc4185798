"""The app: routes over one service, errors in one shape, the guard before all of it."""

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

# Requests that may be read and encoded beyond those that the engine holds, and those that only look.
SPARE_REQUESTS = 16


def create_app(
    engine: Engine, options: ServeOptions, *, key: str | None = None, names: tuple[str, ...] = ()
) -> FastAPI:
    """The app that serves `engine`; `app.state.service` is its Service.

    `key` is what clients must send, None for no key; `names` are this machine's, allowed as Host beside --hosts.
    """
    service = Service(engine, options)
    app = FastAPI(
        title="octavo", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        description="Text from a model and its adapters, in OpenAI's API.",
    )  # fmt: skip
    app.state.service = service
    install(app)
    for routes in (completions.router(service), chat.router(service), legacy.router(service), status.router(service)):
        app.include_router(routes)
    if options.adapters_from is not None:
        app.include_router(adapters.router(service, options.adapters_from))
    rules = rules_of(options, key=key, names=names)
    app.add_middleware(Guard, rules=rules, metrics=service.metrics)
    if rules.origins:
        # The last to be added stands first: a preflight carries no key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(rules.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a page sends a dozen of its own
            expose_headers=["Retry-After", "X-System-Fingerprint"],
        )
    _describe(app, key=key is not None)
    return app


def rules_of(options: ServeOptions, *, key: str | None, names: tuple[str, ...]) -> Rules:
    """The guard's rules. The names of a server that only this machine reaches are the loopback's."""
    own = {*LOOPBACK, options.host} if is_loopback(options.host) else {*LOOPBACK, options.host, *names}
    return Rules(
        key=key,
        hosts=frozenset(name.lower() for name in (*own, *options.hosts) if name),
        origins=frozenset(origin.lower().rstrip("/") for origin in options.origins),
        requests=options.slots + options.queue + SPARE_REQUESTS,
        body_bytes=options.max_body_bytes,
        any_address=is_wildcard(options.host),
    )


BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def _describe(app: FastAPI, *, key: bool) -> None:
    """Puts into the OpenAPI schema what FastAPI does not: the guard's key, fields that are refused, whole bounds.

    FastAPI's own classes hold every bound as a float, which past 2^53 names more than one whole number.
    """
    plain = app.openapi
    known: dict[str, Any] = {}

    def described() -> dict[str, Any]:
        if known:
            return known
        known.update(schema := _whole_bounds(plain()))
        describe_fields(schema["components"]["schemas"])
        if key:
            schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in schema["paths"].items():
                for operation in methods.values():
                    operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
        return known

    app.openapi = described  # type: ignore[method-assign]


def _whole_bounds(schema: Any) -> Any:
    """The schema with every bound of an integer as an integer."""
    if isinstance(schema, list):
        return [_whole_bounds(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    whole = schema.get("type") == "integer"
    return {
        name: int(value) if whole and name in BOUNDS and isinstance(value, float) else _whole_bounds(value)
        for name, value in schema.items()
    }
