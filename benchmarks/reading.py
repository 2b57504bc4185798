"""Measures reading and tokenization of text: `python benchmarks/reading.py --text FOLDER..`.

All .txt, .md, .rst and .py files below the folders are concatenated to `--mb` megabytes, repeated if necessary. The
script reads and encodes this text as `octavo data` does. For comparison the tokenizer's `encode` encodes the first
`--plain-mb` megabytes; its speed does not depend on the amount. `first_progress_seconds` is the time from the start of
reading to the first update of the progress bar. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from measure import PACKAGES, version_of
from octavo.data.documents import read
from octavo.data.tokens import characters, encode_all
from octavo.hardware import pick
from octavo.store.resolve import open_source

SUFFIXES = (".txt", ".md", ".rst", ".py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="model whose tokenizer is measured")
    add("--text", nargs="+", type=Path, required=True, help="folders of text files")
    add("--mb", type=float, default=110.0, help="megabytes of text")
    add("--plain-mb", type=float, default=4.0, help="megabytes for the tokenizer's `encode`")
    args = parser.parse_args()
    tokenizer = open_source(args.model).tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        distinct = write_text(file, args.text, round(args.mb * 1e6))
        began = time.perf_counter()
        first: list[float] = []

        def progress(_: int) -> None:
            if not first:
                first.append(time.perf_counter() - began)

        documents = read([str(file)]).documents
        after_reading = time.perf_counter()
        encoded = encode_all(documents, tokenizer, progress=progress)
        ended = time.perf_counter()
        text = documents[0].text
        part = text[: round(args.plain_mb * 1e6)]
        plain_began = time.perf_counter()
        plain = tokenizer.backend_tokenizer.encode(part, add_special_tokens=False)
        plain_seconds = time.perf_counter() - plain_began
        size = file.stat().st_size
    # The end of `part` may cut a word: the last ids may differ.
    same = encoded[0].ids[: len(plain.ids) - 8].tolist() == plain.ids[:-8]
    speed, plain_speed = size / (ended - began) / 1e6, len(part.encode()) / plain_seconds / 1e6
    sys.stdout.write(
        json.dumps(
            {
                "megabytes": size / 1e6, "megabytes_distinct": distinct / 1e6, "characters": characters(documents[0]),
                "tokens": len(encoded[0].ids), "read_seconds": after_reading - began, "seconds": ended - began,
                "first_progress_seconds": first[0], "megabytes_per_second": speed,
                "tokenizer_megabytes_per_second": plain_speed, "times_the_tokenizer": speed / plain_speed,
                "same_ids": same, "device": pick("cpu", "float32").name,
                **{name: version_of(name) for name in PACKAGES}, "command": sys.argv[1:],
            }
        )
        + "\n"
    )  # fmt: skip


def write_text(file: Path, folders: list[Path], size: int) -> int:
    """Writes `size` bytes; returns how many of them are not repeated."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in SUFFIXES)
    distinct = written = 0
    with file.open("wb") as out:
        while written < size:
            for path in files:
                content = path.read_bytes().decode("utf-8", "ignore").replace("\0", "").encode()[: size - written]
                written += out.write(content)
            distinct = distinct or written
            if not written:
                raise SystemExit(f"No text below {', '.join(map(str, folders))}.")
    return distinct


if __name__ == "__main__":
    main()
