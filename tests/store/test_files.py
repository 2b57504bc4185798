"""Atomic writes, and the lock that keeps a second process out of a folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import CheckpointError
from octavo.store import files

HOLD = """
import sys
from pathlib import Path
from octavo.store.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_excludes_a_second_process_and_ends_with_its_holder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=f"pid {holder.pid}"), files.lock(tmp_path):
                pass
        finally:
            holder.kill()
    for _ in range(2):
        with files.lock(tmp_path):
            assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be opened"), files.lock(tmp_path / "file"):
        pass


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.json"
    files.write_json_atomically(path, {"a": "é"})

    def no_room(_: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(OSError, match="No space"):
        files.write_json_atomically(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_mode_of_the_umask_and_the_hash_of_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "f"
    before = os.umask(0o027)
    try:
        files.atomic_write(path, b"abc")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert files.sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
