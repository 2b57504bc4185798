"""Held-out text is not trained on, and the overlap of both sides is reported."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from octavo.commands.data import Text
from octavo.commands.finetune.sides import read_sides
from octavo.config import Config, TextOptions, TrainingData, TrainOptions, WindowOptions
from octavo.data.packing import IGNORE_INDEX
from octavo.data.passages import count_of
from octavo.errors import UsageError
from octavo.reporting import Report
from octavo.store.resolve import open_source
from octavo.store.tokenizer_files import load_tokenizer

KINDS = (TrainingData, TextOptions, TrainOptions, WindowOptions)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


class Outcome:
    """Both sides, and the recorded events."""

    def __init__(self, folder: Path, tokenizer: Any, **options: Any) -> None:
        metrics = folder / "events.jsonl"
        metrics.unlink(missing_ok=True)
        with Report(console=False, metrics=metrics) as report:
            self.train, self.test = read_sides(
                Config.read(KINDS, {"seq_len": 64, **options}), tokenizer, report, context=2048
            )
        self.events = [json.loads(line) for line in metrics.read_text().splitlines()]
        self.messages = "\n".join(event["text"] for event in self.events if event["event"] in ("say", "warn"))

    @property
    def overlap(self) -> dict[str, Any]:
        assert self.test is not None
        assert self.test.ledger.overlap is not None
        return asdict(self.test.ledger.overlap)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def label_count(text: Text) -> int:
    return sum(int((row.labels != IGNORE_INDEX).sum()) for row in text.rows)


@pytest.mark.parametrize("copy", ["same", "link", "content", "spaces", "record", "prompt"])
def test_a_document_on_both_sides_is_removed_from_training(tmp_path: Path, tokenizer: Any, copy: str) -> None:
    held_out = write(tmp_path / "held", b_txt="the queen spoke to the king\nof the storm\n") / "b.txt"
    data = write(tmp_path / "data", a_txt="where is my lord of york and the duke of the sea\n")
    if copy == "same":
        held_out = held_out.rename(data / "b.txt")
    elif copy == "link":
        (data / "c.txt").hardlink_to(held_out)
    elif copy == "content":
        write(data, d_txt=held_out.read_text())
    elif copy == "spaces":
        write(data, d_txt="\ufeffthe queen  spoke to the\tking\r\n\r\nof the storm")
    elif copy == "record":
        write(data, d_jsonl=json.dumps({"text": held_out.read_text()}))
    else:
        write(data, d_jsonl=json.dumps({"prompt": "the queen spoke ", "completion": "to the king\nof the storm"}))
    alone = Outcome(tmp_path, tokenizer, data=[str(data / "a.txt")], test_data=[str(held_out)])
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)], test_data=[str(held_out)])
    assert [row.ids.tolist() for row in outcome.train.rows] == [row.ids.tolist() for row in alone.train.rows]
    assert outcome.train.ledger.trained == label_count(outcome.train)
    assert (outcome.train.ledger.documents, outcome.train.ledger.dropped) == (2, 1)
    overlap = outcome.overlap
    assert (overlap["removed_documents"], overlap["near_copies"], overlap["share"]) == (1, 0, 0.0)
    assert overlap["removed_tokens"] == outcome.train.ledger.left_out > 5
    (name,) = overlap["removed"]
    assert name in outcome.messages
    assert "Removed from the training text" in outcome.messages
    assert alone.overlap["removed"] == ()
    assert "Removed" not in alone.messages


def test_the_table_of_the_held_out_text_counts_scored_tokens(
    tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", a_txt="where is my lord of york and the duke of the sea\n" * 9)
    with Report() as report:
        read_sides(
            Config.read(KINDS, {"seq_len": 64, "data": [str(data)], "test_fraction": 0.2}),
            tokenizer,
            report,
            context=2048,
        )
    training, _, held_out = capsys.readouterr().err.partition("Held-out text (")
    assert ("trained" in training, "scored" in training) == (True, False)
    assert ("trained" in held_out, "scored" in held_out) == (False, True)


def test_conversations_on_both_sides_are_found(tmp_path: Path, tokenizer: Any) -> None:
    def talk(answer: str) -> str:
        turns = [{"role": "user", "content": "where is my lord"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": turns}) + "\n"

    data = write(tmp_path / "data", a_jsonl=talk("at sea") + talk("in york"))
    held_out = write(tmp_path / "held", a_jsonl=talk("in  york"))
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)], test_data=[str(held_out)])
    assert outcome.overlap["removed"] == (f"{data / 'a.jsonl'}:2",)
    assert outcome.overlap["share"] == 0


def test_near_copies_are_counted_and_warned_about(tmp_path: Path, tokenizer: Any) -> None:
    story = " ".join(f"the king of {a} spoke to the queen of {b}" for a in "abcdef" for b in "uvwxyz")
    data = write(tmp_path / "data", a_txt=f"where is my lord? {story} and so on", b_txt="storm and sea")
    held_out = write(tmp_path / "held", c_txt=story.replace("a spoke", "k spoke"), d_txt="my duke, my duke is not here")
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)], test_data=[str(held_out)])
    assert outcome.overlap["near"] == (f"{held_out / 'c.txt'}:1",)
    assert outcome.overlap["removed_documents"] == 0
    assert 0.5 < outcome.overlap["share"] < 1
    assert outcome.overlap["shared_tokens"] == pytest.approx(outcome.overlap["share"] * outcome.overlap["tokens"])
    assert "Near copies: more than half of the text of 1 document" in outcome.messages


def test_if_all_text_is_held_out_there_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    data = write(tmp_path / "data", a_txt="the king", b_txt="the queen")
    with pytest.raises(UsageError, match=r"All of the training text is also held out.*\n.*--test-fraction"):
        Outcome(tmp_path, tokenizer, data=[str(data)], test_data=[str(data)])


@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_the_last_tokens_of_a_single_text_are_held_out(tmp_path: Path, tokenizer: Any, fraction: float) -> None:
    text = "".join(f"the king spoke to queen {number}\n" for number in range(60))
    path = write(tmp_path / "data", a_txt=text) / "a.txt"
    outcome = Outcome(tmp_path, tokenizer, data=[str(path)], test_fraction=fraction, seq_len=2000)
    ids = tokenizer(text)["input_ids"]
    held_out = round(fraction * len(ids))
    assert outcome.test is not None
    assert outcome.train.rows[0].ids.tolist()[: len(ids) - held_out - 1] == ids[: len(ids) - held_out - 1]
    assert label_count(outcome.train) == len(ids) - held_out - 1
    assert outcome.test.rows[0].ids.tolist()[:held_out] == ids[len(ids) - held_out :]
    assert label_count(outcome.test) == held_out
    assert f"the last {held_out:,} of {len(ids):,} tokens of {path}" in outcome.messages
    assert text.endswith(outcome.test.documents[0].text)


def test_passages_of_a_long_text_are_held_out(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"the king spoke to queen {number}\n" for number in range(3000))
    path = write(tmp_path / "data", a_txt=text) / "a.txt"
    outcome = Outcome(tmp_path, tokenizer, data=[str(path)], test_fraction=0.1, seq_len=256)
    assert outcome.test is not None
    passages = [document.text for document in outcome.test.documents]
    count = count_of(round(0.1 * len(tokenizer(text)["input_ids"])))
    assert len(passages) == outcome.test.ledger.documents == count > 10
    assert all(passage.endswith("\n") and passage in text for passage in passages)
    for document in outcome.test.documents:
        assert text.split("\n")[document.line - 1] == document.text.split("\n")[0]
    numbers = [int(passage.split()[5]) for passage in passages]
    size = 3000 / count  # lines of a stretch, about
    # Longer numbers have more tokens, so stretches of equal length have unequal numbers of lines.
    assert all(abs(number - size * (stretch + 0.5)) <= size for stretch, number in enumerate(numbers))
    assert f"Held out: {count} passages spread over all of the text, " in outcome.messages
    assert outcome.overlap["held_out"] == "passages of the documents"
    # Every token is trained or held out, but the first of each part, which no token precedes.
    whole = len(tokenizer(text)["input_ids"]) + 1  # EOS
    parts = outcome.train.ledger.documents + outcome.test.ledger.documents
    assert label_count(outcome.train) + label_count(outcome.test) == whole - parts
    again = Outcome(tmp_path, tokenizer, data=[str(path)], test_fraction=0.1, seq_len=256)
    assert again.test is not None
    assert again.test.documents == outcome.test.documents


def test_passages_of_few_documents_are_held_out_unless_they_are_copies(tmp_path: Path, tokenizer: Any) -> None:
    text = "".join(f"the king spoke to queen {number}\n" for number in range(2000))
    data = write(tmp_path / "data", a_txt=text, b_txt=text.replace("queen", "duke"), c_txt="my lord of york\n" * 3)
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)], test_fraction=0.1, seq_len=256)
    assert outcome.test is not None
    assert "passages spread over all of the text" in outcome.messages
    assert {Path(document.source).name for document in outcome.test.documents} == {"a.txt", "b.txt"}
    write(data, d_txt=text)
    copied = Outcome(tmp_path, tokenizer, data=[str(data)], test_fraction=0.3, seq_len=256)
    assert copied.test is not None
    assert copied.overlap["held_out"] == "a share of the documents"


def test_the_held_out_fraction_of_documents_is_exact_and_reported(tmp_path: Path, tokenizer: Any) -> None:
    lines = "".join(json.dumps({"text": f"the king {number}"}) + "\n" for number in range(30))
    data = write(tmp_path / "data", a_jsonl=lines)
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)], test_fraction=0.2)
    assert outcome.test is not None
    assert (outcome.train.ledger.documents, outcome.test.ledger.documents) == (24, 6)
    assert "Held out: 6 of 30 documents" in outcome.messages
    assert "The number differs" not in outcome.messages
    assert outcome.overlap["held_out"] == "a share of the documents"
    copied = write(tmp_path / "copied", a_jsonl=lines + lines.splitlines(keepends=True)[0] * 30)
    outcome = Outcome(tmp_path, tokenizer, data=[str(copied)], test_fraction=0.6)
    assert outcome.test is not None
    assert (outcome.train.ledger.documents, outcome.test.ledger.documents) == (31, 29)
    assert "--test-fraction 0.6 is 36 documents. The number differs because all copies of a text" in outcome.messages


@pytest.mark.parametrize("record", [{"prompt": "q", "completion": "a b c d e f"}, {"text": "a"}])
def test_a_single_record_or_word_is_not_split(tmp_path: Path, tokenizer: Any, record: dict[str, str]) -> None:
    data = write(tmp_path / "data", a_jsonl=json.dumps(record))
    outcome = Outcome(tmp_path, tokenizer, data=[str(data)])
    assert outcome.test is None
    assert "There is no held-out text" in outcome.messages


@pytest.fixture(scope="module")
def real_tokenizer() -> Any:
    return open_source("smollm2").tokenizer()


@pytest.mark.parametrize("how", ["as it is", "wrapped at 50", "double spaces", "indented"])
def test_a_chapter_with_other_line_breaks_or_spaces_is_a_near_copy(
    tmp_path: Path, how: str, real_tokenizer: Any
) -> None:
    """With the vocabulary of a real model, in which the first word of a line is often a different token."""
    play = next(files("octavo").joinpath("shakespeare", "test").iterdir()).read_text()
    words = play[20_000:40_000].split()
    chapter = " ".join(words[1000:1800])
    copy = {
        "as it is": chapter,
        "wrapped at 50": textwrap.fill(chapter, 50),
        "double spaces": chapter.replace(" ", "  "),
        "indented": textwrap.indent(textwrap.fill(chapter, 70), "\t"),
    }[how]
    data = write(tmp_path / "data", a_txt=" ".join(words))
    held_out = write(tmp_path / "held", c_txt=f"Another beginning.\n{copy}")
    outcome = Outcome(tmp_path, real_tokenizer, data=[str(data)], test_data=[str(held_out)])
    assert outcome.overlap["near_copies"] == 1
    assert outcome.overlap["share"] > 0.7


def test_a_test_fraction_together_with_test_data_is_reported(tmp_path: Path, tokenizer: Any) -> None:
    folder = write(tmp_path / "texts", train_txt="the king of storm\n" * 9, test_txt="my lord of the sea\n" * 9)
    common = {"data": [str(folder / "train.txt")], "test_data": [str(folder / "test.txt")]}
    said = "--test-fraction is not used"
    assert said not in Outcome(tmp_path, tokenizer, **common).messages
    for fraction in (0.1, TrainingData().test_fraction):
        assert said in Outcome(tmp_path, tokenizer, **common, test_fraction=fraction).messages
