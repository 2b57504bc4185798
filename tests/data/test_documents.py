from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.documents import Document, Message, ReadOptions, find, read, split
from octavo.errors import DataError, UsageError


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def texts(count: int) -> list[Document]:
    return [Document(f"file{number % 3}", number, text=f"text {number}") for number in range(count)]


def test_files_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "plain")
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"prompt": "p", "completion": "c"}\n{"text": "t"}'))
    write(tmp_path / "c.csv", "instruction,output\nDo,Done\n")
    documents, skipped = read([str(tmp_path)])
    assert [(os.path.basename(d.source), d.line) for d in documents] == [
        ("a.txt", 1),
        ("b.jsonl.gz", 1),
        ("b.jsonl.gz", 2),
        ("c.csv", 2),
    ]
    assert [d.completion for d in documents] == [None, "c", None, "Done"]
    assert skipped == []


def test_find_takes_every_format_and_no_other(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md.xz", "c.jsonl", "d.json", "e.csv", "f.parquet", "g.bin"):
        write(tmp_path / name, "x")
    assert [path.name[0] for path in find([str(tmp_path)])] == list("abcdef")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.csv", b"text\n", "holds no text"),
        ("a.txt", b"a\xff", "a.txt:1: byte 1"),
        ("a.txt", b"\x00\x01\x02", "binary"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ""}', "a.jsonl:2: field `text` is empty"),
        ("a.jsonl", b'{"text": "a"}\nnonsense', "a.jsonl:2: not valid JSON"),
        ("a.csv", b"text\na,b\n", "a.csv:2: 2 fields"),
        ("a.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "cannot be decompressed"),
    ],
)
def test_what_cannot_be_read_stops_the_reading_or_is_counted(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    good, bad = write(tmp_path / "good.txt", "good"), write(tmp_path / name, data)
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        read([good, bad])
    documents, skipped = read([bad, good], ReadOptions(skip_bad=True))
    assert documents[-1].text == "good"
    (reason,) = skipped
    assert reason.source == bad
    assert message.split(": ")[-1] in reason.reason
    assert bad not in reason.reason


def test_records_before_damage_are_kept(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(400).hex().encode() for _ in range(6_000))
    bad = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-1000])
    documents, skipped = read([bad], ReadOptions(skip_bad=True))
    assert 2_000 < len(documents) < 6_000
    assert [(bad.line, bad.n_bytes) for bad in skipped] == [(0, os.path.getsize(bad))]


def test_nothing_but_bad_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no document could be read.*holds no text"):
        read([write(tmp_path / "a.txt", "")], ReadOptions(skip_bad=True))


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="separator"):
        read([write(tmp_path / "a.txt", "a")], ReadOptions(split_on=""))


def test_ftfy_repairs_every_part_and_leaves_quotes(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "GrÃ¼ÃŸe “quoted”")
    write(tmp_path / "b.jsonl", '{"prompt": "Ã¼", "completion": "Ã¶"}')
    write(tmp_path / "c.jsonl", '{"messages": [{"role": "assistant", "content": "Ã¼"}]}')
    documents, _ = read([str(tmp_path)], ReadOptions(ftfy=True))
    assert documents[0].text == "Grüße “quoted”"
    assert (documents[1].prompt, documents[1].completion) == ("ü", "ö")
    assert documents[2].messages == (Message("assistant", "ü"),)


def test_ftfy_missing_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UsageError, match=r"pip install 'octavo\[clean\]'"):
        read([write(tmp_path / "a.txt", "a")], ReadOptions(ftfy=True))


@given(
    contents=st.lists(st.integers(0, 30), min_size=2, max_size=40),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 5),
)
def test_split_keeps_every_document_on_one_side_and_no_side_empty(
    contents: list[int], fraction: float, seed: int
) -> None:
    documents = [Document("f", line, text=str(content)) for line, content in enumerate(contents)]
    train, test = split(documents, fraction=fraction, seed=seed)
    assert sorted(train + test, key=lambda document: document.line) == documents
    assert train
    assert test
    if len(set(contents)) > 1:
        assert not {document.text for document in train} & {document.text for document in test}


def test_split_leaves_a_document_on_its_side_when_others_come() -> None:
    small, large = texts(200), texts(400)
    train, test = split(small, fraction=0.2, seed=3)
    more_train, more_test = split(list(reversed(large)), fraction=0.2, seed=3)
    assert set(train) <= set(more_train)
    assert set(test) <= set(more_test)
    assert 50 < len(more_test) < 110
    assert set(split(large, fraction=0.2, seed=4)[1]) != set(more_test)


def test_split_sides_do_not_depend_on_file_or_line() -> None:
    moved = [Document("elsewhere", 1, text=document.text) for document in texts(50)]
    before = [document.text for document in split(texts(50), fraction=0.3, seed=0)[1]]
    assert before == [document.text for document in split(moved, fraction=0.3, seed=0)[1]]


def test_split_of_one_document_or_by_zero_gives_no_test_side() -> None:
    assert split(texts(1), fraction=0.5, seed=0) == (texts(1), [])
    assert split(texts(9), fraction=0, seed=0) == (texts(9), [])
    with pytest.raises(UsageError, match="fraction"):
        split(texts(9), fraction=1, seed=0)
