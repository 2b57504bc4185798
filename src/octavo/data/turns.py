"""Conversations in the usual formats as messages: roles, contents in parts, tool calls, and which turns are trained.

OpenAI's `role` and `content`, ShareGPT's `from` and `value`, and mixtures of them are read. Other fields of a turn that
chat templates use are passed on as they are. A field that octavo cannot use raises an error that names it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from octavo.bounded_json import shown
from octavo.data.fields import Record, is_blank, kind

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "chatbot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("tool_response", "function_response", "tool_result", "function_result"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
# Fields of a turn that the chat template gets in addition to role and content.
_PASSED = ("tool_calls", "name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_SWITCHES = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight")
_MASKS = ("mask", "masked", "loss_mask")  # ambiguous: in some data sets 1 means trained, in others not trained
_TEXT_PARTS = ("text", "input_text", "output_text")
_HARMLESS_PARTS = ("cache_control", "annotations", "logprobs", "id", "index")  # fields of a text part


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # user, assistant, system, tool, or another name in the data
    content: str
    trained: bool = True  # of the assistant's turns: False for a turn that is input only
    fields: str = ""  # a JSON object of further fields for the chat template: tool_calls, name, ..

    @property
    def further(self) -> dict[str, Any]:
        """`fields` as a dict."""
        return dict(json.loads(self.fields)) if self.fields else {}


def conversation(record: Record, name: str, unused: Counter[str]) -> tuple[Message, ...]:
    """The turns of field `name`. Fields of turns that are not used are counted in `unused`.

    Raises DataError with the turn and the field that cannot be read.
    """
    turns = record.parsed(name)
    if not isinstance(turns, list) or not turns:
        raise record.error(f"field `{name}` must be a list of turns, not {kind(turns)}.")
    messages = []
    for number, turn in enumerate(turns):
        at = f"{name}[{number}]"
        if not isinstance(turn, Mapping):
            raise record.error(f"`{at}` must be an object, not {kind(turn)}.")
        messages.append(_message(record, at, turn, unused))
    return tuple(messages)


def is_turns(value: object) -> bool:
    """Whether a value is a list of turns, also one written as a JSON string, as in the cell of a table."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, list) and all(
            isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in value
        )
    return isinstance(value, list)


def has_answer(turns: object) -> bool:
    """Whether a list of turns has an assistant's turn."""
    turns = json.loads(turns) if isinstance(turns, str) else turns
    roles = (turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict))  # type: ignore[union-attr]
    return any(ROLES.get(str(role).strip().lower()) == "assistant" for role in roles)


def tools_of(record: Record) -> str:
    """The record's tools as a JSON list in OpenAI's format, from `tools` or the older `functions`; "" for none."""
    filled = [name for name in ("tools", "functions") if not is_blank(record.get(name))]
    if not filled:
        return ""
    if len(filled) > 1:
        raise record.error("fields `tools` and `functions` both list tools: give one of them.")
    (name,) = filled
    tools = record.parsed(name)
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise record.error(f"field `{name}` must be a list of objects, one a tool.")
    listed = _json([tool if "function" in tool else _wrapped(tool) for tool in map(dict, tools)])
    return record.string(listed, name)  # rejects lone surrogates


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """A bare schema {"name": .., "parameters": ..} in the format that chat templates expect."""
    return {"type": "function", "function": tool} if "name" in tool else tool


def _message(record: Record, at: str, turn: Mapping[str, Any], unused: Counter[str]) -> Message:
    role_key = _first(_ROLE_KEYS, turn)
    content_key = _first(_CONTENT_KEYS, turn, but=role_key)
    if role_key not in turn:
        raise record.error(f"`{at}` has no `{role_key}`.")
    role = record.filled(turn.get(role_key), f"{at}.{role_key}")
    plain = role.strip().lower().replace("-", "_").replace(" ", "_")
    if plain not in ROLES and (near := get_close_matches(plain, ROLES, n=1, cutoff=0.8)):  # other names are kept
        raise record.error(f"`{at}.{role_key}` is {shown(role)}. Did you mean {near[0]}?")
    role = ROLES.get(plain, role)
    calls = _calls(record, at, turn)
    value = turn.get(content_key)
    if role == "function_call":
        calls = [_call(record, f"{at}.{content_key}", call) for call in _many(value)]
        role, value = "assistant", None
    content = "" if value is None and calls else content_of(record, value, f"{at}.{content_key}")
    passed = {key: turn[key] for key in _PASSED if key != "tool_calls" and not is_blank(turn.get(key))}
    for key in passed:
        record.string(passed[key], f"{at}.{key}")
    if calls:
        passed = {"tool_calls": calls, **passed}
    trained = _is_trained(record, at, turn, role)
    used = {role_key, content_key, "function_call", *_PASSED, *_SWITCHES}
    unused.update(f"{at.partition('[')[0]}[].{key}" for key in turn if key not in used and not is_blank(turn[key]))
    return Message(role, content, trained, record.string(_json(passed), f"{at}.tool_calls") if passed else "")


