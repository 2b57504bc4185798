"""POST /prompt/: the article's service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Open = Callable[..., Any]


@pytest.mark.parametrize("path", ["/prompt/", "/prompt"])
@pytest.mark.parametrize(("length", "temperature"), [("5", "0.5"), (5, 0.5), (" 5\n", ".5")])
def test_the_answer_is_the_whole_text_and_length_counts_the_prompt(
    setting: Any, path: str, length: object, temperature: object
) -> None:
    answer = setting.client.post(path, json={"input": "the king", "length": length, "temperature": temperature})
    assert answer.json() == {"output": "the kingthe kingthe"}
    (request,) = setting.engine.seen
    assert (request.sampling.max_new_tokens, request.sampling.temperature) == (3, 0.5)
    assert request.sampling.top_p == 1


def test_the_first_adapter_answers_and_the_header_has_its_hash(setting: Any) -> None:
    answer = setting.client.post("/prompt/", json={"input": "the king"})
    assert setting.engine.seen[0].adapter == "king"
    assert answer.headers["X-System-Fingerprint"] == "c" * 64


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
def test_what_cannot_be_answered_is_refused_by_name(setting: Any, body: dict[str, Any], param: str) -> None:
    status, error = setting.refusal("/prompt/", **body)
    assert (status, error["param"]) == (400, param)
    assert setting.engine.seen == []


def test_a_page_of_a_named_origin_may_ask(opened: Open) -> None:
    setting = opened(origins=["*"])
    answer = setting.client.post("/prompt/", json={"input": "the"}, headers={"Origin": "https://page.example"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
