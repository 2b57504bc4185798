"""commands/finetune/samples.py: a prompt that does not fit the model's context is shortened, or an error at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from octavo.commands.finetune import samples
from octavo.config import Config
from octavo.errors import UsageError

Settings = Callable[..., Config]
Tune = Callable[..., dict[str, Any]]
CONTEXT = 48
SHORT: dict[str, Any] = {"steps": 1, "seq_len": 16, "test_data": [], "test_fraction": 0, "sample_prompt": []}


@pytest.fixture(scope="module")
def narrow(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context of 48 tokens."""
    folder = tmp_path_factory.mktemp("narrow") / "model"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        if path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((tiny_llama / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


LONG = " ".join(f"wordsworth{number}" for number in range(40))
DATA: dict[str, tuple[str, str]] = {  # name of the file, content
    "text": ("a.txt", LONG),
    "text of one word": ("a.txt", "x" * 900),
    "prompt": ("a.jsonl", json.dumps({"prompt": LONG, "completion": LONG})),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_default_prompt_that_does_not_fit_is_shortened_and_said_once(
    tune: Tune, narrow: Path, tmp_path: Path, kind: str
) -> None:
    name, content = DATA[kind]
    (tmp_path / name).write_text(content)
    tune(tmp_path / "run", model=str(narrow), data=[str(tmp_path / name)], **SHORT)
    prompts = {event["prompt"] for event in events(tmp_path / "run", "sample")}
    (prompt,) = prompts
    assert content.find(prompt) >= 0
    assert 0 < len(prompt) < len(LONG)
    said = [event["text"] for event in events(tmp_path / "run", "say") if "prompt of the samples" in event["text"]]
    assert len(said) == 1
    assert f"the model's context is {CONTEXT}" in said[0]
    assert "--sample-prompt" in said[0]
    assert len(events(tmp_path / "run", "sample")) == 2


def test_a_default_prompt_of_which_nothing_fits_is_left_out(
    tune: Tune, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    monkeypatch.setattr(samples, "encode_prompt", lambda text, tokenizer: [1] * CONTEXT)
    tune(tmp_path / "run", model=str(narrow), data=[str(tmp_path / "a.txt")], **SHORT)
    assert not events(tmp_path / "run", "sample")
    (said,) = [event["text"] for event in events(tmp_path / "run", "say") if "no samples" in event["text"]]
    assert "--sample-prompt" in said


def test_a_held_out_conversation_that_is_longer_than_the_context_does_not_stop_a_run(
    tune: Tune, narrow: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": LONG * 9}, {"role": "assistant", "content": LONG}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(2)))
    (tmp_path / "b.txt").write_text(LONG)
    result = tune(
        tmp_path / "run", model=str(narrow), data=[str(tmp_path / "b.txt")],
        **{**SHORT, "test_data": [str(tmp_path / "a.jsonl")]},
    )  # fmt: skip
    assert result["steps"] == 1


@pytest.mark.parametrize(
    ("prompt", "message"), [(LONG, r"--sample-prompt .* has [\d,]+ tokens; the model's context holds 48"),
                            ("", "--sample-prompt '': The prompt is empty")],
)  # fmt: skip
def test_a_given_prompt_that_does_not_fit_is_an_error_before_weights_are_loaded(
    tune: Tune, narrow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompt: str, message: str
) -> None:
    monkeypatch.setattr(
        import_module("octavo.commands.finetune.prepare"), "load_model", lambda *_: pytest.fail("was loaded")
    )
    monkeypatch.setattr("octavo.data.prompt.bos_ids", lambda _: [])
    (tmp_path / "a.txt").write_text(LONG)
    changes = {**SHORT, "sample_prompt": ["x", prompt]}
    with pytest.raises(UsageError, match=message):
        tune(tmp_path / "run", model=str(narrow), data=[str(tmp_path / "a.txt")], **changes)
    assert not (tmp_path / "run").exists()


def test_held_out_conversations_are_answered_through_the_chat_template(tune: Tune, tmp_path: Path) -> None:
    def conversation(number: int) -> dict[str, Any]:
        contents = f"hail {number}", f"who comes {number}?", f"the queen {number}"
        roles = "system", "user", "assistant"
        turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return {"messages": [*turns, {"role": "user", "content": "farewell"}]}

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(5)))
    tune(tmp_path / "run", data=[str(tmp_path / "a.jsonl")], **{**SHORT, "seq_len": 64})
    samples = events(tmp_path / "run", "sample")
    assert [(one["prompt"], one["reference"], one["which"]) for one in samples] == [
        (f"who comes {number}?", f"the queen {number}", which) for which in ("base", "tuned") for number in (0, 1)
    ]
    assert "the queen 0" in (tmp_path / "run" / "report.html").read_text()


def test_the_reference_of_a_text_is_what_follows_its_beginning(tune: Tune, tmp_path: Path) -> None:
    text = "FIRST WITCH.\nWhere the place?\n\nSECOND WITCH.\nUpon the heath, at the\nset of sun.\nAnd there?"
    (tmp_path / "a.txt").write_text(text)
    tune(tmp_path / "run", data=[str(tmp_path / "a.txt")], **SHORT)
    base = events(tmp_path / "run", "sample")[0]
    assert base["prompt"] + base["reference"] == text, "with its line breaks"
    assert len(base["prompt"].split()) == samples.PROMPT_WORDS


def test_the_sample_of_a_pair_is_printed_with_its_reference(tune: Tune, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "who goes?", "completion": "the king of the sea"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "who comes?", "completion": "the queen"}) + "\n")
    options = {**SHORT, "test_data": [str(tmp_path / "b.jsonl")]}
    tune(tmp_path / "run", data=[str(tmp_path / "a.jsonl")], **options)
    said = [event["text"] for event in events(tmp_path / "run", "say")]
    for which in ("base", "tuned"):
        (sample,) = (text for text in said if f"Sample of the {which} model for 'who comes?'" in text)
        assert sample.endswith("Reference answer:\nthe queen\n")
