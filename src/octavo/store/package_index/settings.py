"""pip's settings for fetching a file: environment variables first, then pip's configuration files.

Source: pip's documentation, "Configuration" (files, their order, PIP_* names) and "HTTPS certificates".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from configparser import Error, RawConfigParser
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ModelError

DEFAULT_INDEX = "https://pypi.org/simple"
TIMEOUT_SECONDS = 30.0

# uv's own settings apply where pip has none; CERTIFICATES are the names that requests uses for a certificate file.
UV_INDEXES = ("UV_DEFAULT_INDEX", "UV_INDEX_URL")
CERTIFICATES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Settings:
    """Indexes and connection settings. URLs may contain credentials, so they are never shown."""

    indexes: tuple[str, ...] = (DEFAULT_INDEX,)
    find_links: tuple[str, ...] = ()
    proxy: str | None = None
    cert: str | None = None
    client_cert: str | None = None
    trusted_hosts: frozenset[str] = frozenset()
    timeout_seconds: float = TIMEOUT_SECONDS


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """pip's settings of this process. ModelError with the name of a configuration file that cannot be read."""
    values: dict[str, str] = {}
    for path in configuration_files(environ):
        values |= _read(path)
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            values[name[4:].lower().replace("_", "-")] = value
    no_index = values.get("no-index", "").lower() in ("1", "true", "yes", "on", "y", "t")
    first = values.get("index-url") or next((environ[name] for name in UV_INDEXES if environ.get(name)), DEFAULT_INDEX)
    indexes = [] if no_index else [first, *values.get("extra-index-url", "").split()]
    return Settings(
        indexes=tuple(dict.fromkeys(indexes)),
        find_links=tuple(values.get("find-links", "").split()),
        proxy=values.get("proxy"),
        cert=values.get("cert") or next((environ[name] for name in CERTIFICATES if environ.get(name)), None),
        client_cert=values.get("client-cert"),
        trusted_hosts=frozenset(values.get("trusted-host", "").split()),
        timeout_seconds=_seconds(values.get("timeout") or values.get("default-timeout")),
    )


def configuration_files(environ: Mapping[str, str]) -> Iterator[Path]:
    """pip's files from the weakest to the strongest: of the machine, the user, the environment, and PIP_CONFIG_FILE."""
    named = environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return
    home = Path(environ.get("HOME") or environ.get("USERPROFILE") or "~").expanduser()
    if os.name == "nt":
        file_name = "pip.ini"
        yield Path(environ.get("PROGRAMDATA", "C:\\ProgramData")) / "pip" / file_name
        yield home / "pip" / file_name
        yield Path(environ.get("APPDATA") or home / "AppData" / "Roaming") / "pip" / file_name
    else:
        file_name = "pip.conf"
        if sys.platform == "darwin":
            yield Path("/Library/Application Support/pip") / file_name
        for folder in reversed((environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(os.pathsep)):
            yield Path(folder) / "pip" / file_name
        yield Path("/etc") / file_name
        yield home / ".pip" / file_name
        macs = home / "Library" / "Application Support" / "pip"
        if sys.platform == "darwin" and macs.is_dir():
            yield macs / file_name
        else:
            yield Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / file_name
    yield Path(sys.prefix) / file_name
    if named:
        yield Path(named)


def _read(path: Path) -> dict[str, str]:
    """The settings of a file: [global], overridden by those of `pip download` and `pip install`."""
    parser = RawConfigParser()
    try:
        if not path.is_file():
            return {}
        parser.read_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Error) as error:
        # The parser's own message quotes the line, which may hold a password.
        raise ModelError(
            f"pip's configuration file {path} cannot be read ({type(error).__name__}).",
            hint="Correct it, or disable pip's files with PIP_CONFIG_FILE=" + os.devnull + ".",
        ) from None
    values: dict[str, str] = {}
    for section in ("global", "download", "install"):
        if parser.has_section(section):
            for key, value in parser.items(section):
                if value:
                    values[key.lower().replace("_", "-").removeprefix("--")] = value
    return values


def _seconds(text: str | None) -> float:
    try:
        value = float(text or TIMEOUT_SECONDS)
    except ValueError:
        return TIMEOUT_SECONDS
    return value if 0 < value < 3600 else TIMEOUT_SECONDS
