"""PDF files are read in a process: what it does on one file is an error of this file, and the others are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.data.extract.test_pdf import write

from octavo.data.documents import ReadOptions, read
from octavo.data.extract import pdf_worker
from octavo.data.extract.pdf import extract
from octavo.data.extract.pdf_worker import PdfWorker, read_pdf
from octavo.errors import DataError, OctavoError

pytest.importorskip("pypdfium2")

# More than the limit of this process; elsewhere more than there can be.
TOO_MUCH = "bytearray(5 * 2**30)" if sys.platform == "linux" else "bytearray(2**60)"
# The process as it is, except for what it does on the file bad.pdf.
REPLACED = """
import os, signal, sys, time
sys.path[:] = sys.argv[1:]
from octavo.data.extract import pdf_worker
from octavo.errors import DataError, UsageError
extract = pdf_worker.extract
def changed(path):
    if path.name == "bad.pdf":
        {act}
    return extract(path)
pdf_worker.extract = changed
pdf_worker.serve()
"""


def three(folder: Path) -> list[str]:
    names = ("a", "bad", "c")
    return [write(folder / f"{name}.pdf", [[(50, 700, 10, f"The tide {name}.")]]) for name in names]


def acting(monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    monkeypatch.setattr(pdf_worker, "CODE", REPLACED.format(act=act))


def test_a_record_is_that_of_the_reader(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.pdf", ["filled", [(50, 700, 10, "The tide.")]]))
    (record,) = read_pdf(path, None)
    assert record == extract(path)
    assert record.unread == {"page without text": 1}


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "cannot be read: PDFium crashed on it (signal 9)."),
        ("os._exit(7)", "cannot be read: PDFium crashed on it (exit code 7)."),
        ("[].pop()", "cannot be read: IndexError: pop from empty list"),
        (TOO_MUCH, "cannot be read: it needs more than 4 GiB."),
        ("print('noise', flush=True); raise DataError('is odd.', source='bad.pdf')", "is odd."),
    ],
)
def test_the_others_are_read_when_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, reason: str
) -> None:
    acting(monkeypatch, act)
    paths = three(tmp_path)
    reading = read(paths, ReadOptions(skip_bad=True))
    assert [document.text for document in reading.documents] == ["The tide a.", "The tide c."]
    assert [(bad.source, bad.line, bad.reason) for bad in reading.skipped] == [(paths[1], 0, reason)]
    with pytest.raises(DataError) as caught:
        read(paths)
    assert caught.value.message == f"{paths[1]}: {reason}"


def test_a_file_that_takes_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acting(monkeypatch, "time.sleep(3600)")
    paths = three(tmp_path)
    Path(paths[1]).write_bytes(Path(paths[1]).read_bytes() + b"\n" * 5000)
    monkeypatch.setattr(pdf_worker, "seconds_for", lambda n_bytes: 0.2 if n_bytes > 5000 else 600.0)
    reading = read(paths, ReadOptions(skip_bad=True))
    assert [document.text for document in reading.documents] == ["The tide a.", "The tide c."]
    assert [bad.reason for bad in reading.skipped] == ["cannot be read: it takes more than 0 s."]


@pytest.mark.parametrize("reply", ["{}", '{"record": {"line": 1}}', '{"kind": []}', "[1]", "\\xff"])
def test_a_damaged_reply_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: str) -> None:
    code = f"import sys; print('ready', flush=True); sys.stdin.readline(); print({reply!r}, flush=True)"
    monkeypatch.setattr(pdf_worker, "CODE", code)
    with PdfWorker() as worker, pytest.raises(DataError, match=r"a\.pdf: cannot be read"):
        worker.read(tmp_path / "a.pdf")


def test_one_process_reads_all_files_and_ends(tmp_path: Path) -> None:
    with PdfWorker() as worker:
        paths = [Path(path) for path in three(tmp_path)]
        worker.read(paths[0])
        process = worker._process
        with pytest.raises(DataError, match="cannot be read: No such file"):
            worker.read(tmp_path / "missing.pdf")
        worker.read(paths[2])
        assert worker._process is process is not None
        assert process.poll() is None
    assert process.poll() is not None


def test_a_process_that_does_not_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf_worker, "CODE", "raise SystemExit(3)")
    with PdfWorker() as worker, pytest.raises(OctavoError, match=r"did not start \(exit code 3\)"):
        worker.read(tmp_path / "a.pdf")


def test_a_relative_path_is_named_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b.pdf").write_bytes(b"%PDF-1.4\nnothing")
    with pytest.raises(DataError) as caught:
        extract(Path("b.pdf"))
    with pytest.raises(DataError) as read_by_worker:
        list(read_pdf(Path("b.pdf"), None))
    assert str(read_by_worker.value) == str(caught.value)
    assert read_by_worker.value.source == caught.value.source == "b.pdf"


def test_a_process_that_ended_between_two_files_is_started_again(tmp_path: Path) -> None:
    first, _, third = map(Path, three(tmp_path))
    with PdfWorker() as worker:
        worker.read(first)
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert worker.read(third).value == "The tide c."
