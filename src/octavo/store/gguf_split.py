"""GGUF models in several files, NAME-00001-of-00003.gguf. The first has the metadata; each has some of the tensors."""

from __future__ import annotations

import re
from pathlib import Path

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.store.gguf_header import Header, read_header

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MOST_PARTS = 1000


def read_parts(path: Path) -> tuple[Header, list[Path]]:
    """(header, files) of a GGUF model, given its file or any one of its parts.

    Raises ModelError as `read_header` does, and if a part is missing or belongs to another model.
    """
    header = read_header(path)
    count = header.metadata.get("split.count", 0)
    if count in (0, 1):
        return header, [path]
    name = _NAME.fullmatch(path.name)
    if type(count) is not int or not 1 < count <= MOST_PARTS:
        raise ModelError(f"{path}: split.count is {shown(count)}; it must be a number up to {MOST_PARTS:,}.")
    if name is None or int(name["count"]) != count:
        raise ModelError(
            f"{path} is one of {count} parts of a model, but is not named so.",
            hint=f"Give the parts the names they were published with, NAME-00001-of-{count:05d}.gguf and so on.",
        )
    files = [path.with_name(f"{name['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts of a model; missing next to it: {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3:,} more' if len(missing) > 3 else ''}.",
            hint="Fetch all parts into one folder.",
        )
    return _joined(files, [header if file == path else read_header(file) for file in files]), files


def _joined(files: list[Path], headers: list[Header]) -> Header:
    """The header of all parts together: the metadata of the first one, and all tensors with their files."""
    first = headers[0]
    tensors = dict(first.tensors)
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        part = header.metadata.get("split.no"), header.metadata.get("split.count")
        if part != (number, len(files)):
            raise ModelError(
                f"{file} says that it is part {shown(part[0])} of {shown(part[1])}, not {number} of {len(files)} "
                "(counted from 0).",
                hint="Are all parts of the same model, and complete?",
            )
        if number and (duplicates := tensors.keys() & header.tensors.keys()):
            raise ModelError(f"{file}: the tensor {min(duplicates)} is in another part too.")
        tensors |= header.tensors
    total = first.metadata.get("split.tensors.count")
    if total is not None and total != len(tensors):
        raise ModelError(
            f"{files[0]} says that the model has {shown(total)} tensors; its parts hold {len(tensors):,}.",
            hint="Are all parts of the same model, and complete?",
        )
    return Header(path=first.path, metadata=first.metadata, tensors=tensors)
