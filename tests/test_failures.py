"""Disk, memory and limit errors of every library become one message with a hint."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from octavo.errors import DataError
from octavo.failures import explained, out_of_memory

ERROR_CODES = (
    "ENOSPC EDQUOT EIO EROFS EACCES EPERM EMFILE ENFILE ENAMETOOLONG EFBIG ENOENT ENOTDIR EISDIR EEXIST ENOTEMPTY ELOOP"
)


@pytest.mark.parametrize("name", ERROR_CODES.split())
def test_every_error_code_has_a_message_with_the_file_and_a_hint(name: str) -> None:
    number = getattr(errno, name)
    explanation = explained(OSError(number, os.strerror(number), "runs/a/file"))
    assert explanation is not None
    assert explanation.exit_code == 1
    assert explanation.message.startswith("runs/a/file cannot be read or written: ")
    assert explanation.hint


def test_an_error_without_a_file_name_is_explained() -> None:
    explanation = explained(OSError(errno.ENOSPC, "No space left on device"))
    assert explanation is not None
    assert "the disk is full" in explanation.message


@contextmanager
def limit(kind: int, most: int) -> Iterator[None]:
    previous = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, previous)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"x": torch.zeros(500)}, path),
        lambda path: Tokenizer(models.BPE({str(i): i for i in range(500)}, [])).save(str(path)),
        lambda path: path.write_bytes(bytes(2000)),
    ],
    ids=["safetensors", "tokenizers", "python"],
)
def test_a_full_disk_reported_by_each_library(write: Callable[[Path], object], tmp_path: Path) -> None:
    with limit(resource.RLIMIT_FSIZE, 100), pytest.raises(Exception, match="File too large") as caught:
        write(tmp_path / "file")
    explanation = explained(caught.value)
    assert explanation is not None
    assert "file size limit" in explanation.message
    assert "ulimit -f" in explanation.hint


@pytest.mark.parametrize("read", [lambda path: torch.from_file(str(path), size=1), lambda path: path.read_bytes()])
def test_too_many_open_files(read: Callable[[Path], object], tmp_path: Path) -> None:
    (path := tmp_path / "numbers").write_bytes(b"0000")
    with limit(resource.RLIMIT_NOFILE, 3), pytest.raises((OSError, RuntimeError)) as caught:
        read(path)
    explanation = explained(caught.value)
    assert explanation is not None
    assert "too many files are open" in explanation.message


def test_out_of_memory_in_python_and_torch() -> None:
    for allocate in (lambda: bytearray(2**62), lambda: torch.empty(2**58, dtype=torch.uint8)):
        with pytest.raises((MemoryError, RuntimeError)) as caught:
            allocate()
        assert out_of_memory(caught.value)
        explanation = explained(caught.value)
        assert explanation is not None
        assert explanation.message.startswith("Memory ran out")
        assert "ulimit" in explanation.hint


def test_a_full_gpu_is_named_without_the_list_of_processes() -> None:
    text = "CUDA out of memory. Tried to allocate 48.00 MiB. GPU 0 has a total capacity of 139.80 GiB. Process 1084 has"
    explanation = explained(torch.OutOfMemoryError(text))
    assert explanation is not None
    assert explanation.message == "The memory of the GPU ran out: CUDA out of memory. Tried to allocate 48.00 MiB."
    assert "--gpu-memory" in explanation.hint
    assert "ulimit" not in explanation.hint


def test_the_cause_of_another_error_is_explained() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        except OSError as error:
            raise KeyError("consequence") from error
    except KeyError as error:
        explanation = explained(error)
    assert explanation is not None
    assert "the disk is full" in explanation.message


def test_a_bug_is_not_explained() -> None:
    bug = KeyError("a bug raised during another error")
    bug.__context__ = FileNotFoundError(errno.ENOENT, "No such file", "x")
    after_handled_error = KeyError("a bug after a handled error")
    after_handled_error.__context__ = DataError("handled")
    assert explained(after_handled_error) is None
    for error in (
        bug,
        AssertionError("x"),
        ValueError("out of range"),
        RuntimeError("shapes differ"),
        KeyboardInterrupt(),
    ):
        assert explained(error) is None


def test_an_octavo_error_is_returned_unchanged() -> None:
    error = DataError("not text", source="a.txt")
    assert explained(error) is error


def test_long_texts_are_truncated() -> None:
    explanation = explained(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000))
    assert explanation is not None
    assert len(explanation.message) < 300
    explanation = explained(OSError("y" * 5000))
    assert explanation is not None
    assert len(explanation.message) < 300


class PTXASError(Exception):
    """As Triton's: its own class, derived from Exception alone."""


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"),
            "no code for this GPU", "build of PyTorch for this GPU",
        ),
        (
            PTXASError("PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\nptxas fatal   : Value 'sm_60' "
            "is not defined for option 'gpu-name'\nRepro command: ptxas"),
            "cannot compile for this GPU: ptxas fatal   : Value 'sm_60'", "--no-kernels",
        ),
        (
            RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set "),
            "needs a C compiler", "gcc",
        ),
        *(
            (
                CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/main.c", "-o", f"/tmp/x/{name}.cpython-311.so"]),
                "cannot compile Triton's code", "python3-dev",
            )
            for name in ("cuda_utils", "__triton_launcher")
        ),
        (
            RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"),
            "driver is too old", "Update the driver",
        ),
    ],
)  # fmt: skip
def test_what_a_machine_lacks_for_its_gpu_is_explained(error: Exception, message: str, hint: str) -> None:
    explanation = explained(error)
    assert explanation is not None
    assert message in explanation.message
    assert hint in explanation.hint
    assert explanation.exit_code == 1


@pytest.mark.parametrize("name", ["cuda_utils", "__triton_launcher"])
@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError, ModuleNotFoundError])
def test_an_error_that_only_has_the_name_of_a_file_of_triton_is_not_of_the_c_compiler(
    kind: type[Exception], name: str
) -> None:
    assert explained(kind(f"/home/me/{name}/x.jinja is no template")) is None
