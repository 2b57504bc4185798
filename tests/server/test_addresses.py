"""Loopback checks and parsing of the Host header."""

from __future__ import annotations

import pytest

from octavo.server.addresses import host_name, is_loopback


def test_host_name_removes_port_and_brackets() -> None:
    assert [host_name(text) for text in ("A.b:80", "[::1]:80", "::1", "a.")] == ["a.b", "::1", "", "a"]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.5", False), ("", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
