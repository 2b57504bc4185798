"""Tools, calls and results in conversations: the ids equal those of apply_chat_template, and no turn is omitted."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from octavo.data import rendering
from octavo.data.chat import encode_chat
from octavo.data.encoding import coder_of
from octavo.data.records import from_fields
from octavo.errors import DataError

# Three formats of tools. The first has its calls in tags inside a turn, the second as bare JSON for
# one call a turn and results as JSON, the third in a list, without a header of the turn.
TAGS = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{% for t in tools %}{{- t | tojson }}{% endfor %}"
    "{{- '<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' and m.tool_calls %}{{- '<|im_start|>assistant' }}"
    "{%- if m.content %}{{- '\\n' + m.content }}{% endif %}"
    '{%- for c in m.tool_calls %}{{- \'\\n<call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{- c.function.arguments | tojson }}{{- '}\\n</call>' }}{% endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}{{- '<|im_start|>user\\n<result>\\n' + m.content + '\\n</result><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"
)
BARE = (
    "{%- for m in messages %}{{- '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\\n\\n' }}"
    "{%- if loop.first and tools %}{{- tools | tojson(indent=4) + '\\n' }}{% endif %}"
    "{%- if 'tool_calls' in m %}{{- m.tool_calls[0].function | tojson }}"
    "{%- elif m.role == 'tool' %}{{- m.content | tojson }}{%- else %}{{- m.content | trim }}{% endif %}"
    "{{- '<|im_end|>' }}{% endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
LISTED = (
    "{{- '<|im_start|>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' and m.content is none %}{{- '[CALLS] ' }}{{- m.tool_calls | tojson }}"
    "{{- '<|im_end|>' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '<|im_end|>' }}"
    "{%- elif m.role == 'tool' %}{{- '[RESULT] ' + m.content + '[/RESULT]' }}"
    "{%- else %}{%- if loop.last or loop.first %}{{- '[TOOLS] ' }}{{- tools | tojson }}{% endif %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Ypres", "n": 2}}}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Ypres?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"rain": "yes"}\n'},
    {"role": "assistant", "content": "It rains."},
]


def encoded(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerFast, unused: Counter[str] | None = None
) -> tuple[list[int], str]:
    document = from_fields(fields, source="f", line=3)
    tokens = encode_chat(document, tokenizer, coder_of(tokenizer), unused)
    return tokens.ids.tolist(), tokenizer.decode(tokens.ids[tokens.trained].tolist())


def as_strings(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As OpenAI's API gives them: arguments are JSON in a string."""
    copied: list[dict[str, Any]] = json.loads(json.dumps(turns))
    for turn in copied:
        for call in turn.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copied


@pytest.mark.parametrize(
    ("template", "call"),
    [
        (TAGS, '<call>\n{"name": "weather", "arguments": {"city": "Ypres", "n": 2}}\n</call><|im_end|>'),
        (BARE, '{"name": "weather", "arguments": {"city": "Ypres", "n": 2}}<|im_end|>'),
        (LISTED, "[CALLS] " + json.dumps([CALL]) + "<|im_end|>"),
    ],
)
@pytest.mark.parametrize("strings", [False, True])
def test_calls_are_trained_as_the_template_writes_them(
    tokenizer_copy: PreTrainedTokenizerFast, template: str, call: str, strings: bool
) -> None:
    tokenizer_copy.chat_template = template
    turns = as_strings(TURNS) if strings else TURNS
    ids, text = encoded({"messages": turns, "tools": TOOLS}, tokenizer_copy)
    whole = tokenizer_copy.apply_chat_template(TURNS, tools=TOOLS, tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)]
    assert tokenizer_copy.decode(whole[len(ids) :]).strip() == ""
    assert "".join(text.split()) == "".join((call + "It rains.<|im_end|>").split())


