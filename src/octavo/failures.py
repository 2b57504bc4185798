"""What the operating system or a library refuses, as an error for people.

A disk that is full, a folder that is read-only, memory that runs out, a limit on open files: they can end any command
at any of its lines, so they are explained here once, and not where they are raised. Python, safetensors and tokenizers
(Rust) and PyTorch (C++) each report them in a class and in words of their own.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from octavo.errors import OctavoError

MOST_SHOWN = 200  # characters of what a library or a path says

# The words in which libraries report that memory ran out: PyTorch's allocators, oneDNN, CUDA, C++, the dynamic loader.
OUT_OF_MEMORY = (
    "out of memory", "ALLOC_FAILED", "can't allocate memory", "could not create a primitive",
    "could not create a memory", "Cannot allocate memory", "cannot allocate memory", "bad_alloc",
    "failed to map segment", "memory allocation of",
)  # fmt: skip
_TOO_MANY_THREADS = ("can't start new thread", "Resource temporarily unavailable")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust's libraries write it
# Numbers that PyTorch and the dynamic loader give in words alone.
_WORDS = {
    number: os.strerror(number)
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
}

_AGAIN = "then give the command again; a training run goes on with --resume."
_MEMORY_HINT = (
    "Try a smaller --batch or --seq-len, or --scheme nf4, end other programs, or raise the limit (`ulimit -v`); "
    + _AGAIN
)
_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", f"Make room (`df -h` and `df -i` show where), {_AGAIN}"),
    errno.EDQUOT: ("your quota on this disk is used up", f"Make room, {_AGAIN}"),
    errno.EFBIG: ("the file grew over a limit on the size of files", f"Raise it (`ulimit -f`), {_AGAIN}"),
    errno.EIO: ("the disk failed to read or write", f"Check the disk or copy the folder to another one, {_AGAIN}"),
    errno.EROFS: ("the file system is read-only", "Choose a folder that you can write to with --out."),
    errno.EACCES: ("the rights do not allow it", "Change the rights, or choose another folder with --out."),
    errno.EPERM: ("the system does not permit it", "Change the rights, or choose another folder with --out."),
    errno.EMFILE: ("too many files are open in this process", f"Raise the limit (`ulimit -n 4096`), {_AGAIN}"),
    errno.ENFILE: ("too many files are open on this machine", f"End other programs, {_AGAIN}"),
    errno.ENAMETOOLONG: ("the name is too long", "Choose a shorter name with --out."),
    errno.ENOENT: ("it does not exist, or no longer", "Was the folder moved or deleted while it was in use?"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "Choose another path."),
    errno.EISDIR: ("it is a folder, not a file", "Choose another path."),
    errno.EEXIST: ("there is something of that name already", "Choose another path."),
    errno.ENOTEMPTY: ("the folder holds something", "Choose another path."),
    errno.ELOOP: ("its links lead in a circle", "Choose another path."),
}  # fmt: skip


def explained(error: BaseException) -> OctavoError | None:
    """`error` as a message with what to do, if a disk, memory or a limit of the system is its cause; else None.

    Of a chain of exceptions the first that can be explained counts. Any OSError can; other classes by their words.
    """
    if isinstance(error, OctavoError):
        return error
    for each in _chain(error):
        if (found := _explained(each, first=each is error)) is not None:
            return found
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, in Python, in PyTorch's allocators or in a library."""
    kind = type(error).__name__ == "OutOfMemoryError"  # torch's, without importing it
    return kind or isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def cut(text: object, most: int = MOST_SHOWN) -> str:
    """`text` in at most `most` characters, with dots where some are left out."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 3]}..."


def _explained(error: BaseException, *, first: bool) -> OctavoError | None:
    number = _number(error)
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        return OctavoError("Memory ran out.", hint=_MEMORY_HINT)
    if isinstance(error, OSError) and (first or number in _WORDS):
        return _system(error, number)
    if isinstance(error, OSError) or type(error).__module__.startswith("octavo."):
        return None
    if number is not None:
        return _system(error, number)
    if isinstance(error, RuntimeError | ImportError | SystemError) and out_of_memory(error):
        return OctavoError(f"Memory ran out: {cut(_first_line(error))}", hint=_MEMORY_HINT)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_MANY_THREADS):
        return OctavoError(
            f"The system allows no further threads or processes: {cut(_first_line(error))}",
            hint=f"End other programs or raise the limit (`ulimit -u`), {_AGAIN}",
        )
    return None


def _system(error: BaseException, number: int | None) -> OctavoError:
    where = getattr(error, "filename2", None) or getattr(error, "filename", None)
    what = os.fsdecode(where) if isinstance(where, str | bytes | os.PathLike) else ""
    if number is None:
        said = cut(_first_line(error) or type(error).__name__)
        return OctavoError(f"{cut(what)}: {said}" if what else f"The system refused something: {said}")
    reason, hint = _SYSTEM.get(number, (os.strerror(number).lower(), ""))
    if what:
        return OctavoError(f"{cut(what)} cannot be read or written: {reason}.", hint=hint)
    # Libraries and file objects do not say which file it was: their words are all there is.
    return OctavoError(f"A file cannot be read or written: {reason} ({cut(_first_line(error))}).", hint=hint)


def _number(error: BaseException) -> int | None:
    """The system's number of an error, from its field or from the words in which a library reports it."""
    if isinstance(error, OSError):
        return error.errno
    if not isinstance(error, Exception):
        return None
    said = str(error)
    if found := _OS_ERROR.search(said):
        return int(found[1])
    return next((number for number, words in _WORDS.items() if words in said), None)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, then what it was raised from or while."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
