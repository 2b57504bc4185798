"""Routes that load and unload LoRA adapters at run time, compatible with vLLM. They need --adapters-from.

Unloading first stops new requests for the adapter, then removes it once its running requests have finished.

Adapters are loaded only from folders in --adapters-from. Responses reveal nothing about paths outside it, not even
whether they exist.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from octavo.adapters import attached_text
from octavo.errors import AdapterError
from octavo.infer.requests import ServedAdapter
from octavo.runs.adapter import NamedAdapter, adapter_folder, read_adapter
from octavo.runs.checkpoint_folder import candidates
from octavo.runs.folder import RunFolder
from octavo.server.errors import RETRY_SECONDS, ApiError, bad_request, one_line
from octavo.server.requests import LoadAdapter, UnloadAdapter
from octavo.server.responses import TEXT_ERROR_RESPONSES
from octavo.server.service import Service
from octavo.store import peft

T = TypeVar("T")
LOG = logging.getLogger("octavo.server")
POLL_SECONDS = 0.1  # interval between checks whether a draining adapter is still in use
# Exceptions other than AdapterError that the PEFT reader raises for files that are not an adapter.
BROKEN_FILE_ERRORS = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)


class AdapterDir:
    """The folder (--adapters-from) that contains all adapters that clients may load."""

    def __init__(self, folder: Path) -> None:
        self._names = (folder.absolute(), folder.resolve())  # clients may send either as a prefix
        self._root = folder.resolve()

    def find(self, requested: str) -> Path:
        """The folder of an adapter, of a run, or RUN@STEP, as `runs.adapter` has it.

        `requested` is absolute or relative to the root. 400 if outside, 404 if missing; AdapterError as there.
        """
        path = Path(requested)
        for name in self._names:
            if path.is_relative_to(name):
                path = path.relative_to(name)
        # A path outside the root is rejected before it is resolved: the result would reveal links outside the root.
        if path.is_absolute() or ".." in path.parts or not self._contains(self._root / path):
            raise _outside()
        named = NamedAdapter.read(self._root / path).folder
        if not self._contains(named):
            raise _outside()
        if not os.path.isdir(named):  # unlike Path.is_dir, returns False for a name that is too long
            raise ApiError(404, f"There is no folder {requested!r}.", code="adapter_not_found", param="lora_path")
        folder = adapter_folder(self._root / path, say=LOG.info, warn=LOG.warning)
        if not self._contains(folder):
            raise _outside()
        return folder.resolve()

    def _contains(self, path: Path) -> bool:
        """Whether a folder and all in it that is read are inside the root after resolving links."""
        try:
            folder, run = path.resolve(), RunFolder(path.resolve())
            parts = [folder, *(folder / name for name in (peft.CONFIG, peft.TENSORS, "octavo.json"))]
            parts += [run.about, run.adapter, run.checkpoints]
            inside = all(part.resolve().is_relative_to(self._root) for part in parts)
            return inside and folder != self._root and self._contains_all(candidates(run.checkpoints))
        except (OSError, RuntimeError, ValueError):  # name too long, circular links, null character
            return False

    def _contains_all(self, paths: Iterable[Path]) -> bool:
        return all(path.resolve().is_relative_to(self._root) for path in paths)

    def error_text(self, error: AdapterError) -> str:
        """The error message on one line, with paths relative to the root."""
        return one_line(error).replace(f"{self._root}{os.sep}", "")


def _outside() -> ApiError:
    return bad_request("`lora_path` is not inside the folder from which this server loads adapters.", param="lora_path")


class AdapterManager:
    """Loads and removes adapters. A lock serializes the operations: no check is outdated when it is acted on."""

    def __init__(self, service: Service, directory: AdapterDir) -> None:
        self._service, self._engine, self._directory = service, service.engine, directory
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str) -> PlainTextResponse:
        """Loads an adapter.

        400 if the name is in use or the adapter does not match the model, 404 if there is no such folder, 409 if
        --max-adapters are loaded.
        """
        return await self._in_thread(lambda: self._load(name, path))

    async def unload(self, name: str) -> PlainTextResponse:
        """Stops new requests for the adapter and removes it when its running requests have finished.

        404 if there is no such adapter. 409 if the running requests take longer than the grace time: the adapter then
        keeps draining, and the client must send the request again to remove it.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._service.options.grace_seconds
        served = await self._in_thread(lambda: self._drain(name))
        while True:
            try:
                return await self._in_thread(lambda: self._remove(served))
            except _AdapterInUseError as error:
                if loop.time() >= deadline:
                    raise error.response_error from error
            await asyncio.sleep(POLL_SECONDS)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread: it reads and hashes files and waits for an engine step, which block."""
        async with self._lock:
            self._service.check_open()
            return await asyncio.to_thread(work)

    def _load(self, name: str, path: str) -> PlainTextResponse:
        draining, most = self._engine.draining(), self._service.options.max_adapters
        loaded = {**draining, **self._engine.adapters()}
        if name in draining:
            raise _draining(f"The adapter `{name}` is being unloaded: load it again when it has been removed.")
        if name == self._engine.base or name in loaded:
            raise bad_request(f"The name `{name}` is already in use.", code="adapter_exists", param="lora_name")
        if len(loaded) >= most:
            message = f"{len(loaded)} adapters are loaded, and the limit is {most}. Unload one first."
            raise ApiError(409, message, code="adapters_full")
        try:
            folder, adapter = read_adapter(Path(path), find=lambda _: self._directory.find(path))
            served = self._engine.load_adapter(name, adapter)
        except AdapterError as error:
            raise bad_request(self._directory.error_text(error), code="adapter_refused", param="lora_path") from error
        except BROKEN_FILE_ERRORS as error:
            LOG.warning("the adapter in %s cannot be read", path, exc_info=error)
            message = "The adapter's files are corrupt."
            raise bad_request(message, code="adapter_refused", param="lora_path") from error
        LOG.info("loaded the adapter %s from %s (%s): %s", name, folder, served.sha256, attached_text(adapter))
        if served.trained_on in (None, self._engine.base_sha256):
            return _success(served, "added")
        LOG.warning("the adapter %s was trained on different base weights", name)
        return _success(served, "added", " It was trained on different base weights.")

    def _drain(self, name: str) -> ServedAdapter:
        try:
            return self._engine.drain_adapter(name)
        except AdapterError as error:
            message = f"There is no adapter `{name}`."
            raise ApiError(404, message, code="model_not_found", param="lora_name") from error

    def _remove(self, served: ServedAdapter) -> PlainTextResponse:
        if self._engine.draining().get(served.name) is not served:  # a concurrent unload request removed it
            return _success(served, "removed")
        try:
            self._engine.remove_adapter(served.name)
        except AdapterError as error:
            raise _AdapterInUseError(
                _draining(f"{error.message} It accepts no new requests. Send this request again to remove it.")
            ) from error
        LOG.info("unloaded the adapter %s (%s)", served.name, served.sha256)
        return _success(served, "removed")


class _AdapterInUseError(Exception):
    """A draining adapter still has running requests. `response_error` is the 409 to send after the grace time."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.response_error = error


def _draining(message: str) -> ApiError:
    return ApiError(409, message, code="adapter_in_use", param="lora_name", headers={"Retry-After": str(RETRY_SECONDS)})


def router(service: Service, folder: Path) -> APIRouter:
    """The routes that load and unload adapters in `folder`."""
    routes = APIRouter(tags=["adapters"], responses=TEXT_ERROR_RESPONSES, default_response_class=PlainTextResponse)
    manager = AdapterManager(service, AdapterDir(folder))

    @routes.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter) -> PlainTextResponse:
        """Loads a LoRA adapter and serves it as the model `lora_name`."""
        service.check_fields(body, "/v1/load_lora_adapter")
        return await manager.load(body.lora_name, body.lora_path)

    @routes.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapter) -> PlainTextResponse:
        """Unloads a LoRA adapter after its running requests have finished."""
        service.check_fields(body, "/v1/unload_lora_adapter")
        return await manager.unload(body.lora_name)

    return routes


def _success(served: ServedAdapter, action: str, note: str = "") -> PlainTextResponse:
    text = f"Success: LoRA adapter '{served.name}' {action} successfully.{note}"
    return PlainTextResponse(text, headers={"X-System-Fingerprint": served.sha256})
