"""The text plot: every curve goes through its points, and curves that meet are marked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.commands.compare.plot import SEVERAL, text_plot

POINTS = st.lists(
    st.tuples(st.integers(0, 10**6).map(float), st.floats(-1e6, 1e6)), min_size=1, max_size=12, unique_by=lambda p: p[0]
)


def grid(plot: str) -> list[str]:
    return [line.partition("|")[2] for line in plot.splitlines() if "|" in line]


def test_a_falling_line_is_a_diagonal() -> None:
    rows = grid(text_plot([("A", [(0, 1.0), (10, 0.0)])], width=11, height=11))
    assert rows == [" " * number + "A" for number in range(11)]


def test_curves_that_meet_are_marked() -> None:
    rows = grid(text_plot([("A", [(0, 0.0), (10, 1.0)]), ("B", [(0, 1.0), (10, 0.0)])], width=11, height=11))
    assert rows[5] == " " * 5 + SEVERAL
    assert rows[0] == "B" + " " * 9 + "A"
    assert sum(row.count(SEVERAL) for row in rows) == 1


def test_a_curve_ends_at_its_last_step() -> None:
    rows = grid(text_plot([("A", [(0, 1.0), (10, 1.0)]), ("B", [(0, 2.0), (5, 2.0)])], width=11, height=5))
    assert "B" * 6 in [row.strip() for row in rows]


def test_axes_have_the_first_and_last_step_and_round_ticks() -> None:
    plot = text_plot([("A", [(0, 4.2), (1500, 3.1)])])
    assert plot.splitlines()[-1].split() == ["0", "step", "1,500"]
    assert [line.partition("|")[0].strip() for line in plot.splitlines() if line[:5].strip()][:1] == ["4.500"]


def test_no_points_no_plot() -> None:
    assert text_plot([("A", []), ("B", [])]) == ""


@given(POINTS, POINTS)
def test_any_points_fit(a: list[tuple[float, float]], b: list[tuple[float, float]]) -> None:
    plot = text_plot([("A", a), ("B", b)], width=30, height=7)
    rows = grid(plot)
    assert len(rows) == 7
    assert max(map(len, rows)) <= 30
    assert any("A" in row or SEVERAL in row for row in rows)
    assert any("B" in row or SEVERAL in row for row in rows)
