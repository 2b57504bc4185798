"""The recorded held-out losses: they are those of the table, and their digests say which runs can be compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Octavo

from octavo.commands.finetune.folder import failure_recorded
from octavo.commands.finetune.losses import digest_of_labels, digest_of_text
from octavo.data.packing import Row, pack
from octavo.data.records import Document
from octavo.data.tokens import Tokens
from octavo.errors import StoppedError, TrainingError
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.packed_numbers import unpack_counts, unpack_floats


def rows(documents: Sequence[Sequence[int]], *, seq_len: int) -> list[Row]:
    tokens = [
        Tokens(
            ids=np.array(ids, dtype=np.int32), trained=np.ones(len(ids), dtype=bool), source="a", line=number, n_bytes=0
        )
        for number, ids in enumerate(documents)
    ]
    return pack(tokens, seq_len=seq_len, pad_id=0)[0]


LONG = [list(range(7, 60)), list(range(3, 13)), [9, 8, 7, 6, 5], list(range(90, 130))]


@pytest.mark.parametrize("seq_len", [4, 7, 16, 64])
def test_the_digest_of_labels_does_not_depend_on_the_length_of_rows(seq_len: int) -> None:
    assert digest_of_labels(rows(LONG, seq_len=seq_len)) == digest_of_labels(rows(LONG, seq_len=200))


def test_the_digest_of_labels_depends_on_every_token_and_on_the_borders_of_documents() -> None:
    other = [*LONG[:-1], [*LONG[-1][:-1], 5]]
    joined = [LONG[0], [*LONG[1], *LONG[2]], LONG[3]]
    fewer = rows(LONG, seq_len=16)[:-1]
    digests = [digest_of_labels(rows(each, seq_len=16)) for each in (LONG, other, joined, LONG[::-1])]
    assert len({*digests, digest_of_labels(fewer)}) == 5


def test_the_digest_of_labels_counts_the_labels_of_each_document() -> None:
    two, one = rows([[0, 1, 2], [0, 3, 4]], seq_len=8), rows([[0, 1, 2, 3, 4]], seq_len=8)
    assert digest_of_labels(two) != digest_of_labels(one)


def test_the_digest_of_text_is_about_content_and_not_about_files() -> None:
    document = Document("a.txt", 1, text="to be")
    assert digest_of_text([document]) == digest_of_text([replace(document, source="b.txt", line=7)])
    others = [[], [replace(document, text="to be!")], [document, document], [Document("a", 1, prompt="to be")]]
    assert len({digest_of_text(each) for each in (*others, [document])}) == 5


def test_a_run_records_the_losses_of_both_rows(octavo: Octavo, tiny_llama: Path, plays: Path, tmp_path: Path) -> None:
    done = octavo(
        "finetune", "--model", tiny_llama, "--data", plays / "train", "--test-data", plays / "test", "--out", tmp_path,
        "--steps", 2, "--batch-size", 2, "--seq-len", 32, "--rank", 2, "--lr", 0.01, "--sample-tokens", 4,
    )  # fmt: skip
    assert done.code == 0
    found = events.read(tmp_path / "metrics.jsonl")
    evaluation = events.last(found, events.Evaluation)
    assert evaluation is not None
    recorded = events.only(found, events.HeldOutLosses)
    assert [one.row for one in recorded] == [row.name for row in evaluation.rows]
    assert [one.step for one in recorded] == [0, 2]
    for one, row in zip(recorded, evaluation.rows, strict=True):
        tokens = sum(unpack_counts(one.tokens))
        assert row.loss is not None
        assert tokens == row.tokens
        assert math.fsum(unpack_floats(one.nats)) / tokens == pytest.approx(row.loss, rel=1e-6)
        assert row.bits_per_byte == pytest.approx(row.loss * tokens / (one.bytes * math.log(2)), rel=1e-9)
    assert len({(one.labels, one.text) for one in recorded}) == 1
    octavo("finetune", "--resume", "--out", tmp_path)  # a finished run: it is measured again
    again = events.only(events.read(tmp_path / "metrics.jsonl"), events.HeldOutLosses)
    assert again == recorded


def test_an_error_is_recorded_and_a_signal_is_not(tmp_path: Path) -> None:
    for number, error in enumerate((TrainingError("diverged"), RuntimeError("x"), StoppedError("stop", number=2))):
        metrics = tmp_path / f"{number}"
        with (
            Report(console=False, metrics=metrics) as report,
            pytest.raises(type(error)),
            failure_recorded(report),
        ):
            raise error
    texts = [[event.text for event in events.only(events.read(tmp_path / f"{n}"), events.Failure)] for n in range(3)]
    assert texts == [["diverged"], ["RuntimeError: x"], []]
