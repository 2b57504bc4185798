"""A conversation in any of the usual spellings, as messages: roles, contents in parts, tool calls, what is learned.

OpenAI's `role` and `content`, ShareGPT's `from` and `value`, and exporters that mix them are read alike. What a turn
holds beside text goes to the chat template as it is; what octavo cannot use is an error that names it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
# What the chat template gets beside role and content, where a turn has it.
_PASSED = ("tool_calls", "name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_SWITCHES = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight")
_MASKS = ("mask", "masked", "loss_mask")  # some write 1 for what is learned, others for what is not
_TEXT_PARTS = ("text", "input_text", "output_text")
_HARMLESS_PARTS = ("cache_control", "annotations", "logprobs", "id", "index")  # of a part of text


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # user, assistant, system, tool, or a name of the data's own
    content: str
    learned: bool = True  # of the assistant's turns: False where the turn is read and not learned
    fields: str = ""  # a JSON object of what the chat template gets beside these: tool_calls, name, ..

    @property
    def further(self) -> dict[str, Any]:
        """`fields` as a dict."""
        return dict(json.loads(self.fields)) if self.fields else {}


def conversation(record: Record, name: str, unused: Counter[str]) -> tuple[Message, ...]:
    """The turns of field `name`. Fields of turns that are not used are counted in `unused`.

    Raises DataError that names the turn and the field for what cannot be read.
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
    """Whether a value is a list of turns, also one written as JSON, as in a cell of a table."""
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
    """Whether a list of turns has one of an assistant's."""
    turns = json.loads(turns) if isinstance(turns, str) else turns
    roles = (turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict))  # type: ignore[union-attr]
    return any(ROLES.get(str(role).strip().lower()) == "assistant" for role in roles)


def tools_of(record: Record) -> str:
    """The record's tools as a JSON list in OpenAI's form, from `tools` or the older `functions`; "" for none."""
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
    return record.string(listed, name)  # half a character is no text


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """A bare schema {"name": .., "parameters": ..} in the form that chat templates are written for."""
    return {"type": "function", "function": tool} if "name" in tool else tool


def _message(record: Record, at: str, turn: Mapping[str, Any], unused: Counter[str]) -> Message:
    role_key = _first(_ROLE_KEYS, turn)
    content_key = _first(_CONTENT_KEYS, turn, but=role_key)
    if role_key not in turn:
        raise record.error(f"`{at}` has no `{role_key}`.")
    role = record.filled(turn.get(role_key), f"{at}.{role_key}")
    role = ROLES.get(role.strip().lower().replace("-", "_").replace(" ", "_"), role)
    calls = _calls(record, at, turn)
    value = turn.get(content_key)
    if role == "function_call":
        role, calls, value = "assistant", [_call(record, f"{at}.{content_key}", one) for one in _many(value)], None
    content = "" if value is None and calls else content_of(record, value, f"{at}.{content_key}")
    passed = {key: turn[key] for key in _PASSED if key != "tool_calls" and not is_blank(turn.get(key))}
    for key in passed:
        record.string(passed[key], f"{at}.{key}")
    if calls:
        passed = {"tool_calls": calls, **passed}
    learned = _is_learned(record, at, turn, role)
    used = {role_key, content_key, "function_call", *_PASSED, *_SWITCHES}
    unused.update(f"{at.partition('[')[0]}[].{key}" for key in turn if key not in used and not is_blank(turn[key]))
    return Message(role, content, learned, record.string(_json(passed), f"{at}.tool_calls") if passed else "")


def _first(names: Iterable[str], turn: Mapping[str, Any], *, but: str = "") -> str:
    """The first of `names` that the turn has: with a value, else at all, else the first name itself."""
    names = [name for name in names if name != but]
    present = [name for name in names if name in turn]
    return next((name for name in present if turn[name] is not None), present[0] if present else names[0])


def content_of(record: Record, value: object, at: str) -> str:
    """A turn's text: a string, or a list of parts that are text."""
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
        sort = part.get("type") or "text"
        if sort not in _TEXT_PARTS:
            raise record.error(f"`{here}` is of type {sort!r}: octavo reads parts of text only.")
        beside = [key for key in part if key not in ("type", "text", *_HARMLESS_PARTS) and not is_blank(part[key])]
        if beside:
            raise record.error(f"`{here}` holds `{beside[0]}` beside its text: octavo reads parts of text only.")
        texts.append(record.string(part.get("text"), f"{here}.text"))
    return "".join(texts)


def _calls(record: Record, at: str, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turn's tool calls in OpenAI's form, arguments as objects: so chat templates expect them."""
    name = next((name for name in ("tool_calls", "function_call") if not is_blank(turn.get(name))), None)
    if name is None:
        return []
    return [_call(record, f"{at}.{name}", one) for one in _many(turn[name])]


def _many(value: object) -> list[object]:
    """A list as it is, also one written as JSON; anything else alone in a list."""
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
    # In the order of the data: a template may print the whole call.
    if "function" not in call:
        return _wrapped(function)
    return {**({} if "type" in call else {"type": "function"}), **call, "function": function}


def _is_learned(record: Record, at: str, turn: Mapping[str, Any], role: str) -> bool:
    """Whether the turn is learned: OpenAI's `weight` of 0 or 1, or a `train` of true or false."""
    if masks := [key for key in _MASKS if not is_blank(turn.get(key))]:
        raise record.error(f"`{at}.{masks[0]}` is not clear: give `weight` in its place, 1 for a turn that is learned.")
    switched: dict[str, bool] = {}
    for key in _SWITCHES:
        if is_blank(turn.get(key)):
            continue
        switch = str(turn[key]).strip().lower()
        if switch not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise record.error(f"`{at}.{key}` is {str(turn[key])[:40]!r}: a turn is learned (1) or not (0).")
        switched[key] = switch.startswith(("1", "t"))
        if role != "assistant" and switched[key]:
            raise record.error(f"`{at}.{key}` asks to learn a turn of role {role}: octavo learns the assistant's.")
    if len(set(switched.values())) > 1:
        raise record.error(f"{' and '.join(f'`{at}.{key}`' for key in switched)} contradict each other.")
    return next(iter(switched.values()), True)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
