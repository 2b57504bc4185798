"""commands/data.py: packed rows and their ledger from files, and their summary before training."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Octavo
from tokenizers.processors import TemplateProcessing

from octavo.commands.data import LEDGER_COLUMNS, Text, marked, read_documents, show_data, show_ledger, to_text
from octavo.config import Config, DataOptions, ModelOptions, TextOptions
from octavo.data.ledger import FileLedger, Ledger
from octavo.data.packing import IGNORE_INDEX
from octavo.data.passages import separate
from octavo.data.tokens import encode
from octavo.errors import DataError, UsageError
from octavo.reporting import Report
from octavo.store.tokenizer_files import load_tokenizer

KINDS = (ModelOptions, DataOptions, TextOptions)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def text_of(paths: list[Path], tokenizer: Any, **options: Any) -> Text:
    chosen = TextOptions.model_validate(options)
    with Report(console=False) as report:
        return to_text(read_documents([str(path) for path in paths], chosen), chosen, tokenizer, report)


def records(folder: Path, *lines: object) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("options", [{}, {"truncate": True}, {"seq_len": 300}, {"split_on": "lines"}])
def test_the_ledger_accounts_for_every_token_of_every_file(
    plays: Path, tokenizer: Any, options: dict[str, Any]
) -> None:
    text = text_of([plays / "train"], tokenizer, **{"seq_len": 32, **options})
    both: list[FileLedger | Ledger] = [text.ledger, *text.ledger.files]
    for counted in both:
        assert counted.tokens == counted.trained + counted.masked + counted.left_out
    assert text.ledger.trained == sum(int((row.labels != IGNORE_INDEX).sum()) for row in text.rows) > 0
    assert (text.ledger.left_out > 0) == ("truncate" in options)
    expected = sum(len(tokenizer.encode(path.read_text())) + 1 for path in (plays / "train").iterdir())
    if "split_on" not in options:
        assert text.ledger.tokens == expected, "all tokens of the files and an end token per file"


BOS = "<|im_start|>"


@pytest.fixture
def beginning(tiny_llama: Path) -> Any:
    """A tokenizer that puts the BOS token before every text, as Gemma's and Llama's do."""
    tokenizer = load_tokenizer(tiny_llama)
    numbers = [(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=numbers)
    tokenizer.bos_token = BOS
    return tokenizer


def test_every_row_of_a_long_text_begins_with_the_bos_token(
    plays: Path, tokenizer: Any, beginning: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plays / "train" / "play0.txt"
    text = text_of([path], beginning, seq_len=32)
    assert len(text.rows) > 3
    assert all(row.ids[0] == beginning.bos_token_id for row in text.rows)
    assert [row.labels[0] == IGNORE_INDEX for row in text.rows] == [False] + [True] * (len(text.rows) - 1)
    assert text.ledger.repeated_bos == len(text.rows) - 1
    plain = text_of([path], tokenizer, seq_len=32).ledger
    assert (text.ledger.tokens, text.ledger.trained) == (plain.tokens + 1, plain.trained + 1)
    with Report() as report:
        show_ledger(text.ledger, "Tokens", report)
        show_ledger(plain, "Tokens", report)
    shown = capsys.readouterr().err
    assert f", {text.ledger.repeated_bos} repeated BOS tokens" in " ".join(shown.split())
    explained = "each row that continues a document begins with BOS again"
    assert shown.count(explained) == shown.count("repeated BOS tokens") == 1, "a model without one has no such count"


def test_very_short_rows_of_mostly_bos_tokens_are_a_warning(
    plays: Path, tokenizer: Any, beginning: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {}
    for name, coder, length in (("short", beginning, 8), ("long", beginning, 64), ("none", tokenizer, 8)):
        config = Config.read(KINDS, {"model": "unused", "seq_len": length})
        with Report() as report:
            show_data(config, read_documents([str(plays / "train" / "play0.txt")], config[TextOptions]), coder, report)
        said[name] = " ".join(capsys.readouterr().err.split())
    assert "of the rows are repeated BOS tokens" in said["short"]
    assert not any("of the rows" in said[name] for name in ("long", "none"))
    assert "with a BOS and an EOS token of each document" in said["short"]
    assert "with an EOS token of each document" in said["none"]


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_tokens_are_scored_not_trained(
    plays: Path, tokenizer: Any, held_out: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report() as report:
        show_ledger(text_of([plays / "test"], tokenizer).ledger, "Tokens", report, held_out=held_out)
    shown = capsys.readouterr().err
    assert ("trained" in shown, "scored" in shown) == (not held_out, held_out)


def test_every_row_of_a_long_conversation_begins_with_the_bos_token_of_its_template(
    beginning: Any, tmp_path: Path
) -> None:
    beginning.chat_template = BOS + "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
    turns = [{"role": role, "content": "the king and the queen " * 9} for role in ("user", "assistant")]
    text = text_of([records(tmp_path, {"messages": turns})], beginning, seq_len=32)
    assert len(text.rows) > 2
    assert [row.ids[:2].tolist().count(beginning.bos_token_id) for row in text.rows] == [1] * len(text.rows)


def test_no_paths_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="No text files"):
        read_documents([], TextOptions.model_validate({}))


def test_unreadable_records_are_an_error_or_are_counted(plays: Path, tokenizer: Any, tmp_path: Path) -> None:
    good = plays / "train" / "play0.txt"
    broken = records(tmp_path, {"text": "the king"}, '{"text": \n', {"text": "the queen"})
    (binary := tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(DataError, match=r"records\.jsonl:2: "):
        text_of([good, broken], tokenizer)
    with pytest.raises(DataError, match=r"binary\.txt"):
        text_of([good, binary], tokenizer)
    ledger = text_of([good, broken, binary], tokenizer, skip_bad=True).ledger
    assert (ledger.documents, ledger.skipped) == (3, 2)
    assert [file.skipped for file in ledger.files] == [0, 1, 1]


def test_skipped_records_are_reported_with_file_and_line(plays: Path, tokenizer: Any, tmp_path: Path) -> None:
    broken = records(tmp_path, {"text": "the king"}, '{"text": \n')
    (binary := tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    options = TextOptions.model_validate({"skip_bad": True})
    with Report(console=False, metrics=tmp_path / "events.jsonl") as report:
        to_text(read_documents([str(broken), str(binary)], options), options, tokenizer, report)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    warnings = [event["text"] for event in events if event["event"] == "warn"]
    assert warnings[0].startswith(f"Skipped {broken}:2: ")
    assert warnings[1].startswith(f"Skipped {binary}")
    assert ":0:" not in warnings[1]


def test_duplicates_and_documents_with_few_distinct_tokens_are_removed_and_counted(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = records(tmp_path, {"text": "the king of york"}, {"text": "the king of york"}, {"text": "aaaaaaaa"})
    ledger = text_of([path], tokenizer, deduplicate=True, min_unique_tokens=4).ledger
    assert (ledger.documents, ledger.dropped) == (3, 2)
    assert ledger.left_out > 0


@pytest.mark.parametrize(
    ("texts", "options", "sentence"),
    [
        ("kqkk", {}, "2 of 4 documents are identical to an earlier one; --deduplicate removes them."),
        ("kqk", {}, "1 of 3 documents is identical to an earlier one; --deduplicate removes it."),
        ("kk", {"deduplicate": True}, "1 of 2 documents is identical to an earlier one and left out (--deduplicate)."),
        ("kq", {}, ""),
    ],
)
def test_identical_documents_are_said(
    tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    texts: str,
    options: dict[str, Any],
    sentence: str,
) -> None:
    paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text({"k": "one king", "q": "one queen"}[text])
    config = Config.read(KINDS, {"data": [str(path) for path in paths], **options})
    with Report(results=True) as report:
        show_data(config, read_documents(config[DataOptions].data, config[TextOptions], report), tokenizer, report)
    printed = capsys.readouterr().out
    assert sentence in printed
    assert ("identical to" in printed) == bool(sentence)


def test_a_prompt_is_marked_as_masked_and_its_completion_is_not(tokenizer: Any, tmp_path: Path) -> None:
    path = records(tmp_path, {"prompt": "where is my lord", "completion": " of york"})
    text = text_of([path], tokenizer, seq_len=64)
    assert marked(text.rows[0], tokenizer) == "[[where is my lord]] of york<|im_end|>"


def test_in_a_conversation_only_assistant_messages_and_their_end_are_trained(tokenizer: Any, tmp_path: Path) -> None:
    turns = [("user", "where"), ("assistant", "york"), ("user", "who"), ("assistant", "my lord")]
    path = records(tmp_path, {"messages": [{"role": role, "content": content} for role, content in turns]})
    shown = marked(text_of([path], tokenizer, seq_len=128).rows[0], tokenizer)
    assert "]]york<|im_end|>[[" in shown
    assert shown.endswith("]]my lord<|im_end|>")
    assert shown.startswith("[[<|im_start|>user\nwhere<|im_end|>")


def test_documents_in_one_row_are_marked_separately(tokenizer: Any, tmp_path: Path) -> None:
    lines = [{"prompt": f"{word} ", "completion": "king"} for word in ("where", "who", "whose")]
    text = text_of([records(tmp_path, *lines)], tokenizer, seq_len=128)
    assert len(text.rows) == 1
    assert marked(text.rows[0], tokenizer) == "".join(f"[[{line['prompt']}]]king<|im_end|>" for line in lines)


def test_rows_without_targets_are_not_evaluated(tokenizer: Any, tmp_path: Path) -> None:
    """A prompt that fills its row leaves no target in it."""
    lines = [{"prompt": "q" * 40, "completion": "king"}, {"prompt": "my ", "completion": "lord"}]
    text = text_of([records(tmp_path, *lines)], tokenizer, seq_len=8, truncate=True)
    assert len(text.rows) == 2
    assert [row.sources for row in text.measurable(0)] == [text.rows[1].sources]
    assert text.measurable(1) == text.measurable(0)


def test_show_data_returns_the_ledger(plays: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.read(KINDS, {"data": [str(plays / "train")], "seq_len": 32, "samples": 1})
    with Report() as report:
        reading = read_documents([str(plays / "train")], config[TextOptions], report)
        counted = show_data(config, reading, tokenizer, report)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert {*LEDGER_COLUMNS.values(), "files"} <= counted.keys()
    assert f"{counted['trained']:,}" in shown.err
    assert f"file in {plays / 'train'}" in shown.err
    assert "play0.txt" in shown.err
    assert shown.err.count("is masked, not trained on") == 1


def test_the_size_is_reported_before_many_megabytes_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("the king " * 120_000)
    options = Config.read(KINDS, {"seq_len": 32})[TextOptions]
    for smallest, message in ((1_080_001, ""), (1_080_000, "Reading 1 MB from 1 file.\n")):
        monkeypatch.setattr("octavo.commands.data.LARGE_BYTES", smallest)
        with Report() as report:
            assert len(read_documents([str(tmp_path)], options, report).documents) == 1
        assert capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["T4", "NOPE"])
def test_a_pretended_gpu_is_an_error_since_text_is_read_on_the_cpu(octavo: Octavo, plays: Path, name: str) -> None:
    done = octavo("data", plays / "train", "--model", "no model", "--pretend", name)
    assert (done.code, done.out) == (2, "")
    assert "octavo data runs on the CPU" in done.err
    assert f"--pretend {name}" in done.err


def test_a_device_that_is_not_used_is_reported(octavo: Octavo, plays: Path, tiny_llama: Path) -> None:
    arguments = ("data", plays / "train", "--model", tiny_llama, "--seq-len", 32)
    for device, is_reported in (("cuda:1", True), ("auto", False), ("cpu", False)):
        done = octavo(*arguments, "--device", device)
        assert done.code == 0
        assert (f"octavo data runs on the CPU; --device {device} is not used" in done.err) is is_reported


@pytest.fixture
def two_chapters(tmp_path: Path) -> Path:
    """A Word document of two chapters, with a header."""
    path = tmp_path / "book.docx"
    heading = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    paragraphs = [
        (heading, "The Tide"),
        ("", "It came in. " * 40),
        (heading, "The Ebb — é"),
        ("", "It went out. " * 40),
    ]
    body = "".join(f"<w:p>{style}<w:r><w:t>{text}</w:t></w:r></w:p>" for style, text in paragraphs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", f'<w:document xmlns:w="w"><w:body>{body}</w:body></w:document>')
        archive.writestr("word/header1.xml", '<w:hdr xmlns:w="w"><w:p><w:r><w:t>Head</w:t></w:r></w:p></w:hdr>')
        archive.writestr("word/styles.xml", "<s><style styleId='Heading1'><name val='heading 1'/></style></s>")
    return path


def test_rows_of_a_document_with_chapters_name_the_chapter_that_they_begin_in(
    two_chapters: Path, tokenizer: Any
) -> None:
    text = text_of([two_chapters], tokenizer, seq_len=16)
    chapters = [f"{two_chapters}: chapter {name}" for name in ("1 (The Tide)", "2 (The Ebb — é)")]
    (document,) = text.documents
    n_first = len(tokenizer.encode(document.text[: document.text.index("The Ebb")]))
    sources = [row.sources[0] for row in text.rows]
    assert sorted(set(sources)) == chapters
    assert abs(sources.count(chapters[0]) - n_first / 16) <= 1


def test_positions_are_the_tokens_of_the_text_there_also_after_a_cut(two_chapters: Path, tokenizer: Any) -> None:
    (document,) = read_documents([str(two_chapters)], TextOptions()).documents
    encoded = encode(document, tokenizer)
    (_, first), (at, second) = encoded.positions
    assert tokenizer.decode(encoded.ids[at:]).startswith("The Ebb")
    assert (encoded.where(at - 1), encoded.where(at)) == (f"{two_chapters}: {first}", f"{two_chapters}: {second}")
    _, (rest,) = separate(encoded, [(at - 5, len(encoded.ids))], tokenizer)
    ebb = next(index for index in range(len(rest.ids)) if rest.where(index).endswith(second))
    assert tokenizer.decode(rest.ids[ebb:]).startswith("The Ebb")
    assert rest.where(0) == f"{two_chapters}: {first}"


def test_what_was_removed_from_documents_is_in_the_ledger_and_is_printed(
    two_chapters: Path, tmp_path: Path, octavo: Octavo, tiny_llama: Path
) -> None:
    result = octavo("data", two_chapters, "--model", tiny_llama, "--seq-len", 32, "--samples", 1)
    assert f"Removed from {two_chapters}: 1 header." in " ".join(result.out.split())
    assert f"{two_chapters}: chapter 1 (The Tide)" in " ".join(result.out.split())
    ledger = octavo("data", two_chapters, "--model", tiny_llama, "--seq-len", 32, "--json").json
    assert ledger["removed"] == {str(two_chapters): {"header": 1}}
    assert ledger["unread"] == {}
