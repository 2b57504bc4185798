"""Unsupported request fields: one that would change the output is a 400 with its name, never a 200."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from octavo.server.requests import ChatRequest, CompletionRequest
from octavo.server.unsupported import EVERY_ROUTE, HARMLESS, MAX_LOGGED, RULES

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "the"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "the"}]},
    "/prompt/": {"input": "the", "length": 9},
    "/tokenize": {"prompt": "the"},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
CHANGES: dict[str, Any] = {
    "structured_outputs": {"json": SCHEMA}, "guided_json": SCHEMA, "guided_choice": ["yes"], "guided_new_kind": "x",
    "grammar": 'root ::= "yes"', "json_schema": SCHEMA, "regex": "[0-9]+", "ebnf": "x", "format": "json",
    "stop_token_ids": [0], "min_p": 0.5, "ignore_eos": True, "min_tokens": 4, "bad_words": ["the"],
    "allowed_token_ids": [5], "use_beam_search": True, "prompt_logprobs": 0, "truncate_prompt_tokens": 1,
    "typical_p": 0.2, "mirostat": 2, "max_new_tokens": 5, "n_predict": 5, "options": {"num_predict": 5},
    "parameters": {"max_new_tokens": 5}, "extra_body": {"top_k": 5}, "repeat_penalty": 1.1, "dry_multiplier": 0.8,
    "lora": [{"id": 0, "scale": 0.5}], "samplers": ["top_k"], "do_sample": False, "random_seed": 4,
    "chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low", "skip_special_tokens": False,
    "thinking": {"type": "enabled"}, "maxTokens": 5, "max-new-tokens": 5, "Temperature": 0, "stopSequences": ["a"],
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "guided_json": None, "guided_choice": [], "stop_token_ids": [], "min_p": 0, "ignore_eos": False, "min_tokens": 0,
    "bad_words": [], "use_beam_search": False, "typical_p": 1.0, "mirostat": 0, "max_new_tokens": None, "options": {},
    "repeat_penalty": 1.0, "dry_multiplier": 0.0, "do_sample": True, "chat_template_kwargs": {},
    "reasoning_effort": None, "skip_special_tokens": True, "thinking": {"type": "disabled"}, "logit_bias": None,
    "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "cache_prompt": True, "priority": 3,
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
def test_fields_that_change_the_output_are_rejected_by_name(server: Any, path: str) -> None:
    wrong = []
    for name, value in CHANGES.items():
        if path == "/tokenize" and name in ("Temperature", "maxTokens"):
            continue  # /tokenize does not generate
        response = server.client.post(path, json={**BODIES[path], name: value})
        error = response.json().get("error", {})
        if response.status_code != 400 or error["param"] != name or f"`{name}`" not in error["message"]:
            wrong.append((name, response.status_code, response.text[:200]))
    assert wrong == []
    assert server.engine.submitted == []


@pytest.mark.parametrize("path", BODIES)
def test_neutral_values_are_accepted(server: Any, path: str, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in NEUTRAL.items():
        response = server.client.post(path, json={**BODIES[path], name: value})
        assert response.status_code == 200, (name, response.text)
    assert "unknown" not in caplog.text


def test_every_field_is_in_exactly_one_table() -> None:
    names = [name for _, row in EVERY_ROUTE for name in row]
    assert len(names) == len(set(names))
    assert not set(names) & HARMLESS
    for model in (CompletionRequest, ChatRequest):
        assert not RULES[model].rejected.keys() & model.model_fields.keys()


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/v1/completions", "add_special_tokens", False),
        ("/v1/completions", "max_completion_tokens", 5),
        ("/v1/completions", "top_logprobs", 3),
        ("/v1/chat/completions", "add_special_tokens", False),
        ("/v1/chat/completions", "chat_template", "{{ 1 }}"),
        ("/v1/chat/completions", "continue_final_message", True),
        ("/v1/chat/completions", "add_generation_prompt", False),
        ("/v1/chat/completions", "echo", True),
        ("/v1/chat/completions", "documents", [{"text": "x"}]),
        ("/v1/chat/completions", "best_of", 3),
        ("/v1/chat/completions", "suffix", "x"),
        ("/prompt/", "top_p", 0.5),
        ("/prompt/", "max_tokens", 5),
        ("/prompt/", "stop", ["a"]),
        ("/prompt/", "stream", True),
        ("/prompt/", "n", 2),
        ("/prompt/", "model", "queen"),
        ("/tokenize", "return_token_strs", True),
        ("/tokenize", "add_special", False),
    ],
)
def test_fields_of_other_routes_are_rejected(server: Any, path: str, name: str, value: Any) -> None:
    status, error = server.error(path, **{**BODIES[path], name: value})
    assert (status, error["param"]) == (400, name)


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options", "stream_options.continuous_usage_"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format", "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "plain text"),
        ({"response_format": {"type": "grammar", "value": "x"}}, "response_format", "plain text"),
        ({"response_format": {}}, "response_format", "plain text"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "tools"),
    ],
)
def test_unsupported_nested_fields_are_rejected(server: Any, more: dict[str, Any], param: str, words: str) -> None:
    status, error = server.error("/v1/chat/completions", **BODIES["/v1/chat/completions"], **more)
    assert (status, error["param"], error["code"]) == (400, param, "unsupported_parameter")
    assert words in error["message"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CALL = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "tool", "tool_call_id": "1", "content": "x"}, "role 'tool'"),
        ({"role": "function", "name": "f", "content": "x"}, "role 'function'"),
        ({"role": "critic", "content": "x"}, "no role 'critic'"),
        ({"role": "assistant", "content": None, "tool_calls": CALL}, "tool calls are not supported"),
        ({"role": "assistant", "content": "x", "tool_calls": CALL}, "tool calls are not supported"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "tool calls are not supported"),
        ({"role": "user", "content": None}, "null"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}, "content[1] has the type 'image_url'"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "'input_audio'"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "'file'"),
        ({"role": "user", "content": "x", "prefix": True}, "messages[1].prefix"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "messages[1].reasoning_content"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "messages[1].audio"),
        ({"role": "user", "content": "x", "images": ["AAAA"]}, "messages[1].images"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "image_url": {}}]}, "messages[1].content[0].image"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_unsupported_messages_have_clear_errors(server: Any, path: str, turn: dict[str, Any], words: str) -> None:
    status, error = server.error(path, messages=[{"role": "user", "content": "the"}, turn])
    assert (status, error["param"], error["code"]) == (400, "messages", "unsupported_parameter")
    assert "messages[1]" in error["message"]
    assert words in error["message"]
    assert "Input should" not in error["message"]


def test_a_response_message_can_be_sent_back(server: Any) -> None:
    """OpenAI's client sends an assistant message back with all of its fields."""
    response: dict[str, Any] = {
        "role": "assistant", "content": "the", "refusal": None, "annotations": [], "audio": None, "tool_calls": None,
        "function_call": None, "reasoning_content": None,
    }  # fmt: skip
    part = {"type": "text", "text": "the", "cache_control": {"type": "ephemeral"}}
    server.post("/v1/chat/completions", messages=[response, {"role": "user", "content": [part], "name": "me"}])


