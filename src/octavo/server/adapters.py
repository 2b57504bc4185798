"""Adapters that come and go while the server runs, on the routes that vLLM's clients know; with --adapters-from alone.

One that is unloaded takes no more requests at once, and goes when the last of those that it has is answered.

What is loaded lies below that folder. Of all else a client learns nothing, not even whether it is there.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from octavo.errors import AdapterError
from octavo.infer.requests import ServedAdapter
from octavo.server.errors import RETRY_SECONDS, ApiError, told, wrong
from octavo.server.requests import LoadAdapter, UnloadAdapter
from octavo.server.responses import TEXT_REFUSALS
from octavo.server.service import Service
from octavo.store import peft

T = TypeVar("T")
LOG = logging.getLogger("octavo.server")
POLL_SECONDS = 0.1  # until it is looked again whether a draining adapter is still in use
# What files that are no adapter's make their reader raise, besides the error that it is made to raise.
BROKEN = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)


class AdapterDir:
    """The folder below which adapters may be loaded."""

    def __init__(self, folder: Path) -> None:
        self._names = (folder.absolute(), folder.resolve())  # a client may know it by either
        self._root = folder.resolve()

    def find(self, asked: str) -> Path:
        """An adapter's folder, asked for from the shelf on or by its whole path. 400 if outside, 404 if not there."""
        path = Path(asked)
        for name in self._names:
            if path.is_relative_to(name):
                path = path.relative_to(name)
        # Such a path is not followed: where it ends would tell which links there are outside.
        if path.is_absolute() or ".." in path.parts or not self._holds(path):
            raise wrong(
                "`lora_path` is not a folder below the one that this server loads adapters from.", param="lora_path"
            )
        folder = (self._root / path).resolve()
        if not os.path.isdir(folder):  # which takes names that are too long for those of no folder
            raise ApiError(404, f"There is no folder {asked!r}.", code="adapter_not_found", param="lora_path")
        return folder

    def _holds(self, path: Path) -> bool:
        """Whether the folder and what is read of it are below the shelf once links are followed."""
        try:
            folder = (self._root / path).resolve()
            files = [(folder / name).resolve() for name in (peft.CONFIG, peft.TENSORS, "octavo.json")]
        except (OSError, RuntimeError, ValueError):  # a name too long, links in a circle, a null character
            return False
        return folder != self._root and all(file.is_relative_to(self._root) for file in (folder, *files))

    def told(self, error: AdapterError) -> str:
        """An error as one line, its paths from the shelf on."""
        return told(error).replace(f"{self._root}{os.sep}", "")


class AdapterManager:
    """Loads adapters from a shelf and removes them: one after the other, so that what was checked still holds."""

    def __init__(self, service: Service, shelf: AdapterDir) -> None:
        self._service, self._engine, self._shelf = service, service.engine, shelf
        self._turn = asyncio.Lock()

    async def load(self, name: str, asked: str) -> PlainTextResponse:
        """Serves an adapter. 400 if its name is taken or it does not fit, 404 without a folder, 409 if too many."""
        return await self._in_thread(lambda: self._load(name, asked))

    async def unload(self, name: str) -> PlainTextResponse:
        """Serves it no more: no new requests, and gone once those at work are answered. 404 if there is none.

        409 if that takes longer than the grace time. It goes on draining then, and is to be unloaded once more.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._service.options.grace_seconds
        served = await self._in_thread(lambda: self._drain(name))
        while True:
            try:
                return await self._in_thread(lambda: self._remove(served))
            except _InUseError as error:
                if loop.time() >= deadline:
                    raise error.refusal from error
            await asyncio.sleep(POLL_SECONDS)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """Files are read and hashed, and a step of the engine is waited for: nothing for the event loop."""
        async with self._turn:
            self._service.check_open()
            return await asyncio.to_thread(work)

    def _load(self, name: str, asked: str) -> PlainTextResponse:
        draining, most = self._engine.draining(), self._service.options.max_adapters
        held = {**draining, **self._engine.adapters()}
        if name in draining:
            raise _draining(f"The adapter `{name}` is being unloaded: load it again once it is gone.")
        if name == self._engine.base or name in held:
            raise wrong(f"The name `{name}` is taken.", code="adapter_exists", param="lora_name")
        if len(held) >= most:
            raise ApiError(409, f"{len(held)} adapters are held; {most} may be. Unload one.", code="adapters_full")
        folder = self._shelf.find(asked)
        try:
            served = self._engine.load_adapter(name, folder)
        except AdapterError as error:
            raise wrong(self._shelf.told(error), code="adapter_refused", param="lora_path") from error
        except BROKEN as error:
            LOG.warning("the adapter in %s cannot be read", folder, exc_info=error)
            raise wrong("The adapter's files are broken.", code="adapter_refused", param="lora_path") from error
        LOG.info("loaded the adapter %s from %s (%s)", name, folder, served.sha256)
        if served.trained_on in (None, self._engine.base_sha256):
            return _success(served, "added")
        LOG.warning("the adapter %s was trained on other base weights than these", name)
        return _success(served, "added", " It was trained on other base weights than these.")

    def _drain(self, name: str) -> ServedAdapter:
        try:
            return self._engine.drain_adapter(name)
        except AdapterError as error:
            message = f"There is no adapter `{name}`."
            raise ApiError(404, message, code="model_not_found", param="lora_name") from error

    def _remove(self, served: ServedAdapter) -> PlainTextResponse:
        if self._engine.draining().get(served.name) is not served:  # another request to unload it was faster
            return _success(served, "removed")
        try:
            self._engine.remove_adapter(served.name)
        except AdapterError as error:
            raise _InUseError(
                _draining(f"{error.message} It takes no more and is unloaded once they are done: ask once more.")
            ) from error
        LOG.info("unloaded the adapter %s (%s)", served.name, served.sha256)
        return _success(served, "removed")


class _InUseError(Exception):
    """A draining adapter still has requests at work."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _draining(message: str) -> ApiError:
    return ApiError(409, message, code="adapter_in_use", param="lora_name", headers={"Retry-After": str(RETRY_SECONDS)})


def router(service: Service, folder: Path) -> APIRouter:
    """The routes, over the adapters below `folder`."""
    routes = APIRouter(tags=["adapters"], responses=TEXT_REFUSALS, default_response_class=PlainTextResponse)
    exchange = AdapterManager(service, AdapterDir(folder))

    @routes.post("/v1/load_lora_adapter")
    async def load(asked: LoadAdapter) -> PlainTextResponse:
        """Serves an adapter under a new name from the engine's next step on."""
        service.check_fields(asked, "/v1/load_lora_adapter")
        return await exchange.load(asked.lora_name, asked.lora_path)

    @routes.post("/v1/unload_lora_adapter")
    async def unload(asked: UnloadAdapter) -> PlainTextResponse:
        """Serves it no more."""
        service.check_fields(asked, "/v1/unload_lora_adapter")
        return await exchange.unload(asked.lora_name)

    return routes


def _success(served: ServedAdapter, what: str, more: str = "") -> PlainTextResponse:
    text = f"Success: LoRA adapter '{served.name}' {what} successfully.{more}"
    return PlainTextResponse(text, headers={"X-System-Fingerprint": served.sha256})
