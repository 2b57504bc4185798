"""`octavo generate` for a file of prompts, with the answer that each prompt gets alone; commands of `octavo chat`."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Octavo

from octavo.infer.engine import Engine

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
def test_every_line_has_the_answer_that_it_gets_alone_in_order(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, slots: int
) -> None:
    file = write(tmp_path / "prompts.jsonl", PROMPTS)
    common = ["generate", "--model", tiny_llama, "--dtype", "float32", "--max-new-tokens", 12]
    ran = octavo(*common, "--prompts", file, "--slots", slots)
    assert ran.code == 0
    answers = [json.loads(line) for line in ran.out.splitlines()]
    assert len(answers) == len(PROMPTS)
    for asked, answer in zip(PROMPTS, answers, strict=True):
        assert answer.items() >= asked.items()  # what a line holds is handed on
        flags = [(f"--{key.replace('_', '-')}", value) for key, value in asked.items() if key not in ("id", "prompt")]
        own = [part for flag, value in flags for part in (flag, value[0] if isinstance(value, list) else value)]
        alone = json.loads(octavo(*common, "--prompt", asked["prompt"], *own, "--json").out)
        assert {key: answer[key] for key in alone} == alone


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', ":2 is not JSON"),
        ('{"text": "a"}', ":1 has no prompt"),
        ('{"prompt": ["a"]}', ":1 has no prompt"),
        ('{"prompt": "a"}\n\n{"prompt": "a", "top_p": 2}', "top_p"),
        ('{"prompt": "a", "stop": [""]}', "empty stop string"),
    ],
)
def test_the_error_for_an_invalid_line_names_it(
    octavo: Octavo, tiny_llama: Path, tmp_path: Path, text: str, told: str
) -> None:
    (file := tmp_path / "prompts.jsonl").write_text(text)
    ran = octavo("generate", "--model", tiny_llama, "--prompts", file)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err


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
    told = octavo(*common, stdin=b"of storm\n/system the king of storm\nthe sea\n").out.splitlines()
    asked = octavo(*common, "--system", "the king of storm", stdin=b"the sea\n").out.splitlines()
    plain = octavo(*common, stdin=b"the sea\n").out.splitlines()
    assert told[-len(asked) :] == asked
    assert asked != plain


def test_a_saved_conversation_is_training_data(octavo: Octavo, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.jsonl"
    words = f"/save {file}\nthe king\n/save\n/save {file}\n/save {tmp_path / 'no' / 'such'}\n"
    ran = octavo("chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 4, stdin=words.encode())
    assert ran.code == 0
    assert "the conversation is empty" in ran.err
    assert "name a file" in ran.err
    assert "cannot be written" in ran.err
    (line,) = [json.loads(text) for text in file.read_text().splitlines()]
    assert [message["role"] for message in line["messages"]] == ["user", "assistant"]
    assert line["messages"][0]["content"] == "the king"
    looked = octavo("data", "--model", tiny_llama, file)  # as `octavo finetune --data` reads it
    assert looked.code == 0


def test_answers_are_the_same_when_the_cache_grows(
    octavo: Octavo, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.commands import chat, generate

    common = ["chat", "--model", tiny_llama, "--temperature", 0, "--max-new-tokens", 6, "--dtype", "float32"]
    words = b"of storm\nthe sea\nthe king\n"
    roomy = octavo(*common, stdin=words).out
    taken: list[int] = []
    whole = generate.Speaker.engine

    def engine(self: generate.Speaker, *, max_len: int) -> Engine:
        taken.append(max_len)
        return whole(self, max_len=max_len)

    monkeypatch.setattr(chat, "INITIAL_MAX_LEN", 8)
    monkeypatch.setattr(generate.Speaker, "engine", engine)
    assert octavo(*common, stdin=words).out == roomy
    assert taken[0] == 8
    assert taken == sorted(set(taken))
    assert len(taken) > 1


BREAK = {"repetition_penalty": 1e-320}  # makes numbers that are not finite, of this request alone


def test_an_engine_that_fails_is_an_error(octavo: Octavo, tiny_llama: Path) -> None:
    done = octavo("generate", "the king", "--model", tiny_llama, "--repetition-penalty", "1e-320")
    assert done.code == 1
    assert "not finite" in done.err
    told = octavo("generate", "the king", "--model", tiny_llama, "--repetition-penalty", "1e-320", "--json")
    assert told.code == 1
    assert told.json["error"]["type"] == "ModelError"


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
    whole = Engine.step
    fails = iter([True])

    def step(self: Engine) -> None:
        if next(fails, False):
            self._read()
            self._fail(RuntimeError("CUDA out of memory"))
        else:
            whole(self)

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
    whole = octavo(*common, stdin=b"the king\n").out
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli, "_write", write)
    done = octavo(*common, stdin=b"the king\nthe sea\n")
    assert done.code == 0
    assert written[3] == "\n"
    assert whole.startswith("".join(written[:3]))
    assert len(written) > 6
