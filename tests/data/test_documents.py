from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

import pytest

from octavo.data import documents as documents_module
from octavo.data.documents import ReadOptions, find, read
from octavo.data.turns import Message
from octavo.errors import DataError, UsageError


def write(path: Path, data: str | bytes) -> str:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_files_of_all_kinds_are_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "plain")
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"prompt": "p", "completion": "c"}\n{"text": "t"}'))
    write(tmp_path / "c.csv", "instruction,output\nDo,Done\n")
    reading = read([str(tmp_path)])
    documents, skipped = reading.documents, reading.skipped
    assert [(os.path.basename(d.source), d.line) for d in documents] == [
        ("a.txt", 1),
        ("b.jsonl.gz", 1),
        ("b.jsonl.gz", 2),
        ("c.csv", 2),
    ]
    assert [d.completion for d in documents] == [None, "c", None, "Done"]
    assert skipped == []


def test_find_returns_files_of_every_known_format_only(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md.xz", "c.jsonl", "d.json", "e.csv", "f.parquet", "g.bin"):
        write(tmp_path / name, "x")
    assert [path.name[0] for path in find([str(tmp_path)]).files] == list("abcdef")


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
def test_an_unreadable_file_raises_or_is_counted_as_skipped(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    good, bad = write(tmp_path / "good.txt", "good"), write(tmp_path / name, data)
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        read([good, bad])
    reading = read([bad, good], ReadOptions(skip_bad=True))
    documents, skipped = reading.documents, reading.skipped
    assert documents[-1].text == "good"
    (reason,) = skipped
    assert reason.source == bad
    assert message.split(": ")[-1] in reason.reason
    assert bad not in reason.reason


def test_records_before_damage_are_kept(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%s"}\n' % os.urandom(400).hex().encode() for _ in range(6_000))
    bad = write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-1000])
    reading = read([bad], ReadOptions(skip_bad=True))
    documents, skipped = reading.documents, reading.skipped
    assert 2_000 < len(documents) < 6_000
    assert [(bad.line, bad.n_bytes) for bad in skipped] == [(0, os.path.getsize(bad))]


def test_files_without_a_readable_record_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no document could be read.*holds no text"):
        read([write(tmp_path / "a.txt", "")], ReadOptions(skip_bad=True))


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="separator"):
        read([write(tmp_path / "a.txt", "a")], ReadOptions(split_on=""))


def test_ftfy_repairs_every_part_and_keeps_quotes(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "GrÃ¼ÃŸe “quoted”")
    write(tmp_path / "b.jsonl", '{"prompt": "Ã¼", "completion": "Ã¶"}')
    write(tmp_path / "c.jsonl", '{"messages": [{"role": "assistant", "content": "Ã¼"}]}')
    documents = read([str(tmp_path)], ReadOptions(ftfy=True)).documents
    assert documents[0].text == "Grüße “quoted”"
    assert (documents[1].prompt, documents[1].completion) == ("ü", "ö")
    assert documents[2].messages == (Message("assistant", "ü"),)


def test_missing_ftfy_raises_an_error_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UsageError, match=r"pip install 'octavo\[clean\]'"):
        read([write(tmp_path / "a.txt", "a")], ReadOptions(ftfy=True))


def test_too_many_documents_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "MAX_DOCUMENTS", 3)
    path = write(tmp_path / "a.txt", "one\ntwo\nthree\n")
    assert len(read([path], ReadOptions(split_on="lines")).documents) == 3
    write(tmp_path / "b.jsonl", "broken")
    with pytest.raises(UsageError, match="more than 3 documents"):
        read([str(tmp_path)], ReadOptions(split_on="lines", skip_bad=True))


def test_a_record_nested_too_deep_is_an_error(tmp_path: Path) -> None:
    deep = (
        '{"messages": [{"role": "assistant", "content": "a", "tool_calls": [{"name": "f", "arguments": {"a": DEEP}}]}]}'
    )
    path = write(tmp_path / "a.jsonl", deep.replace("DEEP", "[" * 900 + "]" * 900))
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*(nested too deep|cannot be read)"):
        read([path])


def test_unused_fields_and_files_are_counted_over_all_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "t", "id": 1}\n{"text": "t", "id": 2, "more": 3}\n')
    write(tmp_path / "b.csv", "text,id\nt,1\n")
    write(tmp_path / "c.doc", "PK")
    reading = read([str(tmp_path)])
    assert reading.unused == {"id": 3, "more": 1}
    assert reading.not_read == {".doc": 1}


def test_a_column_in_no_record_is_an_error_and_one_in_some_records_is_not(tmp_path: Path) -> None:
    (file := tmp_path / "a.jsonl").write_text('{"q": "A", "a": "B"}\n{"q": "A", "a": "B", "sys": "S"}\n')
    columns = ["prompt=q", "completion=a"]
    documents = read([str(file)], ReadOptions(columns=[*columns, "system=sys"])).documents
    assert [document.prompt for document in documents] == ["A", "S\n\nA"]
    with pytest.raises(UsageError, match="names sytem, which no record has"):
        read([str(file)], ReadOptions(columns=[*columns, "system=sytem"]))
