from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

import pytest

from octavo.data.records import Document, check_columns, from_fields
from octavo.data.turns import Message
from octavo.errors import DataError, UsageError

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


TALK_AS: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
QA = Document("f.jsonl", 7, prompt="q", completion="a")


@pytest.mark.parametrize(
    "names",
    [
        *("question answer", "query response", "input output", "prompt response", "inputs targets", "problem solution"),
        *("Question Answer", "user assistant", "human bot", "source target", "article summary", " Prompt  COMPLETION "),
    ],
)
def test_the_usual_names_of_a_prompt_and_its_completion_need_no_mapping(names: str) -> None:
    prompt, completion = names.strip().split()
    assert read({prompt: "q", completion: "a", "id": None}) == QA


def test_dollys_fields_are_an_instruction() -> None:
    record: dict[str, object] = {"instruction": "Add.", "context": "1 2", "response": "3"}
    assert read(record) == read({"instruction": "Add.", "input": "1 2", "output": "3"})


@pytest.mark.parametrize("name", ["system", "system_prompt", "System"])
def test_a_system_column_is_used_in_every_shape(name: str) -> None:
    turns = TALK_AS["messages"]
    assert read({"messages": turns, name: "s"}).messages == TALK[:1] + read(TALK_AS).messages
    assert read({"prompt": "q", "completion": "a", name: "s"}).prompt == "s\n\nq"
    prompt = read({"instruction": "i", "output": "o", name: "s"}).prompt
    assert prompt == "s\n\n### Instruction:\ni\n\n### Response:\n"
    system = [{"role": "system", "content": "s"}]
    assert read({"messages": system + turns, name: "s"}) == read({"messages": system + turns})
    with pytest.raises(DataError, match="two system messages"):
        read({"messages": system + turns, name: "other"})


def test_columns_map_any_record_and_other_fields_are_unused() -> None:
    unused: Counter[str] = Counter()
    columns = check_columns(["prompt=my, question", "completion=b=c"])
    fields = {"my, question": "q", "b=c": "a", "system": "s", "weight": 3}
    assert from_fields({**fields}, source="f.jsonl", line=7, columns=columns, unused=unused) == QA
    assert unused == {"system": 1, "weight": 1}
    columns = check_columns(["messages=talk", "system=lead"])
    assert from_fields({"talk": TALK_AS["messages"], "lead": "s"}, source="f", line=1, columns=columns).messages == TALK
    with pytest.raises(DataError, match=r"no field `b=c`, which --columns names; the record has: x"):
        from_fields({"x": 1}, source="f", line=1, columns={"prompt": "b=c", "completion": "x"})
    with pytest.raises(DataError, match="field `x` is null"):
        from_fields({"x": None}, source="f", line=1, columns={"text": "x"})


@pytest.mark.parametrize("columns", [["prompt"], ["prompt="], ["nothing=a"], ["prompt=a"], ["text=a", "text=b"]])
def test_invalid_columns_are_a_usage_error(columns: list[str]) -> None:
    with pytest.raises(UsageError, match="--columns"):
        check_columns(columns)


