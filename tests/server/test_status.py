"""The names that are served, token ids, health and counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from octavo._version import __version__
from octavo.data.prompt import encode_conversation
from octavo.data.records import Message
from octavo.infer.requests import Stats

Open = Callable[..., Any]


def test_models_are_the_base_and_its_adapters(setting: Any) -> None:
    document = setting.client.get("/v1/models").json()
    assert document["object"] == "list"
    assert [(card["id"], card["parent"], card["system_fingerprint"][0]) for card in document["data"]] == [
        ("tiny", None, "b"), ("king", "tiny", "c"), ("queen", "tiny", "d")
    ]  # fmt: skip
    assert all(card["object"] == "model" and card["max_model_len"] == 64 for card in document["data"])
    assert document["data"][1]["created"] == 1000
    assert setting.client.get("/v1/models/king").json() == document["data"][1]
    assert setting.client.get("/v1/models/hamlet").status_code == 404


def test_a_name_may_hold_slashes(opened: Open) -> None:
    setting = opened(engine={"base": "org/tiny"})
    assert setting.client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_tokenize_gives_the_ids_that_a_completion_reads(setting: Any) -> None:
    answer = setting.ask("/tokenize", prompt="the <|im_end|>", model="queen")
    setting.ask("/v1/completions", prompt="the <|im_end|>")
    assert answer["tokens"] == list(setting.engine.seen[0].prompt)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 64)
    assert answer["system_fingerprint"] == "d" * 64
    assert setting.ask("/tokenize", prompt="")["tokens"] == []


def test_tokenize_takes_a_conversation(setting: Any) -> None:
    answer = setting.ask("/tokenize", messages=[{"role": "user", "content": "the king"}])
    assert answer["tokens"] == encode_conversation([Message("user", "the king")], setting.engine.tokenizer)


def test_tokenize_leaves_the_begin_token_out_if_asked(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.data import prompt
    from octavo.server import service

    for module in (prompt, service):
        monkeypatch.setattr(module, "begin_ids", lambda _: [1])
    assert setting.ask("/tokenize", prompt="the")["tokens"] == [1, *setting.ids("the")]
    assert setting.ask("/tokenize", prompt="the", add_special_tokens=False)["tokens"] == setting.ids("the")


def test_tokenize_refuses_what_is_neither(setting: Any) -> None:
    for body, param in (({"text": "the"}, "prompt"), ({"prompt": 5}, "prompt"), ({"messages": []}, "messages")):
        status, error = setting.refusal("/tokenize", **body)
        assert (status, error["param"]) == (400, param)
        assert "Tokenize" not in error["message"], "the schema's names are not the client's"
    assert setting.refusal("/tokenize", prompt="the", model="hamlet")[0] == 404


def test_ready_is_503_once_the_server_drains_and_health_is_not(setting: Any) -> None:
    assert setting.client.get("/ready").json() == setting.client.get("/health").json() == {"status": "ok"}
    setting.app.state.service.draining = True
    answer = setting.client.get("/ready")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert setting.client.get("/health").status_code == 200
    status, error = setting.refusal("/v1/completions", prompt="the")
    assert (status, error["code"]) == (503, "stopping")


def test_every_count_of_the_engine_is_told(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {field.name: 1000 + place for place, field in enumerate(fields(Stats))}
    monkeypatch.setattr(setting.engine, "stats", lambda: Stats(**numbers), raising=False)
    text = setting.client.get("/metrics").text
    assert [number for number in numbers.values() if f" {number}\n" not in text] == []


LINE = re.compile(r'[a-z_]+(\{[a-z0-9_]+="([^"\\]|\\.)*"(,[a-z0-9_]+="([^"\\]|\\.)*")*\})? -?[0-9.e+-]+')


def test_metrics_are_what_prometheus_reads_and_count(opened: Open) -> None:
    setting = opened(engine={"base": 'ti"ny\\\n'})
    setting.ask("/v1/completions", prompt="the")
    setting.refusal("/v1/completions", prompt="")
    setting.client.get("/somewhere/secret")
    answer = setting.client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = answer.text.splitlines()
    assert answer.text.endswith("\n")
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(LINE.fullmatch(line) for line in lines if not line.startswith("#"))
    assert values["octavo_requests_total"] == "1"
    assert values["octavo_cache_tokens"] == "128"
    assert values['octavo_http_answers_total{route="/v1/completions",method="POST",status="200"}'] == "1"
    assert values['octavo_http_answers_total{route="/v1/completions",method="POST",status="400"}'] == "1"
    assert values['octavo_http_answers_total{route="none",method="GET",status="404"}'] == "1"
    assert values[f'octavo_model_info{{model="king",sha256="{"c" * 64}"}}'] == "1"
    assert 'octavo_model_info{model="ti\\"ny\\\\\\n",sha256' in answer.text
    assert values["octavo_first_token_seconds_count"] == values["octavo_answer_seconds_count"] == "1"
    assert values['octavo_answer_seconds_bucket{le="+Inf"}'] == "1"
    for name in {line.split()[2] for line in lines if line.startswith("# HELP")}:
        kind = next(line.split()[3] for line in lines if line.startswith(f"# TYPE {name} "))
        assert name.endswith("_total") == (kind == "counter")
    buckets = [int(value) for name, value in values.items() if name.startswith("octavo_first_token_seconds_bucket")]
    assert buckets == sorted(buckets)


def test_detokenize_gives_back_what_tokenize_took(setting: Any) -> None:
    for text in ("the <|im_end|>", "", "n\u00e9e \U0001f600"):
        ids = setting.ask("/tokenize", prompt=text)["tokens"]
        assert setting.ask("/detokenize", tokens=ids) == {"prompt": text}
    for tokens in ([300], [-1], [5.5], ["the"], [2**40], "the", None):
        status, error = setting.refusal("/detokenize", tokens=tokens)
        assert (status, error["param"]) == (400, "tokens")
    assert setting.refusal("/detokenize", tokens=[5], model="hamlet")[0] == 404


def test_the_root_says_what_is_here_and_which_octavo(setting: Any) -> None:
    index = setting.client.get("/").json()
    assert index["models"] == ["tiny", "king", "queen"]
    assert {"POST /v1/completions", "GET /health", "GET /openapi.json"} <= set(index["routes"])
    for method, path in (route.split() for route in index["routes"]):
        assert setting.client.request(method, path.replace("{model}", "tiny"), json={}).status_code in (200, 400)
    assert setting.client.get("/version").json() == {"version": __version__} == {"version": index["version"]}
    assert setting.client.get("/ping").json() == {"status": "ok"}


def test_a_route_that_is_not_there_says_where_routes_are_listed(setting: Any) -> None:
    status, error = setting.refusal("/v1/nothing")
    assert (status, error["message"]) == (404, "There is no POST /v1/nothing here. GET /docs lists the routes.")
    answer = setting.client.delete("/v1/models")
    assert answer.status_code == 405
    assert "GET /docs" in answer.json()["error"]["message"]
