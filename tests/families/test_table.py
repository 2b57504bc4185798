"""docs/families.md has a row for every family, a column for every property, and no cell that is not a pass."""

from __future__ import annotations

import re
from pathlib import Path

from tests.families.models import CONFIGS, MODEL_TYPES
from tests.families_table import COLUMNS, document, rows

TEXT = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, dict[str, str]]:
    """The cells by row and column."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[2:], row[2:], strict=True)) for row in body if len(row) == len(head)}


def test_every_family_has_a_row_of_passes() -> None:
    assert table(TEXT) == {family: dict.fromkeys(COLUMNS, "yes") for family in MODEL_TYPES}
    assert set(MODEL_TYPES) == set(rows()) <= CONFIGS.keys()


def test_the_page_is_as_it_would_be_written_now_but_for_its_results() -> None:
    """All but the line that counts the tests is decided by the code."""
    passed = {(family, column): [True] for family in MODEL_TYPES for column in COLUMNS}
    written, expected = (re.sub(r"[\d,]+ tests", "N tests", text) for text in (TEXT, document(passed)))
    assert written == expected
    assert "the order of the rows of a tensor cannot be checked" in TEXT


def test_a_failed_or_missing_test_is_not_a_pass() -> None:
    passed = {(family, column): [True, True] for family in MODEL_TYPES for column in COLUMNS}
    assert document(passed).count(" yes |") == len(passed)
    failed = passed | {("llama", "logits"): [True, False]}
    del failed["phi3", "plan"]
    cells = table(document(failed))
    assert (cells["llama"]["logits"], cells["phi3"]["plan"]) == ("no", "not tested")