@pytest.mark.parametrize(
    "fields",
    [
        {"frage": "q", "antwort": "a"},
        {"die frage": "q", "it's": "a", "n": 3},
        {"body": "t"},
        {"talk": TALK_AS["messages"], "id": "x"},
    ],
)
def test_the_error_of_an_unknown_record_suggests_the_flag_that_reads_it(fields: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        read(fields)
    words = shlex.split(caught.value.hint.split(". Without")[0].removeprefix("Name the fields: "))
    assert words[0] == "--columns"
    # The command line splits the list, as the configuration does.
    from octavo.config import TextOptions

    columns = check_columns(TextOptions.model_validate({"columns": words[1:]}).columns)
    assert from_fields(fields, source="f", line=1, columns=columns)


def test_an_error_suggests_no_flag_without_clear_field_names() -> None:
    with pytest.raises(DataError) as caught:
        read({"context": "a long text", "question": "q", "answers": {"text": ["a"]}})
    assert "--columns prompt=question,completion=FIELD." in caught.value.hint


def test_messages_about_a_record_are_short() -> None:
    with pytest.raises(DataError) as caught:
        read({f"field {number}": 1 for number in range(10_000)})
    assert len(str(caught.value)) < 1000


def test_unused_fields_are_counted_and_empty_ones_are_not() -> None:
    unused: Counter[str] = Counter()
    fields = {
        "text": "t",
        "id": 3,
        "category": "x",
        "system": "",
        "tools": [],
        "history": "[]",
        "weight": 1.0,
        "train": True,
        "label": 0,
    }
    assert from_fields(fields, source="f", line=1, unused=unused).text == "t"
    assert unused == {"id": 1, "category": 1, "label": 1}


def test_turns_may_be_json_in_a_cell() -> None:
    cell = json.dumps([{"role": m.role, "content": m.content} for m in TALK])
    assert read({"messages": cell}).messages == TALK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": None}, "field `text` is null"),
        ({"question": None, "answer": None}, "field `question` is null"),
        ({"text": "t", "weight": 0.5}, "field `weight` would change the training"),
        ({"prompt": "p", "completion": "c", "suffix": "s"}, "field `suffix` would change the training"),
        ({"question": "p", "answer": "c", "reasoning": "r"}, "field `reasoning` would change the training"),
        ({"prompt": "p", "completion": "c", "train": False}, "field `train` would change the training"),
        ({"prompt": "p", "completion": "c", "sample_weight": "0"}, "field `sample_weight` would change"),
        ({"prompt": "p", "completion": "c", "label": False}, "field `label` would change the training"),
        ({"instruction": "i", "output": "o", "history": [["q", "a"]]}, "field `history` would change"),
        ({"question": "q", "answer": "a", "context": "c"}, "field `context` would change"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "field `tools` needs a conversation"),
        ({"problem": "q", "solution": "s", "answer": "a"}, "`problem`, `answer` and `solution` are ambiguous"),
        ({"role": "user", "content": "hello"}, "the record is one turn"),
        ({"body": "t", "id": 1}, "no field that octavo reads; the record has: body, id"),
        ({}, "the record has: none"),
        ({"text": 5}, "field `text` must be a string, not a number"),
        ({"text": " \n"}, "field `text` is empty"),
        ({"text": "a\ud800"}, "field `text` holds half a character"),
        ({"prompt": ["p"], "completion": "c"}, "field `prompt` must be a string, not a list"),
        ({"prompt": "p", "completion": ""}, "field `completion` is empty"),
        ({"instruction": "i", "input": 1, "output": "o"}, "field `input` must be a string"),
        ({"messages": []}, "field `messages` must be a list of turns, not an empty list"),
        ({"messages": "hello"}, "field `messages` is not a JSON list"),
        ({"messages": ["a"]}, "`messages[0]` must be an object, not a string"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "`messages[0].content` is null",
        ),
        ({"messages": [{"content": "a"}]}, "`messages[0]` has no `role`"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "`conversations[0].value` must be a string"),
    ],
)
def test_the_error_of_an_invalid_record_names_the_field(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(fields)
    assert caught.value.message.startswith("f.jsonl:7: ")
    assert message in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"system": None, "system_prompt": "s"},
        {"system": " ", "system_message": "s"},
        {"System": "s", "system_prompt": "s"},
    ],
)
def test_the_system_message_is_the_synonym_that_is_not_blank(fields: dict[str, object]) -> None:
    assert read({**TALK_AS, **fields}).messages == TALK
    assert read({"prompt": "q", "completion": "a", **fields}).prompt == "s\n\nq"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**TALK_AS, "system": "s", "system_prompt": "t"}, "`system` and `system_prompt` give two"),
        ({"prompt": "q", "completion": "a", "system_prompt": "s", "system_message": "t"}, "give two system"),
        ({"Text": "A", "text": "B"}, "`Text` and `text` are one name"),
        ({"prompt": "q", "completion": "c", "Completion ": "d"}, "are one name in two spellings"),
        ({**TALK_AS, "tools": [{"name": "x"}], "functions": [{"name": "y"}]}, "`tools` and `functions`"),
        ({**TALK_AS, "tools": [{"name": "\ud83d"}]}, "lone surrogate"),
        ({"text": "hi", "role": "prompter", "message_id": "1"}, "is one turn"),
    ],
)
def test_ambiguous_fields_are_an_error(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": "", "text": "hello"}, "hello"),
        ({"text": "a long body", "source": "wikipedia", "target": "train"}, "a long body"),
        ({"user": "alice", "bot": False, "text": "body"}, "body"),
        ({"text": "body", "role": "editor in chief"}, "body"),
    ],
)
def test_fields_about_a_text_are_not_read_as_the_text(fields: dict[str, object], expected: str) -> None:
    assert read(fields).text == expected


def test_a_filled_synonym_is_read_instead_of_a_blank_one() -> None:
    assert read({"question": "q", "completion": "", "answer": "a"}) == QA
    with pytest.raises(DataError, match="`completion` is empty"):
        read({"prompt": "q", "completion": " "})


def test_turns_in_the_cells_of_a_table_are_turns() -> None:
    questions, answers = TALK_AS["messages"][:1], TALK_AS["messages"][1:]
    document = read({"prompt": json.dumps(questions), "completion": json.dumps(answers)})
    assert document == read({"prompt": questions, "completion": answers})
    assert [message.role for message in document.messages] == ["user", "assistant"]
    assert read({"prompt": "[{x}]", "completion": "a"}).prompt == "[{x}]"


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("m/config.json", {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}),
        ("m/generation_config.json", {"transformers_version": "4.40", "cache_implementation": "hybrid"}),
        ("renamed.json", {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh"}),
    ],
)
def test_a_file_of_a_model_has_no_suggested_columns(source: str, fields: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        from_fields(fields, source=source, line=1)
    assert "--columns" not in caught.value.hint
    assert "name that folder with --model" in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {" q ": "A question", " r ": "An answer"},
        {"id": "abc", "frage": "Welche Farbe?", "antwort": "Sie ist blau."},
        {"prompt": "q", "chosen": TALK_AS["messages"], "rejected": TALK_AS["messages"]},
        {"prompt": "q", "chosen": "good", "rejected": "bad, abc"},
    ],
)
def test_the_columns_that_an_error_suggests_read_the_record(fields: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        read(fields)
    flag = shlex.split((caught.value.hint or "").partition("--columns ")[2].partition(". ")[0])[0]
    document = from_fields(fields, source="f", line=1, columns=check_columns(flag.split(",")))
    assert "abc" not in f"{document.prompt}{document.completion}"
    assert (document.completion or "").strip() or document.messages
