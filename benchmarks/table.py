"""benchmarks/results.csv -> the table of benchmarks/README.md.

    python benchmarks/table.py [--results benchmarks/results.csv] [--readme benchmarks/README.md]

Prints the newest row of each (way, model, batch, seq_len, cap). Writes the most important columns between
the two lines `<!-- benchmark table -->` of the readme if it has them, fastest first within a setting. Imports neither
torch nor octavo.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
META_RESULTS = ROOT / "benchmarks" / "results.csv"
MARKER = "<!-- benchmark table -->"
COLUMNS = (
    "date", "way", "model", "scheme", "batch", "seq_len", "tokens_per_second", "p10", "p90", "seconds",
    "peak_allocated_gib", "peak_reserved_gib", "load_reserved_gib", "device_used_gib", "pinned_gib", "first_loss",
    "loss_gap", "cosine", "cosine_min", "cosine_median", "trainable_parameters", "cap_gib", "steps", "warmup", "card",
    "torch", "transformers", "peft", "bitsandbytes", "octavo", "commit", "command", "note",
)  # fmt: skip
KEY = ("way", "model", "batch", "seq_len", "cap_gib")
VERSIONS = ("card", "torch", "transformers", "peft", "bitsandbytes")
TITLES = (
    "model", "way", "batch x tokens", "cap GiB", "tokens/s", "p10-p90", "allocated GiB", "reserved GiB",
    "with loading GiB", "first loss", "least gradient cosine", "note",
)  # fmt: skip
BRIEF = ("model", "batch x tokens", "cap GiB", "way", "tokens/s", "reserved GiB", "pinned GiB", "first loss", "commit")

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=META_RESULTS)
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    asked = parser.parse_args()
    rows = read(asked.results)
    sys.stdout.write(markdown(rows))
    if asked.readme.is_file() and asked.readme.read_text("utf-8").count(MARKER) == 2:
        asked.readme.write_text(put(asked.readme.read_text("utf-8"), brief(rows)), "utf-8")
        sys.stdout.write(f"\nwritten to {asked.readme}\n")


def check(path: Path) -> None:
    """ValueError if `path` is a table with other columns: rows would land under wrong names."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8") as file:
        found = next(csv.reader(file))
    if tuple(found) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes: move it away or use another --out")


def append(path: Path, row: Row, columns: Sequence[str] = COLUMNS) -> None:
    """One more line; the file and its head are made if need be. Unknown keys are an error, missing ones empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({name: "" if value is None else value for name, value in row.items()})


def read(path: Path) -> list[dict[str, str]]:
    """The rows, oldest first."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        last[tuple(str(row[name]) for name in KEY)] = row
    return list(last.values())


def markdown(rows: Sequence[Row]) -> str:
    """A table for each set of versions and card, each under a line that says which."""
    kept = newest(rows)
    blocks = []
    for versions in dict.fromkeys(tuple(str(row[name]) for name in VERSIONS) for row in kept):
        lines = [line_of(row) for row in kept if tuple(str(row[name]) for name in VERSIONS) == versions]
        card, *numbers = versions
        said = ", ".join(f"{name} {number}" for name, number in zip(VERSIONS[1:], numbers, strict=True) if number)
        head = [f"{card}; {said}." if said else f"{card}.", "", _row(TITLES), _row(["---"] * len(TITLES))]
        blocks.append("\n".join([*head, *map(_row, lines)]) + "\n")
    return "\n".join(blocks)


def brief(rows: Sequence[Row]) -> str:
    """The table for the readme: speed, memory and first loss; the rows that only compared gradients are left out."""
    told = [row for row in newest(rows) if row["tokens_per_second"] not in ("", None) or "out of memory" in row["note"]]
    told = [row for row in told if not row["seconds"]]  # a job's own speed is no step's
    told.sort(key=lambda row: (*_setting(row), -float(row["tokens_per_second"] or 0)))
    lines = []
    for row in told:
        speed = _whole(row["tokens_per_second"]) or "out of memory"
        cap = f"{float(row['cap_gib']):g}" if row["cap_gib"] else ""
        way = f"**{row['way']}**" if str(row["way"]).startswith("octavo") else str(row["way"])
        cells = [str(row["model"]), f"{row['batch']} x {row['seq_len']}", cap, way, speed]
        pinned = _decimal(row["pinned_gib"], 2) if float(row["pinned_gib"] or 0) else ""
        loss = _decimal(row["first_loss"], 4)
        lines.append([*cells, _decimal(row["peak_reserved_gib"], 2), pinned, loss, str(row["commit"])])
    cards = ", ".join(dict.fromkeys(str(row["card"]) for row in told))
    head = [f"{cards}:", "", _row(BRIEF), _row(["---"] * len(BRIEF))]
    return "\n".join([*head, *map(_row, lines)]) + "\n"


def _setting(row: Row) -> tuple[str, float, float, float]:
    """By model, tokens in a batch, tokens in a row, cap: largest room first."""
    batch, length = float(row["batch"]), float(row["seq_len"])
    return str(row["model"]), batch * length, length, -float(row["cap_gib"] or 1e9)


def line_of(row: Row) -> list[str]:
    """The cells of a row under TITLES."""
    spread = f"{_whole(row['p10'])}-{_whole(row['p90'])}" if row["p10"] not in ("", None) else ""
    seconds = f"{_whole(row['seconds'])} s in all" if row["seconds"] not in ("", None) else ""
    note = "; ".join(part for part in (seconds, str(row["note"] or "").split("\n")[0]) if part)
    return [
        str(row["model"]),
        str(row["way"]),
        f"{row['batch']} x {row['seq_len']}",
        str(row["cap_gib"] or ""),
        _whole(row["tokens_per_second"]),
        spread,
        *(_decimal(row[name], 2) for name in ("peak_allocated_gib", "peak_reserved_gib", "load_reserved_gib")),
        _decimal(row["first_loss"], 4),
        _decimal(row["cosine_min"], 4),
        note.replace("|", "/"),
    ]


def put(text: str, table: str) -> str:
    """`text` with `table` between its two markers."""
    before, _, after = text.split(MARKER)
    return f"{before}{MARKER}\n{table}{MARKER}{after}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _whole(value: Any) -> str:
    return f"{float(value):,.0f}" if value not in ("", None) else ""


def _decimal(value: Any, digits: int) -> str:
    return f"{float(value):.{digits}f}" if value not in ("", None) else ""


if __name__ == "__main__":
    main()
