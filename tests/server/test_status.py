"""Routes for models, token ids, health and metrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from octavo._version import __version__
from octavo.data.prompt import encode_conversation
from octavo.data.turns import Message
from octavo.infer.requests import Stats

OpenServer = Callable[..., Any]


def test_models_lists_the_base_and_its_adapters(server: Any) -> None:
    document = server.client.get("/v1/models").json()
    assert document["object"] == "list"
    assert [(model["id"], model["parent"], model["system_fingerprint"][0]) for model in document["data"]] == [
        ("tiny", None, "b"), ("king", "tiny", "c"), ("queen", "tiny", "d")
    ]  # fmt: skip
    assert all(model["object"] == "model" and model["max_model_len"] == 64 for model in document["data"])
    assert document["data"][1]["created"] == 1000
    assert [model["attached"] for model in document["data"]] == [None, {"q_proj": 2}, {"q_proj": 2}]
    assert server.client.get("/v1/models/king").json() == document["data"][1]
    assert server.client.get("/v1/models/hamlet").status_code == 404


def test_a_model_name_may_contain_slashes(open_server: OpenServer) -> None:
    server = open_server(engine={"base": "org/tiny"})
    assert server.client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_tokenize_returns_the_ids_that_a_completion_uses(server: Any) -> None:
    response = server.post("/tokenize", prompt="the <|im_end|>", model="queen")
    server.post("/v1/completions", prompt="the <|im_end|>")
    assert response["tokens"] == list(server.engine.submitted[0].prompt)
    assert (response["count"], response["max_model_len"]) == (len(response["tokens"]), 64)
    assert response["system_fingerprint"] == "d" * 64
    assert server.post("/tokenize", prompt="")["tokens"] == []


def test_tokenize_accepts_a_conversation(server: Any) -> None:
    response = server.post("/tokenize", messages=[{"role": "user", "content": "the king"}])
    assert response["tokens"] == encode_conversation([Message("user", "the king")], server.engine.tokenizer)


def test_tokenize_without_the_bos_token(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo.data import prompt
    from octavo.server import service

    for module in (prompt, service):
        monkeypatch.setattr(module, "bos_ids", lambda _: [1])
    assert server.post("/tokenize", prompt="the")["tokens"] == [1, *server.ids("the")]
    assert server.post("/tokenize", prompt="the", add_special_tokens=False)["tokens"] == server.ids("the")


def test_tokenize_rejects_other_bodies(server: Any) -> None:
    for body, param in (({"text": "the"}, "prompt"), ({"prompt": 5}, "prompt"), ({"messages": []}, "messages")):
        status, error = server.error("/tokenize", **body)
        assert (status, error["param"]) == (400, param)
        assert "Tokenize" not in error["message"], "the schema's names are not the client's"
    assert server.error("/tokenize", prompt="the", model="hamlet")[0] == 404


def test_during_shutdown_ready_is_503_and_health_is_200(server: Any) -> None:
    assert server.client.get("/ready").json() == server.client.get("/health").json() == {"status": "ok"}
    server.app.state.service.draining = True
    response = server.client.get("/ready")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert server.client.get("/health").status_code == 200
    status, error = server.error("/v1/completions", prompt="the")
    assert (status, error["code"]) == (503, "stopping")


def test_metrics_contain_all_engine_counts(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {field.name: 1000 + position for position, field in enumerate(fields(Stats))}
    monkeypatch.setattr(server.engine, "stats", lambda: Stats(**numbers), raising=False)
    text = server.client.get("/metrics").text
    assert [number for number in numbers.values() if f" {number}\n" not in text] == []


LINE = re.compile(r'[a-z_]+(\{[a-z0-9_]+="([^"\\]|\\.)*"(,[a-z0-9_]+="([^"\\]|\\.)*")*\})? -?[0-9.e+-]+')


def test_metrics_are_valid_prometheus_text(open_server: OpenServer) -> None:
    server = open_server(engine={"base": 'ti"ny\\\n'})
    server.post("/v1/completions", prompt="the")
    server.error("/v1/completions", prompt="")
    server.client.get("/somewhere/secret")
    response = server.client.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = response.text.splitlines()
    assert response.text.endswith("\n")
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(LINE.fullmatch(line) for line in lines if not line.startswith("#"))
    assert values["octavo_requests_total"] == "1"
    assert values["octavo_cache_tokens"] == "128"
    assert values['octavo_http_answers_total{route="/v1/completions",method="POST",status="200"}'] == "1"
    assert values['octavo_http_answers_total{route="/v1/completions",method="POST",status="400"}'] == "1"
    assert values['octavo_http_answers_total{route="none",method="GET",status="404"}'] == "1"
    assert values[f'octavo_model_info{{model="king",sha256="{"c" * 64}"}}'] == "1"
    assert 'octavo_model_info{model="ti\\"ny\\\\\\n",sha256' in response.text
    assert values["octavo_first_token_seconds_count"] == values["octavo_answer_seconds_count"] == "1"
    assert values['octavo_answer_seconds_bucket{le="+Inf"}'] == "1"
    for name in {line.split()[2] for line in lines if line.startswith("# HELP")}:
        kind = next(line.split()[3] for line in lines if line.startswith(f"# TYPE {name} "))
        assert name.endswith("_total") == (kind == "counter")
    buckets = [int(value) for name, value in values.items() if name.startswith("octavo_first_token_seconds_bucket")]
    assert buckets == sorted(buckets)


def test_detokenize_inverts_tokenize(server: Any) -> None:
    for text in ("the <|im_end|>", "", "n\u00e9e \U0001f600"):
        ids = server.post("/tokenize", prompt=text)["tokens"]
        assert server.post("/detokenize", tokens=ids) == {"prompt": text}
    for tokens in ([300], [-1], [5.5], ["the"], [2**40], "the", None):
        status, error = server.error("/detokenize", tokens=tokens)
        assert (status, error["param"]) == (400, "tokens")
    assert server.error("/detokenize", tokens=[5], model="hamlet")[0] == 404


def test_index_lists_version_models_and_routes(server: Any) -> None:
    index = server.client.get("/").json()
    assert index["models"] == ["tiny", "king", "queen"]
    assert {"POST /v1/completions", "GET /health", "GET /openapi.json"} <= set(index["routes"])
    for method, path in (route.split() for route in index["routes"]):
        assert server.client.request(method, path.replace("{model}", "tiny"), json={}).status_code in (200, 400)
    assert server.client.get("/version").json() == {"version": __version__} == {"version": index["version"]}
    assert server.client.get("/ping").json() == {"status": "ok"}


def test_the_error_for_an_unknown_route_names_the_index(server: Any) -> None:
    status, error = server.error("/v1/nothing")
    assert (status, error["message"]) == (404, "There is no route POST /v1/nothing. GET / lists the routes.")
    response = server.client.delete("/v1/models")
    assert response.status_code == 405
    assert "GET / lists" in response.json()["error"]["message"]
