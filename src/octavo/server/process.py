"""The server's process: the socket, uvicorn, and how both end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI

from octavo.config import ServeOptions
from octavo.errors import UsageError
from octavo.server.connections import Connection

# What uvicorn still waits for answers after the engine has ended them all: they have only to be sent.
SENDING_SECONDS = 5


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet. UsageError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a moment ago is no obstacle
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise UsageError(
            f"The address {host}:{port} cannot be listened on ({error.strerror or error}).",
            hint="Choose another one with --host and --port.",
        ) from error
    return held


def run(
    app: FastAPI,
    held: socket.socket,
    *,
    options: ServeOptions,
    listening: Callable[[], None],
    stop_engine: Callable[[float], None],
) -> None:
    """Serves `app` until SIGTERM or Ctrl-C; answers at work are finished within the grace time.

    `listening` is called once requests can come, `stop_engine` with the grace time once no more do.
    """
    config = uvicorn.Config(
        app, http=partial(Connection, most=options.max_connections),  # type: ignore[arg-type]  # called like a class
        log_config=None, log_level=options.log_level, access_log=options.log_level in ("info", "debug"),
        ws="none", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(options.grace_seconds) + SENDING_SECONDS,
    )  # fmt: skip
    _log_to_stderr(options.log_level)
    with _signals_end_quietly():
        _Server(config, listening, lambda: _drain(app, stop_engine, options.grace_seconds)).run([held])


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it listens, and has the engine stop while it waits for the last answers."""

    def __init__(
        self, config: uvicorn.Config, listening: Callable[[], None], drain: Callable[[], threading.Thread]
    ) -> None:
        super().__init__(config)
        self._listening, self._drain = listening, drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = self._drain()
        await super().shutdown(sockets)
        while stopping.is_alive() and not self.force_exit:  # a second Ctrl-C does not wait
            await asyncio.sleep(0.02)


def _drain(app: FastAPI, stop_engine: Callable[[float], None], grace_seconds: float) -> threading.Thread:
    app.state.service.draining = True
    thread = threading.Thread(target=stop_engine, args=(grace_seconds,), name="octavo-drain", daemon=True)
    thread.start()
    return thread


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signals that ended it again once it is done: they have had their effect by then."""
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda *_: None) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _log_to_stderr(level: str) -> None:
    """uvicorn's own setting would write requests to stdout, which is --json's."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("uvicorn", "octavo.server"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