def _first(names: Iterable[str], turn: Mapping[str, Any], *, but: str = "") -> str:
    """The first of `names` with a value in the turn, else the first that exists, else the first name."""
    names = [name for name in names if name != but]
    present = [name for name in names if name in turn]
    return next((name for name in present if turn[name] is not None), present[0] if present else names[0])


def content_of(record: Record, value: object, at: str) -> str:
    """The text of a turn: a string, or a list of text parts."""
    if not isinstance(value, list):
        return record.string(value, at)
    texts = []
    for number, part in enumerate(value):
        here = f"{at}[{number}]"
        if isinstance(part, str):
            texts.append(record.string(part, here))
            continue
        if not isinstance(part, Mapping):
            raise record.error(f"`{here}` must be a part with text, not {kind(part)}.")
        part_type = part.get("type") or "text"
        if part_type not in _TEXT_PARTS:
            raise record.error(f"`{here}` is of type {part_type!r}: octavo reads parts of text only.")
        others = [key for key in part if key not in ("type", "text", *_HARMLESS_PARTS) and not is_blank(part[key])]
        if others:
            raise record.error(f"`{here}` holds `{others[0]}` next to its text: octavo reads parts of text only.")
        texts.append(record.string(part.get("text"), f"{here}.text"))
    return "".join(texts)


def _calls(record: Record, at: str, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turn's tool calls in OpenAI's format, with arguments as objects, as chat templates expect them."""
    name = next((name for name in ("tool_calls", "function_call") if not is_blank(turn.get(name))), None)
    if name is None:
        return []
    return [_call(record, f"{at}.{name}", call) for call in _many(turn[name])]


def _many(value: object) -> list[object]:
    """A list, also one written as a JSON string; any other value as a list of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    return value if isinstance(value, list) else [value]


def _call(record: Record, at: str, value: object) -> dict[str, Any]:
    call = dict(value) if isinstance(value, Mapping) else {}
    function = call.get("function", call)
    if isinstance(value, str) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise record.error(f"`{at}` must be a tool call with `name` and `arguments`, not {kind(value)}.")
    function = dict(function)
    arguments = function.get("arguments", function.pop("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise record.error(f"`{at}`: the arguments are not JSON: {error}.") from error
    if not isinstance(arguments, Mapping):
        raise record.error(f"`{at}`: the arguments must be a JSON object, not {kind(arguments)}.")
    function = {**function, "arguments": dict(arguments)}
    # Keys keep their order: a template may print the whole call.
    if "function" not in call:
        return _wrapped(function)
    return {**({} if "type" in call else {"type": "function"}), **call, "function": function}


def _is_trained(record: Record, at: str, turn: Mapping[str, Any], role: str) -> bool:
    """Whether the turn is trained: OpenAI's `weight` of 0 or 1, or a `train` of true or false."""
    if masks := [key for key in _MASKS if not is_blank(turn.get(key))]:
        raise record.error(f"`{at}.{masks[0]}` is ambiguous: give `weight` instead, 1 for a turn to train on.")
    switched: dict[str, bool] = {}
    for key in _SWITCHES:
        if is_blank(turn.get(key)):
            continue
        switch = str(turn[key]).strip().lower()
        if switch not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise record.error(f"`{at}.{key}` is {str(turn[key])[:40]!r}: it must be 1 (train on the turn) or 0.")
        switched[key] = switch.startswith(("1", "t"))
        if role != "assistant" and switched[key]:
            raise record.error(f"`{at}.{key}` is set on a turn of role {role}: octavo trains on the assistant's only.")
    if len(set(switched.values())) > 1:
        raise record.error(f"{' and '.join(f'`{at}.{key}`' for key in switched)} contradict each other.")
    return next(iter(switched.values()), True)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
