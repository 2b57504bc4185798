"""The OpenAPI schema is true: what it allows is answered as it says, what it does not allow is refused.

schemathesis makes the requests and judges the answers.
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

Open = Callable[..., Any]

OPERATIONS = [
    "GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /ready", "GET /metrics",
    "GET /", "GET /version", "GET /ping", "POST /detokenize",
    "POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter",
    "POST /v1/completions", "POST /v1/chat/completions", "POST /prompt/", "POST /tokenize",
]  # fmt: skip


@pytest.fixture
def setting(opened: Open, tmp_path: Path) -> Any:
    """Room enough that a request within the schema's bounds is a request within the server's."""
    return opened(
        hosts=["*"],
        adapters_from=tmp_path,
        engine={"slots": 10_000, "context": 10_000},
        max_new_tokens=2**20,
        max_body_bytes=2**24,
    )


def test_the_schema_lists_every_route(setting: Any) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", setting.app)
    listed = [f"{method.upper()} {path}" for path, methods in schema.raw_schema["paths"].items() for method in methods]
    assert sorted(listed) == sorted(OPERATIONS)


# What no schema can say: how many tokens the model has, how many a prompt becomes, which `length` must exceed, and
# where the adapters are.
BEYOND = ("There is no token", "`length` is", "`lora_path` is not")
CASES = [(name, GenerationMode.POSITIVE) for name in OPERATIONS] + [
    (name, GenerationMode.NEGATIVE) for name in OPERATIONS if name.startswith("POST")
]


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("name", "mode"), CASES, ids=lambda value: str(value).replace("GenerationMode.", ""))
def test_what_is_served_is_what_the_schema_says(setting: Any, name: str, mode: GenerationMode, examples: int) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", setting.app)
    method, path = name.split()
    operation = schema[path][method]

    @seed(0)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        answer = case.call()
        beyond = answer.status_code == 400 and any(words in answer.text for words in BEYOND)
        case.validate_response(answer, excluded_checks=[positive_data_acceptance] if beyond else [])

    check()


@pytest.mark.parametrize("key", [None, "secret"])
def test_bounds_of_whole_numbers_are_whole(opened: Open, key: str | None) -> None:
    """As floats, those of a seed are the same for thousands of numbers on both sides."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    schema = opened(key=key).client.get("/openapi.json", headers=headers).json()
    found: list[tuple[str, Any]] = []

    def look(part: Any) -> None:
        if isinstance(part, dict):
            found.extend(
                (name, part[name]) for name in part if part.get("type") == "integer" and "imum" in name.lower()
            )
        for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            look(each)

    look(schema)
    assert all(type(value) is int for _, value in found), found
    assert ("exclusiveMaximum", 2**63) in found
    assert ("minimum", -(2**63)) in found
