"""The URL of a project's file on an index of PEP 503 (HTML) or PEP 691 (JSON), on a page of links, or in a folder."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from time import monotonic
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit
from urllib.request import url2pathname

from octavo.store.package_index.client import Client, FetchError, host_of, may_pass, reason_of, split

ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.01"
LARGEST_PAGE_BYTES = 2**24


@dataclass(frozen=True)
class Pinned:
    """A file that is known before it is fetched. `project` is the normalized name of PEP 503."""

    project: str
    filename: str
    size_bytes: int
    sha256: str


def address_on_index(index: str, wanted: Pinned, client: Client) -> str:
    """The URL of the file on an index; FetchError if the index does not list it or lists another file."""
    parts = split(index)
    page = parts._replace(path=f"{parts.path.rstrip('/')}/{wanted.project}/").geturl()
    if parts.scheme == "file":
        page = f"{page}index.html"
    return address_on_page(page, wanted, client)


def address_on_page(page: str, wanted: Pinned, client: Client) -> str:
    """The URL of the file on a page of links; FetchError without a link of its name and SHA-256."""
    base, kind, content = _read(page, client)
    links = _json_links(content, base) if "json" in kind else _html_links(content, base)
    for name, url, digest in links:
        if name == wanted.filename:
            if digest and digest != wanted.sha256:
                raise FetchError(f"{host_of(page)}: lists {wanted.filename} with another SHA-256 than the right one")
            split(url)
            return url
    raise FetchError(f"{host_of(page)}: does not list {wanted.filename}")


def in_folder(location: str, wanted: Pinned) -> Path | None:
    """The file in a folder, given as a path or a file:// URL; None if either does not exist."""
    parts = urlsplit(location)
    folder = Path(url2pathname(parts.path)) if parts.scheme == "file" else Path(location).expanduser()
    try:
        if folder.name == wanted.filename and folder.is_file():
            return folder
        return folder / wanted.filename if (folder / wanted.filename).is_file() else None
    except (OSError, ValueError):
        return None


def _read(page: str, client: Client) -> tuple[str, str, str]:
    """(URL after redirects, content type, text)."""
    parts = split(page)
    try:
        if parts.scheme == "file":
            content = Path(url2pathname(parts.path)).read_bytes()[: LARGEST_PAGE_BYTES + 1]
            base, kind = page, "text/html"
        else:
            with client.open(page, {"Accept": ACCEPT}) as response:
                content = _bounded(response, page, client.page_seconds)
                base, kind = response.url, response.headers.get_content_type()
    except (OSError, http.client.HTTPException) as error:
        raise FetchError(f"{host_of(page)}: {reason_of(error)}", again=may_pass(error)) from None
    if len(content) > LARGEST_PAGE_BYTES:
        raise FetchError(f"{host_of(page)}: its page is larger than {LARGEST_PAGE_BYTES >> 20} MiB")
    return base, kind, content.decode("utf-8", "replace")


def _bounded(response: Any, page: str, seconds: float) -> bytes:
    """A page's bytes; FetchError if they take longer than `seconds`."""
    content, end = b"", monotonic() + seconds
    while len(content) <= LARGEST_PAGE_BYTES and (block := response.read1(2**16)):
        content += block
        if monotonic() > end:
            raise FetchError(f"{host_of(page)}: its page did not come within {seconds:.0f} s")
    return content


def _json_links(content: str, base: str) -> list[tuple[str, str, str]]:
    """(file name, URL, SHA-256 or "") of every file of a PEP 691 page."""
    try:
        found: Any = json.loads(content)
        return [
            (str(file["filename"]), urljoin(base, str(file["url"])), str((file.get("hashes") or {}).get("sha256", "")))
            for file in found["files"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FetchError(f"{host_of(base)}: its page is not that of a package index") from None


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.base = ""
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get("href")
        if address and tag == "a":
            self.found.append(address)
        elif address and tag == "base" and not self.base:
            self.base = address


def _html_links(content: str, base: str) -> list[tuple[str, str, str]]:
    """The same of a PEP 503 page: the last path component of the URL is the name, its fragment has the hash."""
    parser = _Links()
    parser.feed(content)
    base = urljoin(base, parser.base)
    links = []
    for address in parser.found:
        try:
            url, fragment = urldefrag(urljoin(base, address))
            name = unquote(PurePosixPath(urlsplit(url).path).name)
        except ValueError:
            continue
        kind, _, digest = fragment.partition("=")
        links.append((name, url, digest.partition("&")[0] if kind == "sha256" else ""))
    return links
