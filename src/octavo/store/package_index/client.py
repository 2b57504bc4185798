"""HTTP(S) for a package index with the standard library: proxy, certificates, credentials sent only to their host.

URLs may contain credentials, also in the path. So messages never show a whole URL, only its host.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import ssl
import urllib.request
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import Request

from octavo._version import __version__
from octavo.errors import ModelError
from octavo.store.package_index.settings import Settings


class FetchError(Exception):
    """One failed attempt. The message names the host only. `again`: the same request may succeed later."""

    def __init__(self, message: str, *, again: bool = False) -> None:
        super().__init__(message)
        self.again = again


def split(url: str) -> SplitResult:
    """The parts of a URL; FetchError for a URL that is not supported."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for an invalid port
    except ValueError:
        raise FetchError("an address that is malformed") from None
    if parts.scheme not in ("http", "https", "file") or (parts.scheme != "file" and not parts.hostname):
        raise FetchError("an address that is neither http://, https:// nor file://")
    return parts


def host_of(url: str) -> str:
    """The name of a URL in messages: its host and port, or the path of a file."""
    try:
        parts = split(url)
    except FetchError as error:
        return str(error)
    return parts.path if parts.scheme == "file" else _host(parts)


def _host(parts: SplitResult) -> str:
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


class Client:
    """Opens URLs with the given settings. The credentials in a URL are sent only to its host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.page_seconds = 4 * settings.timeout_seconds  # time limit for a page of an index
        self._credentials: dict[tuple[str, str], tuple[str, str]] = {}  # scheme and host -> user, password

    def open(self, url: str, headers: Mapping[str, str]) -> Any:
        """The response to a GET, after redirects: read(n), headers, status, url. FetchError with the reason."""
        parts = split(url)
        if parts.username is not None:
            self._credentials[parts.scheme, _host(parts)] = unquote(parts.username), unquote(parts.password or "")
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=self._context(parts)), _Proxies(self._settings.proxy), _Redirects(self)
        )
        request = Request(bare, headers={"User-Agent": f"octavo/{__version__}", **headers})
        self.authorize(request)
        try:
            return opener.open(request, timeout=self._settings.timeout_seconds)
        except HTTPError as error:
            with error:
                raise _refused(error) from None
        except URLError as error:
            reason = error.reason
            raise FetchError(f"{_host(parts)}: {reason_of(reason)}", again=may_pass(reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise FetchError(f"{_host(parts)}: {reason_of(error)}", again=may_pass(error)) from None
        except ValueError:  # a URL that only the connection finds malformed; its message quotes the URL
            raise FetchError(f"{_host(parts)}: an address or a proxy that is malformed") from None

    def authorize(self, request: Request) -> None:
        """Adds the user and password for the request's host, if there are any for it."""
        parts = urlsplit(request.full_url)
        credentials = self._credentials.get((parts.scheme, _host(parts))) or _from_netrc(str(parts.hostname))
        if credentials:
            token = base64.b64encode(":".join(credentials).encode()).decode()
            request.add_unredirected_header("Authorization", f"Basic {token}")

    def _context(self, parts: SplitResult) -> ssl.SSLContext:
        context = ssl.create_default_context()
        settings = self._settings
        try:
            if settings.cert:
                folder = Path(settings.cert).is_dir()
                context.load_verify_locations(**{"capath" if folder else "cafile": settings.cert})
            else:
                _add_certifi(context)
            if settings.client_cert:
                context.load_cert_chain(settings.client_cert)
        except (OSError, ssl.SSLError) as error:
            raise ModelError(
                f"The certificates in pip's settings cannot be read ({reason_of(error)}).",
                hint="Correct pip's `cert` and `client-cert` settings (PIP_CERT, PIP_CLIENT_CERT).",
            ) from None
        if {str(parts.hostname), _host(parts)} & settings.trusted_hosts:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects. A password is not sent to another host, and https is not redirected to http."""

    max_redirections = 10

    def __init__(self, client: Client) -> None:
        self._client = client

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Request | None:
        try:
            parts = split(newurl)
        except FetchError as error:
            raise FetchError(f"{req.host}: redirects to {error}") from None
        if parts.scheme == "file" or (req.type == "https" and parts.scheme != "https"):
            raise FetchError(f"{req.host}: redirects to an address without TLS")
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        if redirected is not None:
            self._client.authorize(redirected)
        return redirected


class _Proxies(urllib.request.ProxyHandler):
    """pip's `proxy` setting, else the environment's. NO_PROXY applies to both."""

    def __init__(self, proxy: str | None) -> None:
        if proxy and "://" not in proxy:
            proxy = f"http://{proxy}"
        proxies = dict.fromkeys(("http", "https"), proxy) if proxy else urllib.request.getproxies()
        default = proxies.get("all")
        super().__init__({**(dict.fromkeys(("http", "https"), default) if default else {}), **proxies})

    def proxy_open(self, req: Request, proxy: str, type: str) -> Any:
        """Raises FetchError for a proxy scheme that the standard library does not support."""
        scheme = proxy.partition("://")[0].lower() if "://" in proxy else "http"
        if scheme != "http" and not urllib.request.proxy_bypass(req.host or ""):
            raise FetchError(f"{req.host}: a {scheme} proxy is set, and only http:// proxies are supported")
        return super().proxy_open(req, proxy, type)


def _from_netrc(host: str) -> tuple[str, str] | None:
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if path.is_file() and (entry := netrc.netrc(path).hosts.get(host)):
                return entry[0] or entry[1] or "", entry[2] or ""
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return None


def _add_certifi(context: ssl.SSLContext) -> None:
    """Adds certifi's certificates, which huggingface_hub's HTTP client installs: some Pythons find no system ones."""
    try:
        import certifi

        context.load_verify_locations(certifi.where())
    except (ImportError, OSError):
        pass


def _refused(error: HTTPError) -> FetchError:
    host = host_of(error.url or "")
    code = error.code
    phrase = HTTPStatus(code).phrase if code in HTTPStatus._value2member_map_ else ""
    hint = ": the index wants a user and a password" if code == HTTPStatus.UNAUTHORIZED else ""
    again = code in (408, 425, 429) or code >= 500
    return FetchError(f"{host}: HTTP {code} {phrase}".rstrip() + hint, again=again)


def reason_of(error: object) -> str:
    """The reason of a network error, without the URLs that some messages quote."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message})"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if str(error).startswith("Tunnel connection failed"):  # with the proxy's status, as 407 for a missing password
        return f"the proxy refuses ({str(error).partition(': ')[2]})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "the connection was cut"
    return type(error).__name__


def may_pass(error: object) -> bool:
    """Whether the same request may succeed later: after a broken connection, but not for an unknown host."""
    return isinstance(error, TimeoutError | ConnectionError | http.client.HTTPException) and not isinstance(
        error, ConnectionRefusedError
    )
