"""Downloads a pinned file: bounded in size, resumable, and accepted only with the right SHA-256."""

from __future__ import annotations

import hashlib
import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.request import url2pathname

from octavo.store.files import sha256_of
from octavo.store.package_index.client import Client, FetchError, host_of, reason_of, split
from octavo.store.package_index.settings import Settings
from octavo.store.package_index.simple import Pinned, address_on_index, address_on_page, in_folder
from octavo.system import fsync_file, rename_over

BLOCK_BYTES = 2**18
ATTEMPTS = 5  # attempts in a row without new bytes
PAGE_ATTEMPTS = 2
WAIT_SECONDS = 1.0

T = TypeVar("T")


def fetch(wanted: Pinned, target: Path, settings: Settings, *, progress: Callable[[int], object]) -> None:
    """Downloads the pinned file to `target`, from the first source that has it.

    `progress` gets the number of bytes on disk. After a failure the bytes stay in `target`.part, and the next call
    resumes from there. FetchError with the reason of each source; OSError for an error of the disk.
    """
    client = Client(settings)
    problems: list[str] = []
    for location in settings.find_links:
        if (path := in_folder(location, wanted)) is not None:
            try:
                _fetch_file(path.read_bytes, wanted, target)
                return
            except FetchError as error:
                problems.append(f"{path}: {error}")
    pages = [location for location in settings.find_links if location.startswith(("http://", "https://"))]
    finders = [(address_on_page, page) for page in pages] + [(address_on_index, index) for index in settings.indexes]
    for find, location in finders:
        try:
            _from(find, location, wanted, target, client, progress)
            return
        except FetchError as error:
            problems.append(str(error))
    raise FetchError("; ".join(dict.fromkeys(problems)) or "pip is set to use no index")


def _from(
    find: Callable[[str, Pinned, Client], str],
    location: str,
    wanted: Pinned,
    target: Path,
    client: Client,
    progress: Callable[[int], object],
) -> None:
    """Downloads the file from one index or page. A failed query of the index is repeated, as a failed download is."""
    url = _patiently(lambda: find(location, wanted, client), attempts=PAGE_ATTEMPTS)
    if split(url).scheme == "file":
        path = Path(url2pathname(split(url).path))
        _fetch_file(path.read_bytes, wanted, target)
        return
    part = target.with_name(f"{target.name}.part")
    for fresh in (False, True):
        if fresh:
            part.unlink(missing_ok=True)
        resumed = part.exists()
        _patiently(lambda: _continue(url, wanted, part, client, progress), attempts=ATTEMPTS, grown=lambda: _size(part))
        if sha256_of(part) == wanted.sha256:
            fsync_file(part)
            rename_over(part, target)
            return
        part.unlink()
        if not resumed:
            break  # the whole file came from this server: another attempt would bring the same bytes
    raise FetchError(f"{host_of(url)}: sent another file than the right one (its SHA-256 differs)")


def _continue(url: str, wanted: Pinned, part: Path, client: Client, progress: Callable[[int], object]) -> None:
    """Appends the missing bytes to `part`. FetchError if the connection ends before."""
    have = _size(part)
    if have > wanted.size_bytes:
        part.unlink()
        have = 0
    if have == wanted.size_bytes:
        return
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = client.open(url, headers)
    except FetchError as error:
        if have and "HTTP 416" in str(error):
            part.unlink()
            raise FetchError(f"{host_of(url)}: sent fewer than the {wanted.size_bytes:,} bytes of the file") from None
        raise
    with response:
        if have and not (response.status == 206 and _starts_at(response.headers.get("Content-Range"), have)):
            if response.status != 200:
                part.unlink()
                raise FetchError(f"{host_of(url)}: sent another part than the requested one", again=True)
            have = 0  # the server does not support ranges and sends the whole file
        _append(response, url, wanted, part, have, progress)


def _append(
    response: http.client.HTTPResponse, url: str, wanted: Pinned, part: Path, have: int,
    progress: Callable[[int], object],
) -> None:  # fmt: skip
    with part.open("ab" if have else "wb") as file:
        progress(have)
        while True:
            try:
                block = response.read1(BLOCK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise FetchError(f"{host_of(url)}: {reason_of(error)}", again=True) from None
            if not block:
                break
            have += len(block)
            if have > wanted.size_bytes:
                file.truncate(0)
                raise FetchError(f"{host_of(url)}: sent more than the {wanted.size_bytes:,} bytes of the file")
            file.write(block)
            progress(have)
    if have < wanted.size_bytes:
        raise FetchError(f"{host_of(url)}: the connection was cut", again=True)


def _starts_at(content_range: str | None, offset: int) -> bool:
    return bool(content_range) and str(content_range).replace("=", " ").split()[-1].startswith(f"{offset}-")


def _patiently(act: Callable[[], T], *, attempts: int, grown: Callable[[], int] = lambda: 0) -> T:
    """The result of `act`, repeated while an error may pass, until `attempts` in a row brought no new bytes."""
    failed, most = 0, grown()
    while True:
        try:
            return act()
        except FetchError as error:
            now = grown()
            failed, most = (0, now) if now > most else (failed + 1, most)
            if not error.again or failed >= attempts:
                raise
            time.sleep(WAIT_SECONDS * failed)


def _fetch_file(read: Callable[[], bytes], wanted: Pinned, target: Path) -> None:
    try:
        data = read()
    except OSError as error:
        raise FetchError(error.strerror or type(error).__name__) from None
    if hashlib.sha256(data).hexdigest() != wanted.sha256:
        raise FetchError("another file than the right one (its SHA-256 differs)")
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(data)
    fsync_file(part)
    rename_over(part, target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
