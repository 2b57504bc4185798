"""Turns errors of the operating system and of libraries into messages with a hint.

A full disk, a read-only folder, exhausted memory or a limit on open files can end any command at any line, so they are
explained here and not where they occur. Python, safetensors and tokenizers (Rust) and PyTorch (C++) report them with
different exception classes and texts.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from subprocess import CalledProcessError

from octavo.errors import OctavoError

MOST_SHOWN = 200  # characters of a library's message or a path

# Texts with which libraries report exhausted memory: PyTorch's allocators, oneDNN, CUDA, C++, the dynamic loader.
OUT_OF_MEMORY = (
    "out of memory", "ALLOC_FAILED", "can't allocate memory", "could not create a primitive",
    "could not create a memory", "Cannot allocate memory", "cannot allocate memory", "bad_alloc",
    "failed to map segment", "memory allocation of",
)  # fmt: skip
_TOO_MANY_THREADS = ("can't start new thread", "Resource temporarily unavailable")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # the format of Rust libraries
# Error codes for which PyTorch and the dynamic loader report only the text.
_MESSAGES = {
    code: os.strerror(code)
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
}

_AGAIN = "then run the command again; resume a training run with --resume."
_MEMORY_HINT = (
    "Try a smaller --batch-size or --seq-len, or --scheme nf4, close other programs, or raise the limit (`ulimit -v`); "
    + _AGAIN
)
_GPU_MEMORY_HINT = (
    "Try a smaller --batch-size or --seq-len, or --scheme nf4, end other programs that use the GPU, or raise "
    "--gpu-memory if it is given; " + _AGAIN
)
# Texts with which CUDA and Triton report that the machine lacks something for its GPU: (text, message, hint).
_NO_KERNELS = "--no-kernels uses PyTorch's functions in place of octavo's kernels."
_GPU_SETUP = (
    (
        "no kernel image is available for execution on the device",
        "A library has no code for this GPU",
        "Install the build of PyTorch for this GPU (README.md, Install) and that of the library, if it is another "
        f"one. {_NO_KERNELS}",
    ),
    (
        "is not defined for option 'gpu-name'",
        "The installed Triton cannot compile for this GPU",
        f"Install a version of PyTorch whose Triton supports it. {_NO_KERNELS}",
    ),
    (
        "Failed to find C compiler",
        "Triton needs a C compiler to start kernels",
        f"Install one (`apt install gcc`) or set CC to its path. {_NO_KERNELS}",
    ),
    (
        "driver version is insufficient for CUDA runtime version",
        "The NVIDIA driver is too old for the installed PyTorch",
        "Update the driver, or install PyTorch's build for an older CUDA version (README.md, Install).",
    ),
)
# Files that Triton compiles with Python's headers. The compiler's message is on stderr, its command in the error.
_TRITON_FILES = ("__triton_launcher", "cuda_utils")
_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", f"Free disk space (see `df -h` and `df -i`), {_AGAIN}"),
    errno.EDQUOT: ("your quota on this disk is used up", f"Free disk space, {_AGAIN}"),
    errno.EFBIG: ("the file exceeds the file size limit", f"Raise the limit (`ulimit -f`), {_AGAIN}"),
    errno.EIO: ("the disk failed to read or write", f"Check the disk or copy the folder to another one, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", "Choose a writable folder with --out."),
    errno.EACCES: ("permission denied", "Change the permissions, or choose another folder with --out."),
    errno.EPERM: ("operation not permitted", "Change the permissions, or choose another folder with --out."),
    errno.EMFILE: ("too many files are open in this process", f"Raise the limit (`ulimit -n 4096`), {_AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"Close other programs, {_AGAIN}"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter name with --out."),
    errno.ENOENT: ("it does not exist", "Check whether the folder was moved or deleted while it was in use."),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Choose another path."),
    errno.EISDIR: ("it is a folder, not a file", "Choose another path."),
    errno.EEXIST: ("it already exists", "Choose another path."),
    errno.ENOTEMPTY: ("the folder is not empty", "Choose another path."),
    errno.ELOOP: ("its symbolic links form a loop", "Choose another path."),
}  # fmt: skip


def explained(error: BaseException) -> OctavoError | None:
    """`error` as an OctavoError with a hint, if its cause is a disk, memory or a system limit; else None.

    Explains the first exception in the chain that can be explained: any OSError, others by their text.
    """
    if isinstance(error, OctavoError):
        return error
    for current in _chain(error):
        if (explanation := _explained(current, first=current is error)) is not None:
            return explanation
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, in Python, PyTorch's allocators or a library."""
    is_torch_oom = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing it
    return is_torch_oom or isinstance(error, MemoryError) or any(phrase in str(error) for phrase in OUT_OF_MEMORY)


