from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data import files
from octavo.data.files import FileSection, decode, sections, suffix
from octavo.errors import DataError


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def whole(path: Path) -> str:
    (section,) = sections(path, None)
    return decode(section, str(path))


def test_suffix_ignores_the_suffix_of_the_compression() -> None:
    assert [suffix(Path(name)) for name in ("a.b.JSONL.GZ", "a.txt.xz", "a.md", "a")] == [
        ".jsonl",
        ".txt",
        ".md",
        "",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compression", ["", ".gz", ".xz"])
def test_encodings_and_compressions_give_the_same_text(tmp_path: Path, encoding: str, compression: str) -> None:
    text = "Grüße, 世界!\nA second line of plain letters.\n"
    raw = text.encode(encoding)
    data = {"": raw, ".gz": gzip.compress(raw), ".xz": lzma.compress(raw)}[compression]
    assert whole(write(tmp_path / f"a.txt{compression}", data)) == text


@pytest.mark.parametrize(("mark", "offset"), [(b"", 0), (b"\xef\xbb\xbf", 3)])
def test_the_error_of_a_bad_byte_has_its_line_and_offset(tmp_path: Path, mark: bytes, offset: int) -> None:
    path = write(tmp_path / "a.txt", mark + b"one\ntwo\nthr\xffee\n")
    *_, last = [section for section in sections(path, b"\n") if section.data]
    with pytest.raises(DataError, match=rf"a\.txt:3: byte {11 + offset} \(0xff\)"):
        decode(last, str(path))
    with pytest.raises(DataError, match=rf"a\.txt:3: byte {11 + offset} "):
        whole(path)


def test_the_error_of_bad_utf16_has_its_line_and_offset(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\ntwo".encode("utf-16") + b"\x00\xd8")
    with pytest.raises(DataError, match=r"a\.txt:2: byte 16 is not UTF-16-LE"):
        whole(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x00", "binary"),
        (b"%PDF-1.7\n", "a PDF"),
        (gzip.compress(b"x", mtime=0), "gzip"),
        (b"x" * 5000 + b"\0", "byte 5000 is NUL"),
    ],
)
def test_a_binary_file_is_refused(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(DataError, match=what):
        whole(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize("compression", [".gz", ".xz"])
def test_a_truncated_or_false_compressed_file_is_an_error(tmp_path: Path, compression: str) -> None:
    noise = os.urandom(100_000)
    data = gzip.compress(noise) if compression == ".gz" else lzma.compress(noise)
    for broken in (
        data[: len(data) // 2],
        b"not compressed at all",
        data[:50] + b"garbage" * 20 + data[200:],
    ):
        with pytest.raises(DataError, match="cannot be decompressed"):
            list(sections(write(tmp_path / f"a.txt{compression}", broken), b"\n"))


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(sections(tmp_path, None))


def test_a_document_beyond_the_size_limit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(files, "CHUNK_BYTES", 16)
    assert len(list(sections(write(tmp_path / "a.txt", b"12345678\n" * 50), b"\n"))) == 50
    with pytest.raises(DataError, match=r"b\.txt\.gz:2: one document"):
        list(sections(write(tmp_path / "b.txt.gz", gzip.compress(b"1\n" + b"0" * 10_000)), b"\n"))


def test_a_separator_with_line_breaks_is_found_in_a_windows_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\r\nmore\r\n\r\ntwo")
    assert [section.data for section in sections(path, b"\n\n")] == [b"one\r\nmore", b"two"]


@given(
    data=st.binary(max_size=300).map(lambda data: b"text" + data.replace(b"\0", b"a")),
    separator=st.sampled_from([b"\n", b"ab", b"<|end|>", b"\n\n"]),
    chunk=st.integers(1, 40),
)
def test_pieces_and_separators_concatenate_to_the_file_at_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, separator: bytes, chunk: int
) -> None:
    data = data.replace(b"\r", b"\n") + separator + data[::-1].replace(b"\r", b"")
    path = write(tmp_path_factory.getbasetemp() / "sections.txt", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        actual = list(sections(path, separator))
    expected = []
    line, offset = 1, 0
    for part in data.split(separator):
        expected.append(FileSection(line, offset, part))
        line += (part + separator).count(b"\n")
        offset += len(part + separator)
    assert actual == (expected if expected[-1].data else expected[:-1])


@given(
    data=st.lists(st.sampled_from([b"\r", b"\n", b"a", b"b"]), max_size=30).map(b"".join),
    separator=st.sampled_from([b"\n", b"\n\n", b"a\n", b"\nb", b"a"]),
    chunk=st.integers(1, 9),
)
def test_every_line_end_counts_in_a_separator_at_any_chunk_size(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, separator: bytes, chunk: int
) -> None:
    def normal(data: bytes) -> bytes:
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    path = write(tmp_path_factory.getbasetemp() / "ends.txt", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK_BYTES", chunk)
        actual = list(sections(path, separator))
    expected = normal(data).split(separator)
    assert [normal(section.data) for section in actual] == (expected if expected[-1] else expected[:-1])
    for section in actual:
        assert data[section.offset :].startswith(section.data)
        assert section.line == normal(data[: section.offset]).count(b"\n") + 1


@pytest.mark.parametrize("compression", [".gz", ".xz"])
def test_data_that_expand_too_much_are_refused_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    """In one document or in many lines, and before much of it is in memory."""
    monkeypatch.setattr(files, "SURE_BYTES", 2**19)
    monkeypatch.setattr(files, "CHUNK_BYTES", 2**17)
    compress = gzip.compress if compression == ".gz" else lzma.compress
    for data, separator in ((b"x" * 2**21, None), (b"a\n" * 2**20, b"\n")):
        path = write(tmp_path / f"a.txt{compression}", compress(data))
        actual: list[FileSection] = []
        with pytest.raises(DataError, match="swell to more than 200 times their size"):
            actual.extend(sections(path, separator))
        assert sum(len(section.data) for section in actual) < 2**20
    text = "".join(f"line {number} of some text\n" for number in range(40_000)).encode()
    assert len(text) > 2**19
    assert sum(
        len(section.data) + 1 for section in sections(write(tmp_path / "b.txt.gz", gzip.compress(text)), b"\n")
    ) == len(text)


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder"])
def test_a_file_that_is_not_regular_is_an_error_and_never_opened(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    what = {"pipe": r"pipe \(FIFO\)", "folder": "folder", "link to a device": "character device"}[kind]
    with pytest.raises(DataError, match=f"cannot be read: it is a {what}"):
        list(sections(path, None))


def test_a_name_that_is_not_utf_8_is_shown_escaped() -> None:
    assert files.name_of(Path(os.fsdecode(b"d/caf\xe9.txt"))) == r"d/caf\xe9.txt"
    assert files.name_of(Path("d/café.txt")) == "d/café.txt"


@pytest.mark.parametrize("text", ["Привет", "Привет, как дела? " * 9, "Γειά", "שלום עולם", "สวัสดี"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark_is_read_or_an_error(tmp_path: Path, text: str, encoding: str) -> None:
    """Some UTF-16 text without NUL is valid UTF-8."""
    path = write(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(DataError, match=r"UTF-16|is not UTF-8"):
        whole(path)


@pytest.mark.parametrize(
    "text", ["a\tb\r\n\f\x1b[31mred\x1b[0m\x07" * 50, "a\x1fb\x1fc\x1e" * 50, "x\x02", "x" * 200 + "\x03" * 4]
)
def test_some_control_characters_are_text(tmp_path: Path, text: str) -> None:
    assert whole(write(tmp_path / "a.txt", text.encode())) == text
