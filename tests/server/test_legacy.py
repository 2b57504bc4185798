"""The legacy route POST /prompt/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

OpenServer = Callable[..., Any]


@pytest.mark.parametrize("path", ["/prompt/", "/prompt"])
@pytest.mark.parametrize(("length", "temperature"), [("5", "0.5"), (5, 0.5), (" 5\n", ".5")])
def test_the_output_includes_the_prompt_and_length_counts_it(
    server: Any, path: str, length: object, temperature: object
) -> None:
    response = server.client.post(path, json={"input": "the king", "length": length, "temperature": temperature})
    assert response.json() == {"output": "the kingthe kingthe"}
    (request,) = server.engine.submitted
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (3, 0.5)
    assert request.sampling.top_p == 1


def test_the_first_adapter_is_used_and_the_header_has_its_hash(server: Any) -> None:
    response = server.client.post("/prompt/", json={"input": "the king"})
    assert server.engine.submitted[0].adapter == "king"
    assert response.headers["X-System-Fingerprint"] == "c" * 64


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"length": "5"}, "input"),
        ({"input": ""}, "input"),
        ({"input": 5}, "input"),
        ({"input": "q" * 99}, "input"),
        ({"input": "the king", "length": "2"}, "length"),
        ({"input": "the king", "length": "many"}, "length"),
        ({"input": "the king", "length": "-5"}, "length"),
        ({"input": "the king", "length": "12345678"}, "length"),
        ({"input": "the king", "length": 5000}, "length"),
        ({"input": "the king", "temperature": "hot"}, "temperature"),
        ({"input": "the king", "temperature": "2.1"}, "temperature"),
        ({"input": "the king", "temperature": "nan"}, "temperature"),
        ({"input": "the king", "temperature": -1}, "temperature"),
    ],
)
def test_invalid_fields_are_rejected_by_name(server: Any, body: dict[str, Any], param: str) -> None:
    status, error = server.error("/prompt/", **body)
    assert (status, error["param"]) == (400, param)
    assert server.engine.submitted == []


def test_an_allowed_origin_may_send_requests(open_server: OpenServer) -> None:
    server = open_server(origins=["*"])
    response = server.client.post("/prompt/", json={"input": "the"}, headers={"Origin": "https://page.example"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
