from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data.documents import Skipped
from octavo.data.ledger import FileLedger, total
from octavo.data.packing import IGNORE_INDEX, Row, most_documents, pack, pack_windows
from octavo.data.tokens import Tokens
from octavo.errors import UsageError

PAD = 3
BOS = (1, 2)  # some tokenizers put two tokens before a text
TraceFunction = Callable[[FrameType, str, Any], Any]


def numbered(lengths: list[int], masks: list[bool] | None = None) -> list[Tokens]:
    """Documents with distinct ids, so that each token can be located in its row."""
    documents, first = [], 100
    for line, length in enumerate(lengths):
        trained = np.ones(length, dtype=np.bool_)
        if masks:
            trained = np.resize(np.array(masks), length)
        if length:
            trained[0] = False
        ids = np.arange(first, first + length, dtype=np.int32)
        documents.append(Tokens(f"file{line % 3}", line, ids, trained, length))
        first += length
    return documents


def segments(row: Row) -> list[tuple[list[int], list[int], list[int]]]:
    """(ids, labels, positions) of each piece."""
    pieces = []
    for number in range(int(row.piece.max()) + 1):
        here = row.piece == number
        pieces.append((row.ids[here].tolist(), row.labels[here].tolist(), row.positions[here].tolist()))
    return pieces


DOCUMENTS = st.builds(
    numbered,
    st.lists(st.integers(0, 40), min_size=1, max_size=25),
    st.none() | st.lists(st.booleans(), min_size=1, max_size=7),
)


def beginning(documents: list[Tokens], begins: list[bool], bos: tuple[int, ...]) -> list[Tokens]:
    """The documents, those that `begins` selects with `bos` in place of their first ids."""
    for one, begin in zip(documents, begins, strict=False):
        if begin and len(one.ids) > len(bos):
            one.ids[: len(bos)] = bos
    return documents


def read_back(rows: list[Row], documents: list[Tokens]) -> list[list[tuple[list[int], list[int]]]]:
    """(ids, labels) of each piece of each document, in the document's order."""
    pieces: list[list[tuple[list[int], list[int]]]] = [[] for _ in documents]
    for row in rows:
        parts = segments(row)
        assert len(parts) == len(row.documents)
        for number, (ids, labels, positions) in zip(row.documents, parts, strict=True):
            assert positions == list(range(len(ids)))
            pieces[number].append((ids, labels))
    # Without BOS tokens the ids of a document increase, and its first piece alone has its first id.
    return [
        sorted(found, key=lambda piece: (piece[0] != one.ids[: len(piece[0])].tolist(), piece[0][-1]))
        for found, one in zip(pieces, documents, strict=True)
    ]


@given(
    documents=DOCUMENTS,
    begins=st.lists(st.booleans(), min_size=25, max_size=25),
    count=st.integers(0, 2),
    seq_len=st.integers(1, 16),
)
def test_each_document_is_read_back_from_rows_that_repeat_its_bos_token(
    documents: list[Tokens], begins: list[bool], count: int, seq_len: int
) -> None:
    bos = BOS[:count]
    documents = beginning(documents, begins, bos)
    starts = [bool(bos) and tuple(one.ids[:count].tolist()) == bos for one in documents]
    continued = [start and len(one.ids) - 1 > seq_len for start, one in zip(starts, documents, strict=True)]
    if seq_len <= count and any(continued):
        with pytest.raises(UsageError, match=f"rows of {seq_len} token.* cannot continue") as raised:
            pack(documents, seq_len=seq_len, pad_id=PAD, bos_ids=bos)
        assert f"at least {count + 1};" in raised.value.hint
        return
    rows, ledger = pack(documents, seq_len=seq_len, pad_id=PAD, bos_ids=bos)
    ledger.check(seq_len=seq_len)
    repeated = 0
    for one, start, pieces in zip(documents, starts, read_back(rows, documents), strict=True):
        inputs: list[int] = []
        labels: list[int] = []
        for number, (ids, following) in enumerate(pieces):
            own = count if start and number else 0
            assert ids[:own] == list(bos[:own])
            assert following[:own] == [IGNORE_INDEX] * own
            inputs, labels, repeated = inputs + ids[own:], labels + following[own:], repeated + own
        assert inputs == one.ids[:-1].tolist()
        assert labels == np.where(one.trained, one.ids, IGNORE_INDEX)[1:].tolist()
    assert ledger.repeated_bos == repeated == sum(file.repeated_bos for file in ledger.files)
    kept = [one for one in documents if len(one.ids) > 1]
    assert len(rows) * seq_len == sum(len(one.ids) - 1 for one in kept) + repeated + ledger.padding