def test_unknown_fields_are_logged_once_up_to_a_limit(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "octavo.server")
    for _ in range(2):
        server.post("/v1/completions", prompt="the", frobnicate=1, stream_options={"colour": "red"})
    lines = [record.getMessage() for record in caplog.records if record.name == "octavo.server"]
    assert [line.split("'")[1] for line in lines] == ["frobnicate", "colour"]
    assert "/v1/completions" in lines[0]
    server.post("/v1/completions", prompt="the", **{"\x1b]0;" + "x" * 1000: 1})
    for more in range(2):
        server.post("/v1/completions", prompt="the", **{f"made_up_{more}_{number}": 1 for number in range(200)})
    lines = [record.getMessage() for record in caplog.records if record.name == "octavo.server"]
    assert len(lines) == MAX_LOGGED + 1, "plus one line about further fields"
    assert all(len(line) < 200 and line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"scale": 0.5}, "scale"),
        ({"base_model_name": "other"}, "base_model_name"),
        ({"load_inplace": True}, "load_inplace"),
        ({"loraPath": "x"}, "loraPath"),
    ],
)
def test_unsupported_adapter_fields_are_rejected(
    open_server: Any, tmp_path: Any, more: dict[str, Any], param: str
) -> None:
    server = open_server(adapters_from=tmp_path)
    status, error = server.error("/v1/load_lora_adapter", lora_name="new", lora_path="new", **more)
    assert (status, error["param"]) == (400, param)


def test_too_many_unknown_fields_are_rejected(server: Any) -> None:
    status, error = server.error("/v1/completions", prompt="the", **{f"field_{n}": 1 for n in range(20_000)})
    assert (status, error["message"]) == (400, "`body` has more than 256 unknown fields.")
    turn = {"role": "user", "content": "the", **{f"field_{n}": 1 for n in range(300)}}
    status, error = server.error("/v1/chat/completions", messages=[turn])
    assert (status, error["param"]) == (400, "messages")
