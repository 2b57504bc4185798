"""Names and addresses of hosts: which stand for this machine alone, and what a Host header names."""

from __future__ import annotations

from ipaddress import ip_address

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for all addresses of this machine."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether `host` is an address and no name."""
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def host_name(header: str) -> str:
    """The name of a Host header, without its port, an IPv6 address without its brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().removesuffix(".")