@given(documents=DOCUMENTS, seq_len=st.integers(1, 16), truncate=st.booleans())
def test_rows_of_documents_that_do_not_begin_with_the_bos_token_do_not_change(
    documents: list[Tokens], seq_len: int, truncate: bool
) -> None:
    rows, ledger = pack(documents, seq_len=seq_len, pad_id=PAD, truncate=truncate)
    again, same = pack(documents, seq_len=seq_len, pad_id=PAD, truncate=truncate, bos_ids=BOS)
    assert ledger == same
    for name in ("ids", "labels", "positions", "piece"):
        assert [getattr(row, name).tolist() for row in rows] == [getattr(row, name).tolist() for row in again]


def test_a_continued_row_begins_with_the_bos_token_which_predicts_nothing() -> None:
    documents = beginning(numbered([8]), [True], (1,))
    rows, ledger = pack(documents, seq_len=3, pad_id=PAD, bos_ids=[1])
    assert [row.ids.tolist() for row in rows] == [[1, 101, 102], [1, 103, 104], [1, 105, 106]]
    assert [row.labels.tolist() for row in rows] == [
        [101, 102, 103],
        [IGNORE_INDEX, 104, 105],
        [IGNORE_INDEX, 106, 107],
    ]
    assert [row.positions.tolist() for row in rows] == [[0, 1, 2]] * 3
    assert (ledger.tokens, ledger.trained, ledger.masked, ledger.left_out) == (8, 7, 1, 0)
    assert (ledger.repeated_bos, ledger.padding) == (2, 0)
    truncated, ledger = pack(documents, seq_len=3, pad_id=PAD, bos_ids=[1], truncate=True)
    assert [row.ids.tolist() for row in truncated] == [[1, 101, 102]]
    assert (ledger.left_out, ledger.repeated_bos) == (4, 0)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 16))
def test_every_token_but_the_first_is_a_target_exactly_once(documents: list[Tokens], seq_len: int) -> None:
    rows, ledger = pack(documents, seq_len=seq_len, pad_id=PAD)
    labels = sorted(label for row in rows for label in row.labels.tolist() if label != IGNORE_INDEX)
    expected = [number for one in documents if len(one.ids) > 1 for number in one.ids[one.trained].tolist()]
    assert labels == expected
    assert ledger.trained == len(expected)
    # Inputs are every token but a document's last, each once.
    inputs = sorted(number for row in rows for ids, _, _ in segments(row) for number in ids)
    assert inputs == [number for one in documents for number in one.ids[:-1].tolist()]


@given(documents=DOCUMENTS, seq_len=st.integers(1, 16), truncate=st.booleans())
def test_a_piece_is_consecutive_tokens_of_one_document_and_padding_has_no_targets(
    documents: list[Tokens], seq_len: int, truncate: bool
) -> None:
    rows, _ = pack(documents, seq_len=seq_len, pad_id=PAD, truncate=truncate)
    following = {
        int(a): (int(b) if trained else IGNORE_INDEX)
        for one in documents
        for a, b, trained in zip(one.ids[:-1], one.ids[1:], one.trained[1:], strict=True)
    }
    for row in rows:
        assert {len(array) for array in (row.ids, row.labels, row.positions, row.piece)} == {seq_len}
        assert all(array.dtype == np.int32 for array in (row.ids, row.labels, row.positions, row.piece))
        for ids, labels, positions in segments(row):
            assert ids == list(range(ids[0], ids[0] + len(ids)))
            assert labels == [following[number] for number in ids]
            assert positions == list(range(len(ids)))
        padding = row.piece == -1
        assert not np.any(np.diff(padding.astype(int)) < 0), "padding stands at the end"
        assert set(row.ids[padding].tolist()) <= {PAD}
        assert set(row.labels[padding].tolist()) <= {IGNORE_INDEX}
        assert set(row.positions[padding].tolist()) <= {0}
        assert np.all(np.diff(row.piece[~padding]) >= 0)


