"""What most readers do not need, folded at the end of a report: ledger, warnings, settings, hardware, versions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from octavo.bounded_json import JsonError, parse
from octavo.errors import DataError
from octavo.html_report.elements import folded, section, table, text
from octavo.html_report.paths import last_name, without_folders
from octavo.runs.events import Event, Hardware, Versions, Warn, last, only

_LINE = re.compile(r"^([a-z_0-9]+: |- )(['\"]?)(.*)$")  # of config.yaml: a key or a dash, and a value on the line
MAX_FILES = 60  # rows of the ledger's table; the largest files come first


def warnings(events: Sequence[Event]) -> str:
    """Not folded."""
    items = [f"<li>{text(without_folders(event.text))}</li>" for event in only(events, Warn)]
    return section("Warnings", f'<div class="card"><ul>{"".join(items)}</ul></div>' if items else "")


def ledger_section(path: Path) -> str:
    """The account of all tokens by file; "" without ledger.json. DataError if it is none."""
    if not path.is_file():
        return ""
    try:
        ledger = parse(path.read_bytes(), strict=False)
    except JsonError as error:
        raise DataError(f"not JSON: {error}", source=str(path), hint="Delete the file and try again.") from error
    if not isinstance(ledger, dict):
        raise DataError("not a ledger", source=str(path), hint="Delete the file and try again.")
    sides = {"": ledger} if "tokens" in ledger else ledger  # else of the training and the test text
    return folded("Token ledger", "".join(_side(name, side) for name, side in sides.items() if side))


def _side(name: str, side: dict[str, Any]) -> str:
    keys: list[str] = [
        key for key in ("documents", "tokens", "trained", "masked", "left_out", "padding") if key in side
    ]
    keys += [key for key in ("repeated_bos", "copies") if side.get(key)]
    files = sorted(side.get("files", ()), key=lambda file: -file.get("tokens", 0))
    rows = [
        [last_name(str(file.get("source", ""))), *(file.get(key, "") for key in keys)] for file in files[:MAX_FILES]
    ]
    if len(files) > MAX_FILES:
        rows.append([f"and {len(files) - MAX_FILES:,} smaller files", *("" for _ in keys)])
    not_read = side.get("not_read")
    if isinstance(not_read, dict) and not_read:
        counts = ", ".join(f"{count} {kind}" for kind, count in not_read.items())
        rows.append([f"not read: {counts}", *("" for _ in keys)])
    rows.append(["all", *(side[key] for key in keys)])
    header = "file" if not name else f"{name} file"
    # Held-out tokens with a loss are not trained.
    titles = ["scored" if (name, key) == ("test", "trained") else key.replace("_", " ") for key in keys]
    return table([header, *titles], rows, text_columns=1, total=True)


def settings_section(content: str) -> str:
    lines = [_LINE.sub(lambda found: found[1] + found[2] + last_name(found[3]), line) for line in content.splitlines()]
    shortened = without_folders("\n".join(lines).strip())
    body = f'<div class="card"><pre>{text(shortened)}</pre></div>'
    return folded("Settings", body) if content.strip() else ""


def facts(events: Sequence[Event]) -> str:
    """The hardware, and the versions of the libraries."""
    return folded("Hardware", _fields(last(events, Hardware))) + folded("Versions", _fields(last(events, Versions)))


def _fields(event: Event | None) -> str:
    """A table of the fields of an event and their values."""
    rows = [[key.replace("_", " "), value] for key, value in (asdict(event) if event else {}).items() if value]
    return table((), rows, text_columns=2) if rows else ""
