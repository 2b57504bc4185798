"""Conversations in every usual format give the same messages."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from octavo.data.fields import Record
from octavo.data.turns import ROLES, Message, conversation, tools_of
from octavo.errors import DataError

TALK = (Message("user", "q"), Message("assistant", "a"))


def read(*turns: Any, unused: Counter[str] | None = None) -> tuple[Message, ...]:
    record = Record({"messages": list(turns)}, "f", 3)
    return conversation(record, "messages", Counter() if unused is None else unused)


@pytest.mark.parametrize("role_key", ["role", "from", "speaker"])
@pytest.mark.parametrize("content_key", ["content", "value", "text"])
@pytest.mark.parametrize(
    ("user", "assistant"), [("user", "assistant"), ("human", "gpt"), ("Human", "ChatGPT"), (" User ", "model")]
)
def test_role_and_content_keys_of_every_format(role_key: str, content_key: str, user: str, assistant: str) -> None:
    assert read({role_key: user, content_key: "q"}, {role_key: assistant, content_key: "a"}) == TALK


def test_unknown_roles_are_kept_and_known_ones_map_to_four() -> None:
    assert read({"role": "Narrator", "content": "q"})[0].role == "Narrator"
    assert set(ROLES.values()) == {"user", "assistant", "system", "tool", "function_call"}
    assert [message.role for message in read(*({"role": r, "content": "x"} for r in ("developer", "observation")))] == [
        "system",
        "tool",
    ]


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "q"}],
        [{"type": "input_text", "text": "q"}],
        [{"text": "q", "image": None}],
        ["q"],
        [{"type": "text", "text": ""}, "q", {"type": "output_text", "text": ""}],
    ],
)
def test_a_content_in_parts_is_the_text_of_its_parts(content: list[Any]) -> None:
    assert read({"role": "user", "content": content})[0].content == "q"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '[{"name": "f", "parameters": {"x": 1}}]'},
        {"from": "tool-call", "value": {"name": "f", "arguments": {"x": 1}}},
    ],
)
def test_calls_of_every_format_become_openais_with_arguments_as_objects(turn: dict[str, Any]) -> None:
    (message,) = read(turn)
    assert (message.role, message.content, message.trained) == ("assistant", "", True)
    assert message.further == {"tool_calls": [CALL]}


def test_an_argument_of_null_stays() -> None:
    calls = [{"name": "f", "arguments": {"x": None, "y": [None, {"z": None}]}}]
    (message,) = read({"role": "assistant", "tool_calls": calls})
    assert message.further["tool_calls"][0]["function"]["arguments"] == calls[0]["arguments"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": {"default": None}}}}]
    assert json.loads(tools_of(Record({"tools": tools}, "f", 3))) == tools


@pytest.mark.parametrize("value", ["", None, [], "[]", [{"name": "f", "parameters": {}}], json.dumps([{"name": "f"}])])
def test_tools_are_in_openais_form(value: Any) -> None:
    tools = tools_of(Record({"tools": value}, "f", 3))
    if value in ("", None, [], "[]"):
        assert tools == ""
    else:
        assert [tool["type"] for tool in json.loads(tools)] == ["function"]
        assert json.loads(tools)[0]["function"]["name"] == "f"
    assert tools == tools_of(Record({"functions": value}, "f", 3))


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "user", "content": None}, "`messages[0].content` is null"),
        ({"role": "assistant", "content": None}, "`messages[0].content` is null"),
        ({"role": None, "content": "a"}, "`messages[0].role` is null"),
        ({"content": "a"}, "`messages[0]` has no `role`"),
        ({"role": "user", "content": {"a": 1}}, "must be a string, not an object"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "`messages[0].content[0]` is of type 'image_url'"),
        ({"role": "user", "content": [7]}, "`messages[0].content[0]` must be a part"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "`messages[0].weight` is '0.5'"),
        ({"role": "user", "content": "a", "weight": 1}, "`messages[0].weight` is set on a turn of role user"),
        ({"role": "assistant", "content": "a", "mask": False}, "`messages[0].mask` is ambiguous: give `weight`"),
        ({"role": "assistant", "content": "a", "name": 7}, "`messages[0].name` must be a string"),
        ({"role": "assistant", "tool_calls": ["f()"]}, "`messages[0].tool_calls` must be a tool call"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "f("}]}, "arguments are not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, "arguments must be a JSON object"),
        ({"from": "function_call", "value": "look it up"}, "must be a tool call with `name` and `arguments`"),
        ("q", "`messages[0]` must be an object"),
    ],
)  # fmt: skip
def test_the_error_of_an_invalid_turn_names_turn_and_field(turn: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(turn)
    assert message in caught.value.message


def test_other_fields_of_turns_are_counted() -> None:
    unused: Counter[str] = Counter()
    turn = {"role": "assistant", "content": "a", "id": 7, "refusal": None, "weight": 1, "audio": {}}
    assert read(turn, turn, unused=unused) == (TALK[1], TALK[1])
    assert unused == {"messages[].id": 2}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"content": [{"type": "text", "text": "what", "image_url": "a.png"}]}, "`image_url` next to its text"),
        ({"content": [{"text": "what", "image": "a.png"}]}, "`image` next to its text"),
        ({"content": "x", "weight": 1, "train": False}, "contradict"),
        ({"content": None, "tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]}, "lone surrogate"),
    ],
)
def test_a_field_that_a_turn_cannot_use_is_an_error(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read({"role": "user", "content": "q"}, {"role": "assistant", **turn})


def test_harmless_fields_of_a_text_part_are_ignored() -> None:
    part = {"type": None, "text": "a", "image_url": None, "cache_control": {"type": "ephemeral"}}
    assert read({"role": "user", "content": "q"}, {"role": "assistant", "content": [part]}) == TALK


def test_a_turn_with_loss_false_is_input_only() -> None:
    assert not read({"role": "assistant", "content": "a", "loss": False})[0].trained


@pytest.mark.parametrize(("role", "meant"), [("usr", "user"), ("Assistent", "assistant"), ("sytem", "system")])
def test_a_role_with_a_typing_error_is_an_error(role: str, meant: str) -> None:
    with pytest.raises(DataError, match=rf"f:3.*is '{role}'\. Did you mean {meant}\?"):
        read({"role": role, "content": "q"})