@given(
    documents=DOCUMENTS,
    seq_len=st.integers(1, 16),
    truncate=st.booleans(),
    min_unique=st.integers(0, 20),
    bad=st.lists(st.sampled_from(["file0", "file9"]), max_size=3),
)
def test_the_ledger_counts_what_is_in_the_rows(
    documents: list[Tokens], seq_len: int, truncate: bool, min_unique: int, bad: list[str]
) -> None:
    skipped = [Skipped(source, 1, "bad", 1) for source in bad]
    rows, ledger = pack(
        documents,
        seq_len=seq_len,
        pad_id=PAD,
        truncate=truncate,
        min_unique_tokens=min_unique,
        skipped=skipped,
    )
    ledger.check(seq_len=seq_len)
    padded = sum(int(np.count_nonzero(row.piece == -1)) for row in rows)
    trained = sum(int(np.count_nonzero(row.labels != IGNORE_INDEX)) for row in rows)
    assert (ledger.padding, ledger.trained, ledger.rows) == (padded, trained, len(rows))
    assert ledger.tokens == sum(len(one.ids) for one in documents)
    assert (ledger.documents, ledger.skipped) == (len(documents), len(bad))
    seen = {number for row in rows for ids, _, _ in segments(row) for number in ids}
    for file in ledger.files:
        of_file = [one for one in documents if one.source == file.source]
        whole = [one for one in of_file if not (len(one.ids) and int(one.ids[0]) in seen)]
        assert file.tokens == sum(len(one.ids) for one in of_file)
        assert (file.documents, file.dropped) == (len(of_file), len(whole))
        if not truncate:
            assert file.left_out == sum(len(one.ids) for one in whole)
        assert file.skipped == bad.count(file.source)


def test_a_long_document_is_split_so_that_the_last_target_is_the_next_input() -> None:
    (document,) = numbered([8])
    rows, ledger = pack([document], seq_len=3, pad_id=PAD)
    assert [row.ids.tolist() for row in rows] == [[100, 101, 102], [103, 104, 105], [106, PAD, PAD]]
    assert [row.labels.tolist() for row in rows] == [
        [101, 102, 103],
        [104, 105, 106],
        [107, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert [row.positions.tolist() for row in rows] == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]
    assert rows[2].piece.tolist() == [0, -1, -1]
    assert (ledger.tokens, ledger.trained, ledger.masked, ledger.left_out, ledger.padding) == (8, 7, 1, 0, 2)


def test_truncation_cuts_and_counts_the_rest() -> None:
    rows, ledger = pack(numbered([8, 3]), seq_len=3, pad_id=PAD, truncate=True)
    assert [row.ids.tolist() for row in rows] == [[100, 101, 102], [108, 109, PAD]]
    assert (ledger.trained, ledger.masked, ledger.left_out, ledger.padding, ledger.dropped) == (5, 2, 4, 1, 0)
    # The dropped rest may be trained or masked.
    _, masked = pack(numbered([8], [True, False]), seq_len=3, pad_id=PAD, truncate=True)
    assert (masked.trained, masked.masked, masked.left_out) == (1, 3, 4)


def test_the_fullest_row_with_enough_space_is_filled_first() -> None:
    # Lengths: 7, 5, 4, 3, 2 of 8. The 3 fits exactly next to the 5; first fit would put it next to the 4.
    rows, ledger = pack(numbered([8, 6, 5, 4, 3]), seq_len=8, pad_id=PAD)
    assert [[len(ids) for ids, _, _ in segments(row)] for row in rows] == [[7], [5, 3], [4, 2]]
    assert [row.sources for row in rows] == [("file0:0",), ("file1:1", "file0:3"), ("file2:2", "file1:4")]
    assert {file.source: file.padding for file in ledger.files} == {"file0": 1, "file1": 2, "file2": 0}


def test_rows_come_in_the_order_of_their_first_documents() -> None:
    rows, _ = pack(numbered([3, 8, 4, 9, 6]), seq_len=8, pad_id=PAD)
    assert [row.sources[0] for row in rows] == ["file0:0", "file1:1", "file2:2", "file0:3"]


@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40))
def test_packing_wastes_little_and_is_repeatable(lengths: list[int]) -> None:
    first, _ = pack(numbered(lengths), seq_len=16, pad_id=PAD)
    again, _ = pack(numbered(lengths), seq_len=16, pad_id=PAD)
    assert [row.ids.tolist() for row in first] == [row.ids.tolist() for row in again]
    # Best fit never opens a row while another has enough space: no two rows could be joined.
    used = sorted(int(np.count_nonzero(row.piece >= 0)) for row in first)
    assert len(used) < 2 or used[0] + used[1] > 16


def test_copies_are_dropped_and_counted() -> None:
    one, other = numbered([5, 4])
    masked = Tokens("file1", 9, one.ids, np.array([False] * 4 + [True]), 1)
    copy = Tokens("file2", 7, one.ids.copy(), one.trained.copy(), 5)
    rows, ledger = pack([one, other, copy, masked], seq_len=8, pad_id=PAD, deduplicate=True)
    assert {source for row in rows for source in row.sources} == {"file0:0", "file1:1", "file1:9"}
    assert (ledger.left_out, ledger.dropped, ledger.copies) == (5, 1, 1)
    _, kept = pack([one, other, copy, masked], seq_len=8, pad_id=PAD)
    assert (kept.left_out, kept.dropped, kept.copies) == (0, 0, 1)
    assert [(file.source, file.copies) for file in kept.files] == [("file0", 0), ("file1", 0), ("file2", 1)]
    assert pack([one, copy], seq_len=8, pad_id=PAD, excluded=[1])[1].copies == 0


