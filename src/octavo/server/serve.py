"""`octavo serve`: checks what is asked, takes the address, loads the model and its adapters, and answers."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo.commands.loading import chosen_scheme, end_ids, load_model, opened
from octavo.config import Config, ModelOptions, ServeOptions
from octavo.errors import AdapterError, OctavoError, UsageError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits
from octavo.reporting import Report
from octavo.server.addresses import is_loopback
from octavo.server.requests import ADAPTER_NAME
from octavo.store.sources import fingerprint

KEY_VARIABLE = "OCTAVO_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]+")


def serve(config: Config, report: Report, *, listening: Callable[[dict[str, Any]], None]) -> None:
    """Serves until SIGTERM or SIGHUP, or until Ctrl-C, which is raised again once the last answers are given.

    `listening` gets the address and the names once requests can come.
    UsageError before anything is loaded if the options are wrong or the address is taken; AdapterError if an adapter
    does not fit the model: a server that lacks one of those it was told to serve does not start.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageError("Serving needs FastAPI and uvicorn.", hint="pip install 'octavo[serve]'")
    from octavo.server.app import create_app
    from octavo.server.process import bind, run

    options = config[ServeOptions]
    key = key_of(options)
    adapters = named_folders(options)
    if options.adapters_from is not None and not options.adapters_from.is_dir():
        raise UsageError(f"--adapters-from {options.adapters_from} is no folder.", hint="Make it, or name another.")
    held = bind(options.host, options.port)
    try:
        engine = open_engine(config, report, adapters=adapters)
        # Asked for only where others need them: without a network their look-up takes seconds.
        names = () if is_loopback(options.host) else (socket.gethostname(), socket.getfqdn())
        app = create_app(engine, options, key=key, names=names)
        url = _url(options.host, held.getsockname()[1])

        def ready() -> None:
            models = [engine.base, *engine.adapters()]
            asks = "asks for a key" if key else "asks for no key"
            report.say(f"Serving {', '.join(models)} on {url}: {asks}, {options.slots} slots.")
            try:
                listening({"url": url, "models": models})
            except (OctavoError, OSError, ValueError) as error:  # whoever reads has left: the clients have not
                report.warn(f"The address cannot be written to standard output: {error}")

        if pieces := engine.warmup_tasks():
            with report.progress(len(pieces), "Preparing the card") as bar:
                for piece in pieces:
                    piece()
                    bar.advance()
        engine.start()
        if run(app, held, options=options, listening=ready, stop_engine=engine.stop):
            raise KeyboardInterrupt  # as after Ctrl-C in any other command
    finally:
        held.close()


def key_of(options: ServeOptions) -> str | None:
    """The key that clients must send, or None. UsageError where one is needed or makes no sense."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if not options.auth:
        if key is not None:
            raise UsageError("--no-auth and a key contradict each other.", hint=f"Leave out one; see {KEY_VARIABLE}.")
        return None
    if key is None and not is_loopback(options.host):
        raise UsageError(
            f"Other machines can reach a server on {options.host}: it needs a key.",
            hint=f"Set {KEY_VARIABLE}, or say --no-auth to let everybody in.",
        )
    if key is not None and not _KEY.fullmatch(key):
        raise UsageError("The key must be of visible ASCII characters, without spaces.")
    return key


def named_folders(options: ServeOptions) -> dict[str, Path]:
    """NAME=FOLDER, taken apart. UsageError for a name that is odd or given twice."""
    folders: dict[str, Path] = {}
    for given in options.adapter:
        name, equals, folder = given.partition("=")
        if not equals or not folder or not re.fullmatch(ADAPTER_NAME, name):
            raise UsageError(
                f"--adapter {given!r} is not NAME=FOLDER.",
                hint="A name is of letters, digits and . _ : / -, as in --adapter hamlet=runs/demo/adapter.",
            )
        if name in folders:
            raise UsageError(f"There are two adapters of the name {name!r}.")
        folders[name] = Path(folder)
    return folders


def open_engine(config: Config, report: Report, *, adapters: dict[str, Path]) -> Engine:
    """The engine with its model and all adapters, not yet started."""
    asked, options = config[ModelOptions], config[ServeOptions]
    base = served_name(asked.model)
    if base in adapters:
        raise UsageError(f"{base!r} is the base's name: an adapter needs another.")
    hardware, source = opened(asked, report, own_adapters=not adapters and options.adapters_from is None)
    model = load_model(source, chosen_scheme(asked, source), hardware, report)
    engine = Engine(
        model, source.tokenizer(), base=base, base_sha256=fingerprint(source), stop_ids=end_ids(source),
        limits=Limits(
            slots=options.slots, max_len=options.max_model_len, queue=options.queue, deterministic=options.deterministic
        ),
    )  # fmt: skip
    for name, folder in adapters.items():
        try:
            served = engine.load_adapter(name, folder, allow_pickle=asked.allow_pickle)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error.message}", hint=error.hint) from error
        if served.trained_on not in (None, engine.base_sha256):
            report.warn(f"The adapter {name} was trained on other base weights than these.")
    return engine


def served_name(model: str) -> str:
    """What clients call the base: a folder's or file's last name, a hub id as it is."""
    return Path(model).resolve().name if Path(model).exists() else model


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
