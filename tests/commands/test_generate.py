"""`octavo generate` with a file of prompts and the same answers as single prompts; commands of `octavo chat`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Octavo

from octavo.infer.engine import Engine
from octavo.infer.loaded_model import LoadedModel

PROMPTS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "the king", "temperature": 0},
    {"prompt": "of storm and of the sea", "seed": 3, "max_new_tokens": 5},
    {"prompt": "the", "temperature": 0, "stop": ["e"]},
    {"prompt": "the king of", "seed": 1, "top_k": 4},
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("slots", [1, 3])
def test_answers_are_in_order_and_equal_those_of_single_prompts(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, slots: int
) -> None:
    file = write(tmp_path / "prompts.jsonl", PROMPTS)
    common = ["generate", "--model", tiny_llama, "--dtype", "float32", "--max-new-tokens", 12]
    ran = octavo(*common, "--prompts", file, "--slots", slots)
    assert ran.code == 0
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert len(answers) == len(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.items() >= prompt.items()  # the output repeats the fields of the line
        flags = [(f"--{key.replace('_', '-')}", value) for key, value in prompt.items() if key not in ("id", "prompt")]
        options = [part for flag, value in flags for part in (flag, value[0] if isinstance(value, list) else value)]
        alone = json.loads(octavo(*common, "--prompt", prompt["prompt"], *options, "--json").out)
        assert {key: answer[key] for key in alone} == alone


def test_a_text_that_the_context_ends_is_noted(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    common = ["generate", "--model", tiny_llama, "--scheme", "none", "--temperature", 0, "--max-new-tokens"]
    ended = octavo(*common, 500, "--prompt", "the king")
    assert ended.code == 0
    assert ended.out.endswith("\n")
    note = "The text ends where the model's context of 128 tokens does, before --max-new-tokens 500"
    assert ended.err.count(note) == 1
    assert "model's context" not in octavo(*common, 3, "--prompt", "the king").err
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "the king"}, {"prompt": "the", "max_new_tokens": 3}])
    assert (
        "1 of 2 texts end where the model's context of 128 tokens does" in octavo(*common, 500, "--prompts", file).err
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', ":2 is not JSON"),
        ('{"text": "a"}', ":1 has no prompt"),
        ('{"prompt": ["a"]}', ":1 has no prompt"),
        ('{"prompt": "a"}\n\n{"prompt": "a", "top_p": 2}', "top_p"),
        ('{"prompt": "a", "stop": [""]}', "prompts.jsonl:1: "),
        ('{"prompt": "a"}\n\n{"prompt": "a", "top_p": 2}', "prompts.jsonl:3: "),
        ('{"prompt": "a"}\n\n{"prompt": "a", "stop": [""]}', "prompts.jsonl:3: "),
        (f'{{"prompt": "a"}}\r\n\r\n{{"prompt": "{"the king " * 900}"}}', "prompts.jsonl:3: The prompt has"),
    ],
)
def test_the_error_for_an_invalid_line_names_it(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, text: str, message: str
) -> None:
    (file := tmp_path / "prompts.jsonl").write_text(text)
    ran = octavo("generate", "--model", tiny_llama, "--prompts", file)
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_a_line_separator_of_unicode_within_a_string_does_not_end_the_line(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path
) -> None:
    (file := tmp_path / "prompts.jsonl").write_bytes('{"prompt": "the\u2028king\u0085of"}\r\n'.encode())
    ran = octavo("generate", "--model", tiny_llama, "--max-new-tokens", 2, "--prompts", file)
    assert ran.code == 0
    assert json.loads(ran.out)["prompt"] == "the\u2028king\u0085of"


def test_the_error_for_a_missing_file_names_it(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    ran = octavo("generate", "--model", tiny_llama, "--prompts", tmp_path / "none.jsonl")
    assert ran.code == 2
    assert "none.jsonl" in ran.err


def test_prompts_are_read_from_regular_files_only(octavo: Octavo, tiny_llama: Path) -> None:
    ran = octavo("generate", "--model", tiny_llama, "--prompts", "/dev/zero")
    assert (ran.code, ran.out) == (2, "")
    assert "/dev/zero: cannot be read: it is a character device" in ran.err


def test_another_system_message_starts_a_new_conversation(octavo: Octavo, tiny_llama: Path) -> None:
    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32"]
    changed = octavo(*common, stdin=b"of storm\n/system the king of storm\nthe sea\n").out.splitlines()
    fresh = octavo(*common, "--system", "the king of storm", stdin=b"the sea\n").out.splitlines()
    plain = octavo(*common, stdin=b"the sea\n").out.splitlines()
    assert changed[-len(fresh) :] == fresh
    assert fresh != plain


def test_a_saved_conversation_is_training_data(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    lines = f"/save {file}\nthe king\n/save\n/save {file}\n/save {tmp_path / 'no' / 'such'}\n"
    ran = octavo("chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 4, stdin=lines.encode())
    assert ran.code == 0
    assert "the conversation is empty" in ran.err
    assert "name a file" in ran.err
    assert "cannot be written" in ran.err
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert [message["role"] for message in line["messages"]] == ["user", "assistant"]
    assert line["messages"][0]["content"] == "the king"
    data = octavo("data", "--model", tiny_llama, file)  # reads it as `octavo finetune --data`
    assert data.code == 0


def test_answers_are_the_same_when_the_cache_grows(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.commands import chat

    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32"]
    stdin_bytes = b"of storm\nthe sea\nthe king\n"
    expected = octavo(*common, stdin=stdin_bytes).out
    lengths: list[int] = []
    original = LoadedModel.engine

    def engine(self: LoadedModel, *, max_len: int) -> Engine:
        lengths.append(max_len)
        return original(self, max_len=max_len)

    monkeypatch.setattr(chat, "INITIAL_MAX_LEN", 8)
    monkeypatch.setattr(LoadedModel, "engine", engine)
    assert octavo(*common, stdin=stdin_bytes).out == expected
    assert lengths[0] == 8
    assert lengths == sorted(set(lengths))
    assert len(lengths) > 1


BREAK = {"repetition_penalty": 1e-320}  # makes the logits of this request infinite


def test_an_engine_that_fails_is_an_error(octavo: Octavo, tiny_llama: Path) -> None:
    done = octavo("generate", "the king", "--model", tiny_llama, "--repetition-penalty", "1e-320")
    assert done.code == 1
    assert "not finite" in done.err
    as_json = octavo("generate", "the king", "--model", tiny_llama, "--repetition-penalty", "1e-320", "--json")
    assert as_json.code == 1
    assert as_json.json["error"]["type"] == "ModelError"


def test_a_failed_prompt_has_its_error_and_the_others_have_their_answers(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "prompts.jsonl", [PROMPTS[0], {"id": 8, "prompt": "the", **BREAK}, PROMPTS[2]])
    common = ["generate", "--model", tiny_llama, "--max-new-tokens", 3, "--slots", 2]
    done = octavo(*common, "--prompts", file)
    assert done.code == 1
    assert "1 of 3 prompts failed" in done.err
    first, failed, last = [json.loads(line) for line in done.out.splitlines()]
    assert first["token_ids"]
    assert last["token_ids"]
    assert (failed["id"], failed["text"], failed["token_ids"], failed["finish_reason"]) == (8, None, None, "error")
    assert failed["error"]["type"] == "ModelError"
    assert "not finite" in failed["error"]["message"]


def test_a_failed_answer_does_not_end_a_conversation(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 4, "--dtype", "float32"]
    alone = octavo(*common, stdin=b"the sea\n").out
    original = Engine.step
    fails = iter([True])

    def step(self: Engine) -> None:
        if next(fails, False):
            self.scheduler._prefill()
            self.scheduler.fail(RuntimeError("CUDA out of memory"))
        else:
            original(self)

    monkeypatch.setattr(Engine, "step", step)
    done = octavo(*common, stdin=b"the king\nthe sea\n")
    assert done.code == 1
    assert "The answer failed: Memory ran out" in done.err
    assert done.out.endswith(alone)


def test_an_unknown_command_is_reported_and_two_slashes_start_a_message(octavo: Octavo, tiny_llama: Path) -> None:
    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 4, "--dtype", "float32"]
    done = octavo(*common, stdin=b"/rest\n/quti now\n/help\n")
    assert (done.code, done.out) == (0, "")
    assert done.err.count("/save FILE") == 3
    assert "Unknown command /quti" in done.err
    slashed = octavo(*common, stdin=b"//the king\n")
    assert slashed.out != octavo(*common, stdin=b"the king\n").out
    assert slashed.code == 0


def test_ctrl_c_stops_the_answer_but_not_the_conversation(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo import cli

    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 20, "--dtype", "float32"]
    original = octavo(*common, stdin=b"the king\n").out
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_write", write)
    done = octavo(*common, stdin=b"the king\nthe sea\n")
    assert done.code == 0
    assert written[3] == "\n"
    assert original.startswith("".join(written[:3]))
    assert len(written) > 6