def test_documents_with_few_distinct_tokens_are_dropped() -> None:
    dull = Tokens("file0", 1, np.array([5, 5, 5, 6], dtype=np.int32), np.array([False, True, True, True]), 4)
    assert pack([dull], seq_len=8, pad_id=PAD, min_unique_tokens=2)[1].left_out == 0
    rows, ledger = pack([dull], seq_len=8, pad_id=PAD, min_unique_tokens=3)
    assert (rows, ledger.left_out, ledger.tokens, ledger.dropped) == ([], 4, 4, 1)


def test_the_ledger_is_json_and_its_check_detects_a_lost_token() -> None:
    _, ledger = pack(numbered([5, 4]), seq_len=4, pad_id=PAD)
    again = json.loads(json.dumps(ledger.to_dict()))
    assert (again["tokens"], again["rows"], again["files"][1]["source"]) == (9, 2, "file1")
    with pytest.raises(AssertionError, match="accounted for"):
        total([FileLedger("f", tokens=3, trained=1, masked=1)], rows=1).check(seq_len=2)


def test_the_check_of_the_ledger_detects_a_position_of_the_rows_that_is_not_counted() -> None:
    file = FileLedger("f", tokens=3, trained=2, masked=1, padding=1, repeated_bos=1, documents=1)
    total([file], rows=2).check(seq_len=2)
    for wrong in (replace(file, repeated_bos=0), replace(file, padding=2)):
        with pytest.raises(AssertionError, match="2 rows of 2 tokens hold"):
            total([wrong], rows=2).check(seq_len=2)


def test_a_row_length_of_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="seq-len"):
        pack([], seq_len=0, pad_id=PAD)


def test_packing_three_million_tokens_wastes_less_than_one_percent() -> None:
    lengths = np.random.default_rng(0).integers(2, 400, size=15_000).tolist()
    rows, _ = pack(numbered(lengths), seq_len=512, pad_id=PAD)
    assert len(rows) * 512 < 1.01 * sum(length - 1 for length in lengths)


def test_the_work_of_packing_grows_with_the_documents_and_not_with_their_square() -> None:
    """Counts executed lines of Python, the same on every machine; benchmarks/start.py measures time."""

    def work(count: int) -> int:
        documents = numbered(np.random.default_rng(0).integers(2, 400, size=count).tolist())
        seen = 0

        def trace(frame: FrameType, event: str, _: object) -> TraceFunction:
            nonlocal seen
            seen += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pack(documents, seq_len=512, pad_id=PAD)
        finally:
            sys.settrace(before)
        return seen

    assert 2 < work(2000) / work(500) < 4.5


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([8, 8], 1),
        ([8, 5], 1),  # padding after one document changes nothing
        ([5, 3], 2),
        ([5, 2], 3),  # two documents and padding
        ([8, 4, 2, 2, 6], 3),
        ([20], 1),
    ],
)
def test_the_most_documents_of_a_row_count_its_padding_as_one(lengths: list[int], expected: int) -> None:
    rows, _ = pack(numbered([length + 1 for length in lengths]), seq_len=8, pad_id=PAD)
    assert most_documents(rows) == expected


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    window=st.integers(4, 20),
    part=st.floats(0, 1),
    bos=st.booleans(),
)
def test_sliding_windows_predict_each_token_once_from_enough_tokens(
    lengths: list[int], window: int, part: float, bos: bool
) -> None:
    documents = numbered(lengths)
    if bos:
        for document in documents:
            document.ids[: len(BOS)] = BOS[: len(document.ids)]
    stride = 1 + round(part * (window - len(BOS) - 1))
    rows = pack_windows(documents, window=window, stride=stride, pad_id=PAD, bos_ids=BOS if bos else ())
    predicted: list[tuple[int, int]] = []
    for row in rows:
        for at in np.flatnonzero(row.labels != IGNORE_INDEX):
            index = row.documents[row.piece[at]]
            ids = documents[index].ids
            place = int(np.flatnonzero(ids == row.labels[at])[0])
            before = row.ids[row.piece == row.piece[at]][: row.positions[at] + 1]
            assert len(before) >= min(place, window - stride)
            own, source = ([token for token in some.tolist() if token not in BOS] for some in (before, ids[:place]))
            assert own == source[len(source) - len(own) :]
            predicted.append((index, place))
    expected = [(index, place) for index, length in enumerate(lengths) for place in range(1, length) if length >= 2]
    assert sorted(predicted) == expected