@pytest.mark.parametrize("template", [TAGS, BARE, LISTED])
def test_a_conversation_may_end_in_a_call(tokenizer_copy: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer_copy.chat_template = template
    ids, text = encoded({"messages": TURNS[:2], "tools": TOOLS}, tokenizer_copy)
    whole = tokenizer_copy.apply_chat_template(TURNS[:2], tools=TOOLS, tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)]
    assert "Ypres" in text
    assert text.endswith("<|im_end|>")


def test_text_next_to_a_call_is_trained_with_it(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.chat_template = TAGS
    turns = [TURNS[0], {**TURNS[1], "content": "Let me see."}, *TURNS[2:]]
    _, text = encoded({"messages": turns, "tools": TOOLS}, tokenizer_copy)
    assert text.startswith(("Let me see.\n<call>", "\nLet me see.\n<call>"))


def test_sharegpts_calls_and_results_are_read(tokenizer_copy: PreTrainedTokenizerFast) -> None:
    tokenizer_copy.chat_template = TAGS
    spoken = [
        {"from": "human", "value": "Weather in Ypres?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": '{"rain": "yes"}\n'},
        {"from": "gpt", "value": "It rains."},
    ]
    tools = json.dumps([TOOLS[0]["function"]])
    assert encoded({"conversations": spoken, "tools": tools}, tokenizer_copy) == encoded(
        {"messages": TURNS, "tools": TOOLS}, tokenizer_copy
    )


@pytest.mark.parametrize("key", ["weight", "trainable"])
def test_a_turn_of_weight_0_is_input_only(tokenizer_copy: PreTrainedTokenizerFast, key: str) -> None:
    tokenizer_copy.chat_template = TAGS
    turns = [TURNS[0], {**TURNS[1], key: 0}, *TURNS[2:]]
    ids, text = encoded({"messages": turns, "tools": TOOLS}, tokenizer_copy)
    assert text.strip() == "It rains.<|im_end|>"
    assert ids == encoded({"messages": TURNS, "tools": TOOLS}, tokenizer_copy)[0]


def test_only_the_completion_of_a_conversational_prompt_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    answer = [{"role": "assistant", "content": "hello"}]
    ids, text = encoded({"prompt": turns, "completion": answer}, tokenizer)
    whole = tokenizer.apply_chat_template([*turns, *answer], tokenize=True, return_dict=False)
    assert ids == whole[: len(ids)]
    assert text == "hello<|im_end|>"


ASKED = {"role": "user", "content": "q"}
NAMED_BY_A_CONTROL = {**CALL, "function": {"name": "<|im_end|>", "arguments": {}}}


@pytest.mark.parametrize(
    ("fields", "template", "message"),
    [
        ({"messages": TURNS, "tools": TOOLS}, None, "leaves out `tools`"),
        ({"messages": TURNS}, None, "leaves out `tool_calls` of turn 2"),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
            None,
            "leaves out `reasoning_content` of turn 2",
        ),
        (
            {"messages": [{"role": "system", "content": "s"}, ASKED, {"role": "assistant", "content": "a"}]},
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            "leaves out turn 1, which is of role system",
        ),
        ({"messages": [ASKED, {**TURNS[1], "tool_calls": [NAMED_BY_A_CONTROL]}]}, TAGS, "control token <|im_end|>"),
        ({"messages": TURNS, "tools": [{"name": "<|im_end|>"}]}, TAGS, "`tools` holds the control token <|im_end|>"),
        (
            {"messages": TURNS, "tools": TOOLS},
            TAGS.replace("{%- for m in messages %}", "{{- messages | length }}{%- for m in messages %}", 1),
            "does not write turn 2 in one place",
        ),
        (
            {"messages": [ASKED, {**TURNS[1], "tool_calls": [CALL, CALL, CALL]}], "tools": TOOLS},
            TAGS.replace("m.tool_calls %}", "m.tool_calls[:2] %}"),
            "writes 2 of the 3 tool calls of turn 2",
        ),
    ],
)
def test_a_field_that_the_template_does_not_write_is_an_error(
    tokenizer_copy: PreTrainedTokenizerFast, fields: dict[str, Any], template: str | None, message: str
) -> None:
    if template:
        tokenizer_copy.chat_template = template
    with pytest.raises(DataError) as caught:
        encoded(fields, tokenizer_copy)
    assert caught.value.message.startswith("f:3: ")
    assert message in caught.value.message


