"""`octavo serve`: checks the options, binds the address, loads the model and its adapters, and serves them."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from octavo.adapters import attached_text
from octavo.commands.loading import chosen_scheme, end_ids, load_model, opened
from octavo.config import Config, ModelOptions, ServeOptions
from octavo.errors import AdapterError, OctavoError, UsageError
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits
from octavo.reporting import Report
from octavo.runs.adapter import adapter_folder, read_adapter
from octavo.server.addresses import is_loopback
from octavo.server.requests import ADAPTER_NAME
from octavo.store.sources import fingerprint

KEY_VARIABLE = "OCTAVO_API_KEY"
_KEY = re.compile(r"[\x21-\x7e]+")


def serve(config: Config, report: Report, *, listening: Callable[[dict[str, Any]], None]) -> None:
    """Serves until SIGTERM, SIGHUP or Ctrl-C. Raises KeyboardInterrupt after a graceful shutdown by Ctrl-C.

    `listening` gets the URL and the model names when the server accepts requests. Raises UsageError before anything is
    loaded if the options are invalid or the address is in use, AdapterError if an adapter does not match the model: the
    server does not start without one of its adapters.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageError("Serving needs FastAPI and uvicorn.", hint="pip install 'octavo[serve]'")
    from octavo.server.app import create_app
    from octavo.server.process import bind, run

    options = config[ServeOptions]
    key = api_key(options)
    adapters = adapter_folders(options)
    if options.adapters_from is not None and not options.adapters_from.is_dir():
        message = f"--adapters-from {options.adapters_from} is not a folder."
        raise UsageError(message, hint="Create it, or choose another folder.")
    bound_socket = bind(options.host, options.port)
    try:
        engine = open_engine(config, report, adapters=adapters)
        # Only needed if other machines can connect. Without a network the look-up takes seconds.
        names = () if is_loopback(options.host) else (socket.gethostname(), socket.getfqdn())
        app = create_app(engine, options, key=key, names=names)
        url = _url(options.host, bound_socket.getsockname()[1])

        def ready() -> None:
            models = [engine.base, *engine.adapters()]
            auth = "API key required" if key else "no API key"
            report.say(f"Serving {', '.join(models)} on {url}: {auth}, {options.slots} slots.")
            try:
                listening({"url": url, "models": models})
            except (OctavoError, OSError, ValueError) as error:  # serve anyway: clients can connect
                report.warn(f"The URL cannot be written to standard output: {error}")

        if tasks := engine.warmup_tasks():
            with report.progress(len(tasks), "Warming up the GPU") as bar:
                for task in tasks:
                    task()
                    bar.advance()
        engine.start()
        if run(app, bound_socket, options=options, listening=ready, stop_engine=engine.stop):
            raise KeyboardInterrupt  # as after Ctrl-C in any other command
    finally:
        bound_socket.close()


def api_key(options: ServeOptions) -> str | None:
    """The API key that clients must send, or None. UsageError if a key is missing, invalid or contradicts --no-auth."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if not options.auth:
        if key is not None:
            hint = f"Remove --no-auth, or remove --api-key and unset {KEY_VARIABLE}."
            raise UsageError("--no-auth cannot be combined with an API key.", hint=hint)
        return None
    if key is None and not is_loopback(options.host):
        raise UsageError(
            f"Other machines can connect to {options.host}, so an API key is required.",
            hint=f"Set {KEY_VARIABLE}, or pass --no-auth to allow everyone.",
        )
    if key is not None and not _KEY.fullmatch(key):
        raise UsageError("The API key may contain only visible ASCII characters, without spaces.")
    return key


def adapter_folders(options: ServeOptions) -> dict[str, Path]:
    """Parses --adapter NAME=FOLDER. UsageError for an invalid or repeated name."""
    folders: dict[str, Path] = {}
    for argument in options.adapter:
        name, equals, folder = argument.partition("=")
        if not equals or not folder or not re.fullmatch(ADAPTER_NAME, name):
            raise UsageError(
                f"--adapter {argument!r} is not NAME=FOLDER.",
                hint="A name has letters, digits and . _ : / -, for example --adapter hamlet=runs/demo/adapter.",
            )
        if name in folders:
            raise UsageError(f"There are two adapters named {name!r}.", hint="Choose different names in --adapter.")
        folders[name] = Path(folder)
    return folders


def open_engine(config: Config, report: Report, *, adapters: dict[str, Path]) -> Engine:
    """The engine with the model and all adapters loaded, not yet started."""
    model_options, options = config[ModelOptions], config[ServeOptions]
    base = served_name(model_options.model)
    if base in adapters:
        raise UsageError(f"{base!r} is the name of the base model.", hint="Choose another name in --adapter.")
    hardware, source = opened(model_options, report, own_adapters=not adapters and options.adapters_from is None)
    model = load_model(source, chosen_scheme(model_options, source), hardware, report)
    engine = Engine(
        model, source.tokenizer(), base=base, base_sha256=fingerprint(source), stop_ids=end_ids(source),
        limits=Limits(
            slots=options.slots, max_len=options.max_model_len, queue=options.queue, deterministic=options.deterministic
        ),
    )  # fmt: skip
    if "max_new_tokens" in options.model_fields_set and options.max_new_tokens >= engine.context:
        report.warn(
            f"--max-new-tokens {options.max_new_tokens:,} is never reached: prompt and answer have at most "
            f"{engine.context:,} tokens together (the model's context or --max-model-len)."
        )
    find = partial(adapter_folder, say=report.say, warn=report.warn)
    for name, folder in adapters.items():
        try:
            _, adapter = read_adapter(folder, find=find, allow_pickle=model_options.allow_pickle)
            served = engine.load_adapter(name, adapter)
        except AdapterError as error:
            raise AdapterError(f"{name}: {error.message}", hint=error.hint) from error
        report.say(f"{name}: {attached_text(adapter)}")
        if served.trained_on not in (None, engine.base_sha256):
            report.warn(f"The adapter {name} was trained on different base weights.")
    return engine


def served_name(model: str) -> str:
    """The model name of the base: the last part of a folder or file path, or the hub id."""
    return Path(model).resolve().name if Path(model).exists() else model


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
