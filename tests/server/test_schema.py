"""The OpenAPI schema is correct: valid requests get the documented responses, invalid ones are rejected.

schemathesis generates the requests and checks the responses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

OpenServer = Callable[..., Any]

OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /ready", "GET /metrics",
    "GET /", "GET /version", "GET /ping", "POST /detokenize",
    "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
    "POST /v1/completions", "POST /v1/chat/completions", "POST /prompt/", "POST /tokenize",
]  # fmt: skip


@pytest.fixture
def server(open_server: OpenServer, tmp_path: Path) -> Any:
    """A server whose limits allow every request that is valid by the schema."""
    return open_server(
        hosts=["*"],
        adapters_from=tmp_path,
        engine={"slots": 10_000, "context": 10_000},
        max_new_tokens=2**20,
        max_body_bytes=2**24,
    )


def test_the_schema_lists_every_route(server: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    routes = [f"{method.upper()} {path}" for path, methods in schema.raw_schema["paths"].items() for method in methods]
    assert sorted(routes) == sorted(OPERATIONS)


# Errors that a schema cannot express: the vocab size, the number of prompt tokens that `length` must exceed, and the
# folders of adapters.
BEYOND = ("The token id", "`length` is", "`lora_path` is not")
CASES = [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [
    (name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith("POST")
]


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: str(value).replace("GenerationMode.", ""))
def test_responses_match_the_schema(server: Any, name: str, mode: GenerationMode, examples: int) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    method, path = name.split()
    operation = schema[path][method]

    @seed(0)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call()
        beyond = response.status_code == 400 and any(words in response.text for words in BEYOND)
        case.validate_response(response, excluded_checks=[positive_data_acceptance] if beyond else [])

    check()


@pytest.mark.parametrize("key", [None, "secret"])
def test_integer_bounds_are_integers(open_server: OpenServer, key: str | None) -> None:
    """As floats, the bounds of a seed would be inexact by thousands."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    schema = open_server(key=key).client.get("/openapi.json", headers=headers).json()
    bounds: list[tuple[str, Any]] = []

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            bounds.extend(
                (name, part[name]) for name in part if part.get("type") == "integer" and "imum" in name.lower()
            )
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            collect(child)

    collect(schema)
    assert all(type(value) is int for _, value in bounds), bounds
    assert ("exclusiveMaximum", 2**63) in bounds
    assert ("minimum", -(2**63)) in bounds
