"""Records the held-out losses by document, or by block of rows, and which text they are of (`octavo compare`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from octavo.data.packing import IGNORE_INDEX, Row
from octavo.data.records import Document
from octavo.metrics import Score
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.packed_numbers import pack_counts, pack_floats


def record_losses(
    name: str, result: Score, rows: Sequence[Row], documents: Sequence[Document], *, step: int, report: Report
) -> None:
    """Records the losses of the row `name` of the perplexity table, if all are numbers of float32."""
    units = result.units
    if units is None or not np.isfinite(units.nats.astype(np.float32)).all():
        return
    events.HeldOutLosses(
        step=step,
        row=name,
        over=units.over,
        nats=pack_floats(units.nats.tolist()),
        tokens=pack_counts(units.tokens.tolist()),
        documents=units.documents,
        rows=units.rows,
        bytes=result.n_bytes,
        labels=digest_of_labels(rows),
        text=digest_of_text(documents),
    ).write(report)


def digest_of_labels(rows: Sequence[Row]) -> str:
    """SHA-256 of the trained labels of each document, sorted: `pack` may put the parts of a document in any order.

    Equal for rows of another length: every token of a document but its first is a label once. With other documents or
    another tokenizer the digest differs.
    """
    parts: dict[int, list[npt.NDArray[np.int64]]] = {}
    for row in rows:
        measured = row.labels != IGNORE_INDEX  # (T,)
        for piece, document in enumerate(row.documents):
            labels = row.labels[measured & (row.piece == piece)]
            if len(labels):
                parts.setdefault(document, []).append(labels.astype(np.int64))
    digest = hashlib.sha256()
    for document in sorted(parts):
        labels = np.sort(np.concatenate(parts[document]))
        digest.update(len(labels).to_bytes(8, "little") + labels.astype("<i8").tobytes())
    return digest.hexdigest()


def digest_of_text(documents: Sequence[Document]) -> str:
    """SHA-256 of the content of the documents in order, without the names of their files."""
    digest = hashlib.sha256()
    for one in documents:
        turns = [str(message) for message in one.messages]
        content = json.dumps([one.text, one.prompt, one.completion, turns, one.tools]).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
