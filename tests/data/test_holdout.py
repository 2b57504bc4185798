"""Held-out documents: exact shares, copies found in any form, shared runs equal to those of a plain search."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.data import holdout
from octavo.data.holdout import NGRAM, copies, digest, shared_text, split
from octavo.data.records import Document, from_fields
from octavo.data.turns import Message
from octavo.errors import UsageError


def texts(count: int) -> list[Document]:
    return [Document(f"file{number % 3}", number, text=f"text {number}") for number in range(count)]


@given(
    contents=st.lists(st.integers(0, 30), min_size=2, max_size=40).filter(lambda some: len(set(some)) > 1),
    fraction=st.floats(0.001, 0.999),
    seed=st.integers(0, 5),
)
def test_split_keeps_every_document_on_one_side_and_no_side_empty(
    contents: list[int], fraction: float, seed: int
) -> None:
    documents = [Document("f", line, text=str(content)) for line, content in enumerate(contents)]
    train, test = split(documents, fraction=fraction, seed=seed)
    assert sorted(train + test, key=lambda document: document.line) == documents
    assert train
    assert test
    assert not {document.text for document in train} & {document.text for document in test}


def test_split_sides_do_not_depend_on_file_or_line() -> None:
    moved = [Document("elsewhere", 1, text=document.text) for document in texts(50)]
    before = [document.text for document in split(texts(50), fraction=0.3, seed=0)[1]]
    assert before == [document.text for document in split(moved, fraction=0.3, seed=0)[1]]


def test_splitting_one_document_or_a_fraction_of_zero_gives_no_test_side() -> None:
    assert split(texts(1), fraction=0.5, seed=0) == (texts(1), [])
    assert split(texts(9), fraction=0, seed=0) == (texts(9), [])
    with pytest.raises(UsageError, match="fraction"):
        split(texts(9), fraction=1, seed=0)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.31, 0.5, 0.95])
@pytest.mark.parametrize("count", [2, 3, 10, 30, 33, 500])
def test_the_share_is_exact_to_one_document(count: int, fraction: float) -> None:
    train, test = split(texts(count), fraction=fraction, seed=1)
    assert len(test) == min(max(1, round(fraction * count)), count - 1)
    assert len(train) + len(test) == count


def test_few_documents_change_sides_when_others_are_added() -> None:
    small, large = texts(200), texts(220)
    before, after = ({d.text for d in split(some, fraction=0.2, seed=3)[1]} for some in (small, large))
    assert len(before - after) <= 10
    assert {d.text for d in split(large, fraction=0.2, seed=4)[1]} != after


def test_many_copies_do_not_fill_the_held_out_side() -> None:
    documents = [*(Document("f", n, text="again") for n in range(60)), *texts(40)]
    _, test = split(documents, fraction=0.1, seed=0)
    assert len(test) == 10
    assert "again" not in {document.text for document in test}


def test_copies_of_one_text_alone_are_an_error() -> None:
    with pytest.raises(UsageError, match=r"All 3 documents are copies.*\n.*--test-fraction 0"):
        split([Document("f", n, text="one  text" if n else "one text") for n in range(3)], fraction=0.3, seed=0)


@pytest.mark.parametrize(
    "other",
    [
        Document("g", 9, text="Caf\u00e9 au lait, please."),
        Document("g", 9, text=" Cafe\u0301  au\tlait,\r\nplease.\n"),
        Document("g", 9, text="\ufeffCaf\u00e9 au\u00a0lait,\u200b please."),
        Document("g", 9, prompt="Caf\u00e9 au ", completion="lait, please."),
        Document("g", 9, messages=(Message("user", "Caf\u00e9 au"), Message("assistant", "lait, please."))),
    ],
)
def test_a_copy_is_found_with_other_white_space_unicode_form_or_fields(other: Document) -> None:
    held_out = [Document("f", 1, text="Caf\u00e9 au lait, please.")]
    assert copies([Document("g", 8, text="Caf\u00e9 au the, please."), other], held_out) == [1]
    assert digest(other) == digest(held_out[0])


IDS = st.lists(st.integers(0, 2), max_size=60)


@given(train=st.lists(IDS, max_size=4), test=st.lists(IDS, max_size=3), chunk=st.integers(1, 40), data=st.data())
def test_shared_runs_equal_those_of_a_plain_search(
    train: list[list[int]], test: list[list[int]], chunk: int, data: st.DataObject
) -> None:
    masks = [data.draw(st.lists(st.booleans(), min_size=len(one), max_size=len(one))) for one in test]
    # Often a part of the training text is copied into the held-out text.
    if train and test and len(train[0]) % 3:
        masks[0] = [*masks[0], *(True for _ in train[0][:20])]
        test[0] = [*test[0], *train[0][:20]]
    runs = {tuple(one[n : n + NGRAM]) for one in train for n in range(len(one) - NGRAM + 1)}
    inside = [
        [any(tuple(one[s : s + NGRAM]) in runs for s in range(max(0, n - NGRAM + 1), n + 1)) for n in range(len(one))]
        for one in test
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdout, "_CHUNK_TOKENS", chunk)
        shared = shared_text(
            [np.array(one, dtype=np.int32) for one in train],
            [np.array(one, dtype=np.int32) for one in test],
            [np.array(mask, dtype=np.bool_) for mask in masks],
        )
    counts = [sum(a and b for a, b in zip(*spans, strict=True)) for spans in zip(inside, masks, strict=True)]
    assert shared.tokens == sum(map(sum, masks))
    assert shared.shared == sum(counts)
    assert shared.near_copies == tuple(n for n, count in enumerate(counts) if count > 0.5 * sum(masks[n]))


def test_alpacas_fields_and_a_conversation_are_copies_of_each_other() -> None:
    alpaca = from_fields({"instruction": "Add up.", "input": "1 2", "output": "3"}, source="a", line=1)
    turns = [{"role": "user", "content": "Add up.\n1  2"}, {"role": "assistant", "content": "3"}]
    assert digest(alpaca) == digest(from_fields({"messages": turns}, source="b", line=1))
