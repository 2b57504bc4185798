"""metrics.jsonl has complete lines only, also after a full disk, a kill during a write, and its deletion."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from octavo.errors import UsageError
from octavo.metrics_file import MetricsFile
from octavo.reporting import Report, read_events


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


@pytest.mark.parametrize(
    ("torn", "remaining"),
    [
        (b'{"a": 1}\n{"b": [{"c": 1}', [b'{"a": 1}']),
        (b'{"a": 1}\n{"b": {}}', [b'{"a": 1}', b'{"b": {}}']),
        (b'{"a": 1}\n', [b'{"a": 1}']),
        (b"{" + b"[" * 100_000, []),
        (b"", []),
    ],
    ids=["torn at a brace", "no line end", "complete", "deep", "empty"],
)
def test_a_partial_last_line_is_removed(torn: bytes, remaining: list[bytes], tmp_path: Path) -> None:
    (path := tmp_path / "m").write_bytes(torn)
    file = MetricsFile(path, append=True)
    file.write(b'{"z": 0}\n')
    file.close()
    assert lines(path) == [*remaining, b'{"z": 0}']


def test_a_failed_write_is_not_repeated_on_close(tmp_path: Path) -> None:
    path = tmp_path / "m"
    file = MetricsFile(path, append=False)
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, previous_limit[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            file.write(b'{"a": 1}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)
    assert caught.value.filename == str(path)
    file.close()
    MetricsFile(path, append=True).close()
    assert lines(path) == []


@pytest.mark.parametrize("deletion", ["deleted", "replaced", "folder deleted"])
def test_a_deleted_file_is_restored(deletion: str, tmp_path: Path) -> None:
    path = tmp_path / "run" / "m"
    report = Report(console=False, metrics=path)
    report.event("first")
    assert not report.restore()
    path.unlink()
    if deletion == "replaced":
        path.write_bytes(b"other")
    elif deletion == "folder deleted":
        path.parent.rmdir()
    report.event("second")
    assert report.restore()
    report.event("third")
    assert not report.restore()
    report.close()
    assert [event["event"] for event in read_events(path)[0]] == ["first", "second", "third"]
    assert os.listdir(path.parent) == ["m"]


def test_a_path_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "m", tmp_path):
        with pytest.raises(UsageError, match="cannot write"):
            MetricsFile(path, append=True)
