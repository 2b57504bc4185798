"""Each failure of a disk, of memory or of a limit is one message with what to do, whichever library reported it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from octavo.errors import DataError
from octavo.failures import explained, out_of_memory

NUMBERS = (
    "ENOSPC EDQUOT EIO EROFS EACCES EPERM EMFILE ENFILE ENAMETOOLONG EFBIG ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY ELOOP"
)


@pytest.mark.parametrize("name", NUMBERS.split())
def test_a_number_of_the_system_names_the_file_and_what_to_do(name: str) -> None:
    number = getattr(errno, name)
    found = explained(OSError(number, os.strerror(number), "runs/a/file"))
    assert found is not None
    assert found.exit_code == 1
    assert found.message.startswith("runs/a/file cannot be read or written: ")
    assert found.hint


def test_a_number_without_a_file_is_explained_too() -> None:
    found = explained(OSError(errno.ENOSPC, "No space left on device"))
    assert found is not None
    assert "the disk is full" in found.message


@contextmanager
def limit(kind: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"x": torch.zeros(500)}, path),
        lambda path: Tokenizer(models.BPE({str(i): i for i in range(500)}, [])).save(str(path)),
        lambda path: path.write_bytes(bytes(2000)),
    ],
    ids=["safetensors", "tokenizers", "python"],
)
def test_a_disk_that_takes_no_more_in_the_words_of_each_library(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    with limit(resource.RLIMIT_FSIZE, 100), pytest.raises(Exception, match="File too large") as caught:
        write(tmp_path / "file")
    found = explained(caught.value)
    assert found is not None
    assert "a limit on the size of files" in found.message
    assert "ulimit -f" in found.hint


@pytest.mark.parametrize("writes", [lambda path: torch.from_file(str(path), size=1), lambda path: path.read_bytes()])
def test_too_many_open_files(writes: Callable[[Path], object], tmp_path: Path) -> None:
    (path := tmp_path / "numbers").write_bytes(b"0000")
    with limit(resource.RLIMIT_NOFILE, 3), pytest.raises((OSError, RuntimeError)) as caught:
        writes(path)
    found = explained(caught.value)
    assert found is not None
    assert "too many files are open" in found.message


def test_memory_that_ran_out_in_python_and_in_torch() -> None:
    for ask in (lambda: bytearray(2**62), lambda: torch.empty(2**58, dtype=torch.uint8)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            ask()
        assert out_of_memory(caught.value)
        found = explained(caught.value)
        assert found is not None
        assert found.message.startswith("Memory ran out")
        assert "ulimit" in found.hint


def test_a_full_disk_behind_another_error_is_what_counts() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        except OSError as error:
            raise KeyError("consequence") from error
    except KeyError as error:
        found = explained(error)
    assert found is not None
    assert "the disk is full" in found.message


def test_a_fault_of_the_program_is_not_explained() -> None:
    met = KeyError("a fault that met another on its way")
    met.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "x")
    handled = KeyError("a fault after an error that was handled")
    handled.__context__ = DataError("handled")
    assert explained(handled) is None
    for error in (
        met,
        AssertionError("x"),
        ValueError("out of range"),
        RuntimeError("shapes differ"),
        KeyboardInterrupt(),
    ):
        assert explained(error) is None


def test_an_error_of_octavos_stays_what_it_is() -> None:
    error = DataError("not text", source="a.txt")
    assert explained(error) is error


def test_long_words_are_cut() -> None:
    found = explained(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000))
    assert found is not None
    assert len(found.message) < 300
    found = explained(OSError("y" * 5000))
    assert found is not None
    assert len(found.message) < 300