def cut(text: object, most: int = MOST_SHOWN) -> str:
    """`text`, truncated with dots to at most `most` characters."""
    string = str(text)
    return string if len(string) <= most else f"{string[: most - 3]}..."


def _explained(error: BaseException, *, first: bool) -> OctavoError | None:
    code = _number(error)
    if isinstance(error, MemoryError) or code == errno.ENOMEM:
        return OctavoError("Memory ran out.", hint=_MEMORY_HINT)
    if isinstance(error, OSError) and (first or code in _MESSAGES):
        return _system(error, code)
    if isinstance(error, OSError) or type(error).__module__.startswith("octavo."):
        return None
    if code is not None:
        return _system(error, code)
    if type(error).__name__ == "OutOfMemoryError":
        return OctavoError(f"The memory of the GPU ran out: {_first_sentences(error)}", hint=_GPU_MEMORY_HINT)
    if isinstance(error, RuntimeError | ImportError | SystemError) and out_of_memory(error):
        return OctavoError(f"Memory ran out: {cut(_first_line(error))}", hint=_MEMORY_HINT)
    if isinstance(error, Exception) and (explanation := _gpu_setup(error)) is not None:
        return explanation
    if isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _TOO_MANY_THREADS):
        return OctavoError(
            f"The system allows no further threads or processes: {cut(_first_line(error))}",
            hint=f"Close other programs or raise the limit (`ulimit -u`), {_AGAIN}",
        )
    return None


def _gpu_setup(error: Exception) -> OctavoError | None:
    """An error of CUDA or Triton about what the machine lacks. Triton's errors are of its own class."""
    if isinstance(error, CalledProcessError) and any(name in str(error) for name in _TRITON_FILES):
        return OctavoError(
            f"The C compiler cannot compile Triton's code: {cut(_first_line(error))}",
            hint=f"Install Python's headers (`apt install python3-dev`). {_NO_KERNELS}",
        )
    for phrase, message, hint in _GPU_SETUP:
        if line := next((line.strip() for line in str(error).splitlines() if phrase in line), ""):
            return OctavoError(f"{message}: {cut(line)}", hint=hint)
    return None


def _system(error: BaseException, code: int | None) -> OctavoError:
    path = getattr(error, "filename2", None) or getattr(error, "filename", None)
    name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
    if code is None:
        text = cut(_first_line(error) or type(error).__name__)
        return OctavoError(f"{cut(name)}: {text}" if name else f"A system call failed: {text}")
    reason, hint = _SYSTEM.get(code, (os.strerror(code).lower(), ""))
    if name:
        return OctavoError(f"{cut(name)} cannot be read or written: {reason}.", hint=hint)
    # Libraries and file objects do not name the file, so the message contains their text.
    return OctavoError(f"A file cannot be read or written: {reason} ({cut(_first_line(error))}).", hint=hint)


def _number(error: BaseException) -> int | None:
    """The errno of an error, from its attribute or from the text of a library's message."""
    if isinstance(error, OSError):
        return error.errno
    if not isinstance(error, Exception):
        return None
    text = str(error)
    if match := _OS_ERROR.search(text):
        return int(match[1])
    return next((code for code, phrase in _MESSAGES.items() if phrase in text), None)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _first_sentences(error: BaseException, most: int = 2) -> str:
    """Of PyTorch's message the error and its size; the rest lists processes by their numbers."""
    return " ".join(re.split(r"(?<=\.) (?=[A-Z])", _first_line(error))[:most])


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then its causes and contexts."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
