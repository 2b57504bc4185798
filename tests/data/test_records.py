from __future__ import annotations

import json

import pytest

from octavo.data.records import Document, Message, from_fields
from octavo.errors import DataError

TALK = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))


def read(fields: dict[str, object]) -> Document:
    return from_fields(fields, source="f.jsonl", line=7)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "t", "id": 3}, Document("f.jsonl", 7, text="t")),
        ({"prompt": "", "completion": "c"}, Document("f.jsonl", 7, prompt="", completion="c")),
        (
            {"messages": [{"role": m.role, "content": m.content} for m in TALK], "text": "rendered"},
            Document("f.jsonl", 7, messages=TALK),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a"},
                ]
            },
            Document("f.jsonl", 7, messages=TALK),
        ),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "text": "rendered"},
            Document(
                "f.jsonl",
                7,
                prompt="### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
                completion="3",
            ),
        ),
        (
            {"instruction": "Hi.", "input": " ", "output": "3"},
            Document("f.jsonl", 7, prompt="### Instruction:\nHi.\n\n### Response:\n", completion="3"),
        ),
        ({"prompt": None, "completion": None, "text": "t"}, Document("f.jsonl", 7, text="t")),
    ],
)
def test_each_shape_gives_its_document(fields: dict[str, object], expected: Document) -> None:
    assert read(fields) == expected


def test_turns_may_be_json_in_a_cell() -> None:
    cell = json.dumps([{"role": m.role, "content": m.content} for m in TALK])
    assert read({"messages": cell}).messages == TALK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"body": "t", "id": 1}, "no field that octavo knows; the record has: body, id"),
        ({}, "the record has: none"),
        ({"text": 5}, "field `text` must be a string, not a int"),
        ({"text": " \n"}, "field `text` is empty"),
        ({"text": "a\ud800"}, "field `text` holds half a character"),
        ({"prompt": ["p"], "completion": "c"}, "field `prompt` must be a string, not a list"),
        ({"prompt": "p", "completion": ""}, "field `completion` is empty"),
        ({"instruction": "i", "input": 1, "output": "o"}, "field `input` must be a string"),
        ({"messages": []}, "field `messages` must be a list of turns, not an empty list"),
        ({"messages": "hello"}, "field `messages` is not a JSON list"),
        ({"messages": ["a"]}, "`messages[0]` must be an object, not a str"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "`messages[0].content` is null",
        ),
        ({"messages": [{"content": "a"}]}, "`messages[0]` has no `role`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "`conversations[0].value` must be a string"),
    ],
)
def test_a_record_that_is_wrong_is_named_with_its_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(fields)
    assert caught.value.message.startswith("f.jsonl:7: ")
    assert message in caught.value.message
