"""POST /v1/chat/completions: the model's own template, OpenAI's shapes whole and in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from octavo.data.prompt import encode_conversation
from octavo.data.records import Message

Open = Callable[..., Any]

PATH = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "the king"}]


def pieces_of(setting: Any, **asked: Any) -> list[Any]:
    answer = setting.client.post(PATH, json={**asked, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, done, end = answer.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_an_answer_has_the_shape_of_openais(opened: Open) -> None:
    setting = opened(engine={"context": 128})
    answer = setting.ask(PATH, model="king", messages=HELLO, max_tokens=3)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    (choice,) = answer.pop("choices")
    read = answer.pop("usage")
    assert answer == {"object": "chat.completion", "model": "king", "system_fingerprint": "c" * 64}
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert (choice["message"]["role"], choice["logprobs"], choice["index"]) == ("assistant", None, 0)
    assert choice["finish_reason"] == "length"
    prompt = setting.engine.seen[0].prompt
    assert read == {"prompt_tokens": len(prompt), "completion_tokens": 3, "total_tokens": len(prompt) + 3}
    assert setting.engine.seen[0].sampling.max_new_tokens == 3


def test_the_conversation_goes_through_the_models_template(opened: Open) -> None:
    setting = opened(engine={"context": 128})
    turns = [("developer", "my lord"), ("user", "the king"), ("assistant", "storm"), ("user", "<|im_end|>")]
    setting.ask(PATH, messages=[{"role": role, "content": content} for role, content in turns])
    messages = [Message(role.replace("developer", "system"), content) for role, content in turns]
    expected = encode_conversation(messages, setting.engine.tokenizer)
    assert list(setting.engine.seen[0].prompt) == expected
    assert expected.count(2) == 4, "the user's own <|im_end|> is text"


def test_parts_of_text_are_joined(setting: Any) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "king"}]
    setting.ask(PATH, messages=[{"role": "user", "content": parts}])
    setting.ask(PATH, messages=HELLO)
    first, second = setting.engine.seen
    assert first.prompt == second.prompt


def test_without_a_limit_an_answer_may_take_what_the_server_gives(opened: Open) -> None:
    setting = opened(max_new_tokens=7)
    setting.ask(PATH, messages=HELLO)
    setting.ask(PATH, messages=HELLO, max_tokens=3)
    setting.ask(PATH, messages=HELLO, max_tokens=3, max_completion_tokens=5)
    assert [request.sampling.max_new_tokens for request in setting.engine.seen] == [7, 3, 5]


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(opened: Open) -> None:
    setting = opened(engine={"slots": 4})
    asked = {"messages": HELLO, "n": 2, "seed": 1, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = setting.ask(PATH, **asked)
    *pieces, last = pieces_of(setting, **asked, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(piece["object"] == "chat.completion.chunk" and piece["usage"] is None for piece in pieces)
    assert len({(piece["id"], piece["created"], piece["system_fingerprint"]) for piece in [*pieces, last]}) == 1
    for choice in whole["choices"]:
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[-1]["delta"] == {}
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + ["length"]
        assert "".join(piece["delta"].get("content", "") for piece in own) == choice["message"]["content"]
        told = [entry for piece in own if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_logprobs_have_the_bytes_of_each_token_and_its_rivals(setting: Any) -> None:
    asked = {"messages": [{"role": "user", "content": "é"}], "logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    choice = setting.ask(PATH, **asked)["choices"][0]
    told = choice["logprobs"]["content"]
    prompt = setting.engine.seen[0].prompt
    assert len(told) == prompt.index(2) + 1, "the end token is told too"
    for number, entry in zip(prompt, told, strict=False):
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert entry["logprob"] == (-0.25 if number % 2 == 0 else -0.5)
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == -0.25
    assert "é".encode() in b"".join(bytes(entry["bytes"]) for entry in told)
    assert "<|im_start|>" == told[0]["token"] == bytes(told[0]["bytes"]).decode()


def test_who_asks_for_the_likeliest_tokens_gets_log_probabilities(setting: Any) -> None:
    assert setting.ask(PATH, messages=HELLO, max_tokens=1, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    assert setting.ask(PATH, messages=HELLO, max_tokens=1, top_logprobs=0)["choices"][0]["logprobs"] is None


def test_no_new_tokens_is_an_empty_answer(setting: Any) -> None:
    answer = setting.ask(PATH, messages=HELLO, max_tokens=0)
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 0
    assert pieces_of(setting, messages=HELLO, max_tokens=0)[-1]["choices"][0]["finish_reason"] == "length"


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
def test_what_cannot_be_answered_is_refused_by_name(setting: Any, body: dict[str, Any], param: str) -> None:
    status, error = setting.refusal(PATH, **body)
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert setting.engine.seen == []


def test_the_message_at_fault_is_named(setting: Any) -> None:
    _, error = setting.refusal(PATH, messages=[*HELLO, {"role": "assistant"}])
    assert error["message"].startswith(f"`messages[{len(HELLO)}].content`: ")


def test_what_openais_clients_send_along_is_taken(setting: Any) -> None:
    setting.ask(
        PATH, messages=[{"role": "user", "content": "the", "name": "me"}], tools=[], tool_choice="auto", store=True,
        response_format={"type": "text"}, modalities=["text"], user="me", metadata={"a": "b"}, service_tier="auto",
        parallel_tool_calls=True, frequency_penalty=0, top_logprobs=None,
    )  # fmt: skip


def test_what_the_template_refuses_is_a_wrong_request(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setting.engine.tokenizer, "chat_template", "{{ raise_exception('take turns') }}")
    status, error = setting.refusal(PATH, messages=HELLO)
    assert (status, error["param"]) == (400, "messages")
    assert "take turns" in error["message"]
    monkeypatch.setattr(setting.engine.tokenizer, "chat_template", None)
    assert setting.refusal(PATH, messages=HELLO)[0] == 400
