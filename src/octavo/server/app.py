"""The app: routes over one service, errors in one shape, the guard before all of it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from octavo._version import __version__
from octavo.config import ServeOptions
from octavo.server import adapters, around, article, chat, completions
from octavo.server.addresses import LOOPBACK, is_loopback, is_wildcard
from octavo.server.guard import OPEN_PATHS, Guard, Rules
from octavo.server.refusals import install
from octavo.server.service import Engine, Service

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
    for routes in (completions.router(service), chat.router(service), article.router(service), around.router(service)):
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
    if key is not None:
        _describe_key(app)
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


def _describe_key(app: FastAPI) -> None:
    """Adds the key to the OpenAPI schema: the guard asks for it, of which FastAPI knows nothing."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        schema = plain()
        schema.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]
        return schema

    app.openapi = described  # type: ignore[method-assign]
