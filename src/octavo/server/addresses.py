"""Host names and addresses: loopback and wildcard checks, parsing of the Host header."""

from __future__ import annotations

from ipaddress import ip_address

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reachable from this machine only."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether `host` is the wildcard address (0.0.0.0 or ::)."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether `host` is an IP address, not a name."""
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The host of a Host header, without the port and without the brackets of an IPv6 address."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().removesuffix(".")
