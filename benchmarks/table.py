"""Writes the table of benchmarks/README.md from benchmarks/results.csv.

    python benchmarks/table.py [--results benchmarks/results.csv] [--readme benchmarks/README.md]

Prints the newest row of each (method, model, batch, seq_len, cap), and of each GPU as which rows ran. Writes the main
columns between the two lines `<!-- benchmark table -->` of the README, in order of speed within a setting; the rows of
another file than results.csv only into the README that --readme names. Imports neither torch nor octavo.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.csv"
README = ROOT / "benchmarks" / "README.md"
MARKER = "<!-- benchmark table -->"
COLUMNS = (
    "date", "method", "model", "scheme", "batch", "seq_len", "tokens_per_second", "p10", "p90", "seconds",
    "peak_allocated_gib", "peak_reserved_gib", "load_reserved_gib", "device_used_gib", "pinned_gib", "first_loss",
    "loss_gap", "cosine", "cosine_min", "cosine_median", "trainable_parameters", "cap_gib", "steps", "warmup", "gpu",
    "torch", "transformers", "peft", "bitsandbytes", "octavo", "commit", "command", "note",
)  # fmt: skip
KEY = ("method", "model", "batch", "seq_len", "cap_gib")
RESTRICTED = " restricted to "  # in the column gpu of rows of --pretend, between the GPU and the one as which it ran
VERSIONS = ("gpu", "torch", "transformers", "peft", "bitsandbytes")
TITLES = (
    "model", "method", "batch x tokens", "cap GiB", "tokens/s", "p10-p90", "allocated GiB", "reserved GiB",
    "with loading GiB", "first loss", "minimum gradient cosine", "note",
)  # fmt: skip
BRIEF = (
    "model",
    "batch x tokens",
    "cap GiB",
    "method",
    "tokens/s",
    "reserved GiB",
    "pinned GiB",
    "first loss",
    "commit",
)

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, help="default: the one of this folder, for its results.csv only")
    args = parser.parse_args()
    rows = read(args.results)
    sys.stdout.write(markdown(rows))
    readme = args.readme or (README if args.results.resolve() == RESULTS.resolve() else None)
    if readme is not None:
        text = readme.read_text("utf-8")
        if text.count(MARKER) != 2:
            raise SystemExit(f"{readme} needs two lines {MARKER}, between which the table is written.")
        readme.write_text(put(text, brief(rows)), "utf-8")
        sys.stdout.write(f"\nwritten to {readme}\n")


def check(path: Path) -> None:
    """ValueError if the file `path` has other columns than COLUMNS."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file))
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes: use another --out or move the file")


def append(path: Path, row: Row, columns: Sequence[str] = COLUMNS) -> None:
    """Appends a row, to a new file after a header. An unknown key is an error; a missing key is an empty cell."""
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
    """The last row of each key, in the order of the keys' first rows."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        last[*(str(row[name]) for name in KEY), restriction(row)] = row
    return list(last.values())


def restriction(row: Row) -> str:
    """The GPU and the one as which it ran, "" for a row without a restriction: a newer one on any GPU replaces that."""
    gpu = str(row["gpu"])
    return gpu if RESTRICTED in gpu else ""


def markdown(rows: Sequence[Row]) -> str:
    """One table per GPU and set of versions, which the line above it names."""
    latest = newest(rows)
    blocks = []
    for versions in dict.fromkeys(tuple(str(row[name]) for name in VERSIONS) for row in latest):
        lines = [line_of(row) for row in latest if tuple(str(row[name]) for name in VERSIONS) == versions]
        gpu, *numbers = versions
        libraries = ", ".join(f"{name} {number}" for name, number in zip(VERSIONS[1:], numbers, strict=True) if number)
        head = [f"{gpu}; {libraries}." if libraries else f"{gpu}.", "", _row(TITLES), _row(["---"] * len(TITLES))]
        blocks.append("\n".join([*head, *map(_row, lines)]) + "\n")
    return "\n".join(blocks)


def brief(rows: Sequence[Row]) -> str:
    """The table of the README: speed, memory and first loss, without rows that only compare gradients.

    Another table follows for each GPU as which rows ran.
    """
    shown = [
        row for row in newest(rows) if row["tokens_per_second"] not in ("", None) or "out of memory" in row["note"]
    ]
    shown = [row for row in shown if not row["seconds"]]  # the speed of a job includes its loading
    shown.sort(key=lambda row: (*_setting(row), -float(row["tokens_per_second"] or 0)))
    restrictions = dict.fromkeys(sorted(map(restriction, shown))) or [""]
    return "\n".join(_brief([row for row in shown if restriction(row) == each]) for each in restrictions)


def _brief(shown: Sequence[Row]) -> str:
    """The table of rows in their order, under the names of their GPUs."""
    lines = []
    for row in shown:
        speed = _whole(row["tokens_per_second"]) or "out of memory"
        cap = f"{float(row['cap_gib']):g}" if row["cap_gib"] else ""
        method = f"**{row['method']}**" if str(row["method"]).startswith("octavo") else str(row["method"])
        cells = [str(row["model"]), f"{row['batch']} x {row['seq_len']}", cap, method, speed]
        pinned = _decimal(row["pinned_gib"], 2) if float(row["pinned_gib"] or 0) else ""
        loss = _decimal(row["first_loss"], 4)
        lines.append([*cells, _decimal(row["peak_reserved_gib"], 2), pinned, loss, str(row["commit"])])
    gpus = ", ".join(dict.fromkeys(str(row["gpu"]) for row in shown))
    head = [f"{gpus}:", "", _row(BRIEF), _row(["---"] * len(BRIEF))]
    return "\n".join([*head, *map(_row, lines)]) + "\n"


def _setting(row: Row) -> tuple[str, float, float, float]:
    """Sort key: model, tokens of a batch, seq_len, cap in descending order (no cap first)."""
    batch, length = float(row["batch"]), float(row["seq_len"])
    return str(row["model"]), batch * length, length, -float(row["cap_gib"] or 1e9)


def line_of(row: Row) -> list[str]:
    """The cells of a row under TITLES."""
    spread = f"{_whole(row['p10'])}-{_whole(row['p90'])}" if row["p10"] not in ("", None) else ""
    seconds = f"{_whole(row['seconds'])} s in total" if row["seconds"] not in ("", None) else ""
    note = "; ".join(part for part in (seconds, str(row["note"] or "").split("\n")[0]) if part)
    return [
        str(row["model"]),
        str(row["method"]),
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
    """`text` with `table` between the two markers."""
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
