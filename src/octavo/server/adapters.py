"""Adapters that come and go while the server runs, on the routes that vLLM's clients know; with --adapters-from alone.

What is loaded lies below that folder. Of all else a client learns nothing, not even whether it is there.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse

from octavo.errors import AdapterError
from octavo.infer.requests import ServedAdapter
from octavo.server.answers import TEXT_REFUSALS
from octavo.server.refusals import RefusedError, told, wrong
from octavo.server.schemas import LoadAdapter, UnloadAdapter
from octavo.server.service import Service
from octavo.store import peft

LOG = logging.getLogger("octavo.server")
# What files that are no adapter's make their reader raise, besides the error that it is made to raise.
BROKEN = (AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, re.error)


class Shelf:
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
            raise RefusedError(404, f"There is no folder {asked!r}.", code="adapter_not_found", param="lora_path")
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


class Exchange:
    """Loads adapters from a shelf and removes them: one after the other, so that what was checked still holds."""

    def __init__(self, service: Service, shelf: Shelf) -> None:
        self._service, self._engine, self._shelf = service, service.engine, shelf
        self._turn = asyncio.Lock()

    async def load(self, name: str, asked: str) -> PlainTextResponse:
        """Serves an adapter. 400 if its name is taken or it does not fit, 404 without a folder, 409 if too many."""
        return await self._in_thread(lambda: self._load(name, asked))

    async def unload(self, name: str) -> PlainTextResponse:
        """Serves it no more. 404 if there is none, 409 while requests use it."""
        return await self._in_thread(lambda: self._unload(name))

    async def _in_thread(self, work: Callable[[], PlainTextResponse]) -> PlainTextResponse:
        """Files are read and hashed, and a step of the engine is waited for: nothing for the event loop."""
        async with self._turn:
            self._service.check_open()
            return await asyncio.to_thread(work)

    def _load(self, name: str, asked: str) -> PlainTextResponse:
        held, most = self._engine.adapters(), self._service.options.max_adapters
        if name == self._engine.base or name in held:
            raise wrong(f"The name `{name}` is taken.", code="adapter_exists", param="lora_name")
        if len(held) >= most:
            raise RefusedError(409, f"{len(held)} adapters are held; {most} may be. Unload one.", code="adapters_full")
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

    def _unload(self, name: str) -> PlainTextResponse:
        served = self._engine.adapters().get(name)
        if served is None:
            raise RefusedError(404, f"There is no adapter `{name}`.", code="model_not_found", param="lora_name")
        try:
            self._engine.remove_adapter(name)
        except AdapterError as error:
            raise RefusedError(409, told(error), code="adapter_in_use", param="lora_name") from error
        LOG.info("unloaded the adapter %s (%s)", name, served.sha256)
        return _success(served, "removed")


def router(service: Service, folder: Path) -> APIRouter:
    """The routes, over the adapters below `folder`."""
    routes = APIRouter(tags=["adapters"], responses=TEXT_REFUSALS, default_response_class=PlainTextResponse)
    exchange = Exchange(service, Shelf(folder))

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
