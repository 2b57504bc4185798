"""commands/finetune/held_out_size.py: a run says at its start that its held-out text is too small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.commands.finetune.conftest import Settings

from octavo.commands.finetune.held_out_size import counts_of, warn_if_small
from octavo.commands.finetune.prepare import prepare
from octavo.data.packing import IGNORE_INDEX, Row
from octavo.reporting import Report


def row_of(*documents: int, masked: int | None = None) -> Row:
    """A row with 2 positions of each document; those of `masked` have no label."""
    piece = np.repeat(np.arange(len(documents)), 2).astype(np.int32)
    labels = np.where(np.array(documents)[piece] == masked, IGNORE_INDEX, 5).astype(np.int32)
    return Row(
        np.zeros_like(piece), labels, np.zeros_like(piece), piece, tuple(f"f:{n}" for n in documents), tuple(documents)
    )


def warned(settings: Settings, folder: Path, rows: list[Row], **changes: object) -> list[str]:
    found: list[str] = []
    with Report(console=False) as report:
        report.observer = lambda record: found.append(str(record["text"])) if record["event"] == "warn" else None
        warn_if_small(settings(folder, **changes), rows, report)
    return found


def test_documents_without_a_label_do_not_count() -> None:
    assert counts_of([row_of(0, 1), row_of(1, 2, masked=2)]) == (2, 2)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row_of(0, 1), row_of(2)], ["3 documents in 2 rows", "needs 10 documents or rows", "cannot show"]),
        ([row_of(0)] * 12, ["1 document in 12 rows", "will be wide", "20 documents or more"]),
        ([row_of(*range(15))], ["15 documents in 1 row", "will be wide"]),
    ],
)
def test_a_small_text_has_one_warning_with_what_to_do(
    settings: Settings, tmp_path: Path, rows: list[Row], words: list[str]
) -> None:
    [text] = warned(settings, tmp_path, rows)
    assert all(word in text for word in words)
    assert text.endswith("Give more with --test-data.")
    assert warned(settings, tmp_path, rows, test_data=[])[0].endswith("or raise --test-fraction, which is 0.05.")
    [limited] = warned(settings, tmp_path, rows, eval_rows=len(rows))
    assert f"--eval-rows {len(rows)} takes no more rows" in limited


@pytest.mark.parametrize("rows", [[row_of(*range(20))], [row_of(0)] * 20, []])
def test_enough_text_has_none_and_a_run_without_held_out_text_has_its_own(
    settings: Settings, tmp_path: Path, rows: list[Row]
) -> None:
    assert warned(settings, tmp_path, rows) == []


def test_a_run_says_it_before_it_trains(settings: Settings, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the king of york")
    found: list[str] = []
    with Report(console=False) as report:
        report.observer = lambda record: found.append(str(record["text"])) if record["event"] == "warn" else None
        prepare(settings(tmp_path / "run", test_data=[str(short)]), report)
    assert sum("1 document in 1 row" in text for text in found) == 1
