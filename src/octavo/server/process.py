"""The server process: the listening socket, uvicorn, and shutdown.

SIGTERM, SIGHUP and Ctrl-C shut down gracefully: running requests may finish within the grace time. A second Ctrl-C
ends the process immediately.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from octavo.config import ServeOptions
from octavo.errors import UsageError
from octavo.server.log import log_to_stderr
from octavo.server.protocol import Connection
from octavo.stopping import INTERRUPTED, handled

HANGUP = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()  # Windows has none
# Time for uvicorn to send the last responses after the engine has ended all requests.
SEND_SECONDS = 5
# Allows binding to the address of a server that just ended. Windows allows that by default, and there SO_REUSEADDR
# would let two processes listen on one address.
_ADDRESS_OPTION: int = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. UsageError if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the socket's protocol is IPPROTO_TCP. Without it each event of a stream may wait
    # 40 ms for the client's delayed acknowledgement of the previous one.
    bound_socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound_socket.setsockopt(socket.SOL_SOCKET, _ADDRESS_OPTION, 1)
        bound_socket.bind((host, port))
    except OSError as error:
        bound_socket.close()
        raise UsageError(
            f"Cannot listen on {host}:{port} ({error.strerror or error}).",
            hint="Choose another address with --host and --port.",
        ) from error
    return bound_socket


def run(
    app: FastAPI,
    bound_socket: socket.socket,
    *,
    options: ServeOptions,
    listening: Callable[[], None],
    stop_engine: Callable[[float], None],
) -> bool:
    """Serves `app` until SIGTERM, SIGHUP or Ctrl-C; running requests may finish within the grace time.

    Returns True after Ctrl-C. A second Ctrl-C ends the process with exit code 130, without returning.

    `listening` is called when the server accepts connections, `stop_engine` with the grace time when it shuts down.
    """
    config = uvicorn.Config(
        app, http=partial(Connection, max_connections=options.max_connections),  # type: ignore[arg-type]  # called like a class
        log_config=None, log_level=options.log_level, access_log=options.log_level in ("info", "debug"),
        ws="none", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=int(options.grace_seconds) + SEND_SECONDS,
    )  # fmt: skip
    server = _Server(config, listening, lambda: _drain(app, stop_engine, options.grace_seconds))
    with closing(log_to_stderr(options.log_level)), _ignore_reraised_signals(), handled(server.handle_exit, HANGUP):
        server.run([bound_socket])
    return signal.SIGINT in server.received


class _Server(uvicorn.Server):
    """A uvicorn server that calls `listening` after startup and stops the engine during shutdown.

    `received` lists the stop signals received.
    """

    def __init__(
        self, config: uvicorn.Config, listening: Callable[[], None], drain: Callable[[], threading.Thread]
    ) -> None:
        super().__init__(config)
        self._listening, self._drain = listening, drain
        self.received: list[int] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and signal.SIGINT in self.received:
            _exit_now()
        self.received.append(sig)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = self._drain()
        await super().shutdown(sockets)
        while stopping.is_alive():
            await asyncio.sleep(0.02)


def _exit_now() -> NoReturn:
    """Ends the process immediately, whatever its threads are doing.

    Python's regular exit would wait for some threads, cancel each request task with a traceback, and abort if the
    engine thread is in a matmul: that is C++ code, which must not be unwound.
    """
    with suppress(OSError):
        # Writing to a full pipe would block, so check first. On Windows select accepts only sockets.
        if os.name == "nt" or select.select([], [2], [], 0)[1]:
            os.write(2, b"octavo: Stopped at once.\n")  # not print, which is not reentrant in a signal handler
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


def _drain(app: FastAPI, stop_engine: Callable[[float], None], grace_seconds: float) -> threading.Thread:
    app.state.service.draining = True
    thread = threading.Thread(target=stop_engine, args=(grace_seconds,), name="octavo-drain", daemon=True)
    thread.start()
    return thread


@contextmanager
def _ignore_reraised_signals() -> Iterator[None]:
    """Ignores the signals that uvicorn raises again after shutdown: they have already been handled."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