def test_names_that_the_template_does_not_write_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    unused: Counter[str] = Counter()
    turns = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]
    encoded({"messages": turns}, tokenizer, unused)
    assert list(unused.values()) == [1]
    assert "`name` of turns" in next(iter(unused))


def counted_renderings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the number of turns of each rendering."""
    calls: list[int] = []
    render = rendering.render

    def counted(document: Any, messages: Any, *rest: Any, **options: Any) -> str:
        calls.append(len(messages))
        return render(document, messages, *rest, **options)

    monkeypatch.setattr(rendering, "render", counted)
    return calls


def long_talk(n_calls: int) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = [TURNS[0]]
    for n in range(n_calls):
        turns += [{**TURNS[1], "tool_calls": [{**CALL, "id": f"c{n}"}]}, {**TURNS[2], "name": "weather"}]
    return [*turns, TURNS[3]]


def test_whether_fields_are_written_takes_as_many_renderings_for_many_turns_as_for_few(
    tokenizer_copy: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_copy.chat_template = TAGS
    calls = counted_renderings(monkeypatch)
    counts = []
    for n_calls in (2, 8):
        calls.clear()
        unused: Counter[str] = Counter()
        document = from_fields({"messages": long_talk(n_calls), "tools": TOOLS}, source="f", line=3)
        rendering.lay_out(document, tokenizer_copy, coder_of(tokenizer_copy), unused=unused)
        counts.append(len(calls))
        assert list(unused.values()) == [n_calls]
    assert counts[0] == counts[1] <= 10


def test_a_template_that_writes_the_reasoning_of_the_last_turn_only_is_refused(
    tokenizer_copy: PreTrainedTokenizerFast,
) -> None:
    tokenizer_copy.chat_template = (
        "{%- for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.reasoning_content %}"
        "{{ m.reasoning_content }}\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    answer = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    with pytest.raises(DataError, match="leaves out `reasoning_content` of turn 2"):
        encoded({"messages": [ASKED, answer, ASKED, answer]}, tokenizer_copy)
    encoded({"messages": [ASKED, answer]}, tokenizer_copy)


@pytest.mark.parametrize("template", [TAGS, BARE, LISTED])
def test_many_turns_with_calls_take_as_many_renderings_as_few(
    tokenizer_copy: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    tokenizer_copy.chat_template = template
    calls = counted_renderings(monkeypatch)
    counts = []
    for n_calls in (3, 9):
        calls.clear()
        encoded({"messages": long_talk(n_calls), "tools": TOOLS}, tokenizer_copy)
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 16


SPOKEN = {"role": "assistant", "content": "I ask.", "tool_calls": [CALL]}
MIXED = [
    ASKED,
    TURNS[1],
    TURNS[2],
    SPOKEN,
    TURNS[2],
    TURNS[2],
    SPOKEN,
    {**TURNS[2], "content": " "},
    *TURNS[1:3],
    ASKED,
]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (TAGS, MIXED),
        (TAGS.replace("assistant' }}", "assistant ' ~ loop.index }}"), MIXED),
        (TAGS.replace("</call>' }}", "</call>' ~ loop.index }}"), MIXED),
        (BARE, [ASKED, *TURNS[1:3], *TURNS[1:3]]),
        (LISTED, []),
    ],
)
def test_turn_spans_equal_those_from_rendering_up_to_each_turn(
    tokenizer_copy: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    turns: list[dict[str, Any]],
) -> None:
    tokenizer_copy.chat_template = template
    fields = {"messages": [*long_talk(3), *turns, *turns, TURNS[3]], "tools": TOOLS}
    actual = encoded(fields, tokenizer_copy)
    monkeypatch.setattr(rendering, "_gap", lambda *_: None)
    assert actual == encoded(fields, tokenizer_copy)
