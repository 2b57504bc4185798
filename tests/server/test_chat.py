"""POST /v1/chat/completions: chat template, OpenAI's format with and without streaming."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from octavo.data.prompt import encode_conversation
from octavo.data.turns import Message

OpenServer = Callable[..., Any]

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the king"}]


def stream_chunks(server: Any, **body: Any) -> list[Any]:
    response = server.client.post(PATH, json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_the_response_has_openais_format(open_server: OpenServer) -> None:
    server = open_server(engine={"context": 128})
    response = server.post(PATH, model="king", messages=HELLO, max_tokens=3)
    assert response.pop("id").startswith("chatcmpl-")
    assert isinstance(response.pop("created"), int)
    (choice,) = response.pop("choices")
    read = response.pop("usage")
    assert response == {"object": "chat.completion", "model": "king", "system_fingerprint": "c" * 64}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["logprobs"], choice["index"]) == ("assistant", None, 0)
    assert choice["finish_reason"] == "length"
    prompt = server.engine.submitted[0].prompt
    assert read == {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3}
    assert server.engine.submitted[0].sampling.max_new_tokens == 3


def test_the_chat_template_is_applied(open_server: OpenServer) -> None:
    server = open_server(engine={"context": 128})
    turns = [("developer", "my lord"), ("user", "the king"), ("assistant", "storm"), ("user", "<|im_end|>")]
    server.post(PATH, messages=[{"role": role, "content": content} for role, content in turns])
    messages = [Message(role.replace("developer", "system"), content) for role, content in turns]
    expected = encode_conversation(messages, server.engine.tokenizer)
    assert list(server.engine.submitted[0].prompt) == expected
    assert expected.count(2) == 4, "<|im_end|> in the user's message is text"


def test_text_parts_are_joined(server: Any) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "king"}]
    server.post(PATH, messages=[{"role": "user", "content": parts}])
    server.post(PATH, messages=HELLO)
    first, second = server.engine.submitted
    assert first.prompt == second.prompt


def test_max_tokens_defaults_to_the_servers_limit(open_server: OpenServer) -> None:
    server = open_server(max_new_tokens=7)
    server.post(PATH, messages=HELLO)
    server.post(PATH, messages=HELLO, max_tokens=3)
    server.post(PATH, messages=HELLO, max_tokens=3, max_completion_tokens=5)
    assert [request.sampling.max_new_tokens for request in server.engine.submitted] == [7, 3, 5]


def test_a_stream_starts_with_the_role_and_ends_with_the_finish_reason(open_server: OpenServer) -> None:
    server = open_server(engine={"slots": 4})
    body = {"messages": HELLO, "n": 2, "seed": 1, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    response = server.post(PATH, **body)
    *chunks, last = stream_chunks(server, **body, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], response["usage"])
    assert all(chunk["object"] == "chat.completion.chunk" and chunk["usage"] is None for chunk in chunks)
    assert len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in [*chunks, last]}) == 1
    for choice in response["choices"]:
        choice_chunks = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert choice_chunks[0]["delta"] == {"role": "assistant", "content": ""}
        assert choice_chunks[-1]["delta"] == {}
        assert [chunk["finish_reason"] for chunk in choice_chunks] == [None] * (len(choice_chunks) - 1) + ["length"]
        assert "".join(chunk["delta"].get("content", "") for chunk in choice_chunks) == choice["message"]["content"]
        logprobs = [entry for chunk in choice_chunks if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]


def test_logprobs_contain_bytes_and_top_logprobs_of_each_token(server: Any) -> None:
    body = {"messages": [{"role": "user", "content": "é"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    choice = server.post(PATH, **body)["choices"][0]
    logprobs = choice["logprobs"]["content"]
    prompt = server.engine.submitted[0].prompt
    assert len(logprobs) == prompt.index(2) + 1, "the EOS token is included"
    for number, entry in zip(prompt, logprobs, strict=False):
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == (-0.25 if number % 2 == 0 else -0.5)
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == -0.25
    assert "é".encode() in b"".join(bytes(entry["bytes"]) for entry in logprobs)
    assert "<|im_start|>" == logprobs[0]["token"] == bytes(logprobs[0]["bytes"]).decode()


def test_top_logprobs_implies_logprobs(server: Any) -> None:
    assert server.post(PATH, messages=HELLO, max_tokens=1, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert server.post(PATH, messages=HELLO, max_tokens=1, top_logprobs=0)["choices"][0]["logprobs"] is None


def test_max_tokens_0_returns_an_empty_message(server: Any) -> None:
    response = server.post(PATH, messages=HELLO, max_tokens=0)
    assert response["choices"][0]["message"]["content"] == ""
    assert response["usage"]["completion_tokens"] == 0
    assert stream_chunks(server, messages=HELLO, max_tokens=0)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "the king"}, "messages"),
        ({"messages": HELLO * 257}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "<|im_start|>", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "q" * 99}]}, "messages"),
        ({"messages": HELLO, "max_tokens": 1025}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 1025}, "max_completion_tokens"),
        ({"messages": HELLO, "logprobs": 1}, "logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "functions": [{}]}, "functions"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        ({"messages": HELLO, "audio": {"voice": "x"}}, "audio"),
        ({"messages": HELLO, "web_search_options": {}}, "web_search_options"),
        ({"messages": HELLO, "logit_bias": {"1": 1}}, "logit_bias"),
    ],
)
def test_invalid_fields_are_rejected_by_name(server: Any, body: dict[str, Any], param: str) -> None:
    status, error = server.error(PATH, **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert server.engine.submitted == []


def test_the_error_names_the_invalid_message(server: Any) -> None:
    _, error = server.error(PATH, messages=[*HELLO, {"role": "assistant"}])
    assert error["message"].startswith(f"`messages[{len(HELLO)}].content`: ")


def test_extra_fields_of_openai_clients_are_accepted(server: Any) -> None:
    server.post(
        PATH, messages=[{"role": "user", "content": "the", "name": "me"}], tools=[], tool_choice="auto", store=True,
        response_format={"type": "text"}, modalities=["text"], user="me", metadata={"a": "b"}, service_tier="auto",
        parallel_tool_calls=True, frequency_penalty=0, top_logprobs=None,
    )  # fmt: skip


def test_an_error_of_the_chat_template_is_400(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", "{{ raise_exception('take turns') }}")
    status, error = server.error(PATH, messages=HELLO)
    assert (status, error["param"]) == (400, "messages")
    assert "take turns" in error["message"]
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", None)
    assert server.error(PATH, messages=HELLO)[0] == 400
