"""Held-out passages: spread over the text, about as long as asked for, and no token lost between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from octavo.data import passages
from octavo.data.records import Document
from octavo.data.tokens import Tokens, encode

VERSES = "".join(f"It was the year {year}, and it rained.\n" for year in range(400))


@given(
    lengths=st.lists(st.integers(2, 60_000), min_size=1, max_size=9),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 9),
)
def test_passages_are_apart_and_have_the_share_of_the_tokens(lengths: list[int], fraction: float, seed: int) -> None:
    found = passages.spans(lengths, fraction=fraction, seed=seed)
    held_out = sum(stop - start for spans in found for start, stop in spans)
    count = sum(map(len, found))
    if round(fraction * sum(lengths)) < passages.MIN_PASSAGES * passages.MIN_TOKENS:
        assert count == 0
        return
    assert passages.MIN_PASSAGES <= count <= passages.MAX_PASSAGES
    # What a text without a passage leaves is at most what its remainder is of a stretch.
    assert abs(held_out - fraction * sum(lengths)) <= count + len(lengths) * fraction * sum(lengths) / count
    for length, spans in zip(lengths, found, strict=True):
        edges = [0, *(place for span in spans for place in span), length]
        assert edges == sorted(edges)
        assert all(start < stop for start, stop in spans)
        for number, (start, stop) in enumerate(spans):
            assert length * number // len(spans) <= start < stop <= length * (number + 1) // len(spans)


def test_places_depend_on_the_seed_alone_and_reach_all_of_the_text() -> None:
    first = passages.spans([100_000], fraction=0.05, seed=0)
    assert first == passages.spans([100_000], fraction=0.05, seed=0)
    assert first != passages.spans([100_000], fraction=0.05, seed=1)
    places = np.array(
        [
            spans[0][number][0]
            for seed in range(300)
            for spans in [passages.spans([100_000], fraction=0.05, seed=seed)]
            for number in range(19)
        ]
    )
    counts, _ = np.histogram(places, bins=19, range=(0, 100_000))
    assert counts.min() > 0.5 * counts.mean()


def test_a_text_shorter_than_a_stretch_is_trained_on_whole() -> None:
    found = passages.spans([90, 50_000, 50_000], fraction=0.1, seed=0)
    assert [len(spans) for spans in found] == [0, 20, 19]


@given(data=st.data())
def test_ends_of_lines_move_passages_without_overlap_and_leave_no_single_token(data: st.DataObject) -> None:
    lengths = [data.draw(st.integers(7000, 20_000))]
    (wanted,) = passages.spans(lengths, fraction=data.draw(st.floats(0.1, 0.8)), seed=data.draw(st.integers(0, 9)))
    every = data.draw(st.integers(1, 400))
    ids = (np.arange(lengths[0]) % every == every - 1).astype(np.int32)  # the token 1 ends a line
    moved = passages.to_lines(wanted, ids, np.array([False, True]))
    stop = 0
    for (start, end), (place, _) in zip(moved, wanted, strict=True):
        assert start == stop or start - stop >= 2
        assert end - start >= 2
        assert abs(start - place) <= 20_000 / 10
        stop = end
    if every < 30:
        assert all(end % every == 0 for _, end in moved)


def test_without_lines_passages_stay_where_they_are() -> None:
    wanted = [(10, 90), (200, 280)]
    assert passages.to_lines(wanted, np.zeros(300, np.int32), np.array([False, True])) == wanted
    ids = np.zeros(300, np.int32)
    ids[[3, 11, 285]] = 1
    assert passages.to_lines(wanted, ids, np.array([False, True])) == [(12, 90), (200, 286)]


def test_separated_parts_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode(Document("f", 1, text=VERSES), tokenizer)
    ends = passages.line_ends(tokenizer)
    (wanted,) = passages.spans([len(whole.ids) - 1], fraction=0.3, seed=0)
    moved = passages.to_lines(wanted, whole.ids[:-1], ends)
    kept, held_out = passages.separate(whole, moved, tokenizer)
    assert [part.ids.tolist() for part in held_out] == [whole.ids[start:stop].tolist() for start, stop in moved]
    joined = sorted([*kept, *held_out], key=lambda part: part.line)
    assert np.concatenate([part.ids for part in joined]).tolist() == whole.ids.tolist()
    assert [part.ids[-1] == tokenizer.eos_token_id for part in joined] == [False] * (len(joined) - 1) + [True]
    assert not any(part.trained[0] for part in joined)
    assert all(part.trained[1:].all() for part in joined)
    for part in joined:
        text = tokenizer.decode(part.ids[:-1].tolist())
        assert VERSES.split("\n")[part.line - 1].startswith(text.split("\n")[0]), "the line"
        assert part.n_bytes == len(
            tokenizer.decode(part.ids[part.ids != tokenizer.eos_token_id].tolist()).encode()
        ) - len(tokenizer.decode(part.ids[:1].tolist()).encode())


def test_pages_are_those_of_the_part() -> None:
    tokens = Tokens(
        "f", 1, np.arange(10, dtype=np.int32), np.arange(10) > 0, 9, positions=((0, "page 1"), (6, "page 2"))
    )
    part = passages._part(tokens, (4, 9), np.zeros(0, np.int32), np.ones(10, np.int64), line=3)
    assert [part.where(index) for index in range(5)] == ["f: page 1"] * 2 + ["f: page 2"] * 3
    with_bos = passages._part(tokens, (4, 9), np.zeros(1, np.int32), np.ones(10, np.int64), line=3)
    assert with_bos.ids.tolist() == [0, 4, 5, 6, 7, 8]
    assert with_bos.trained.tolist() == [False, True, True, True, True, True]
    assert with_bos.where(3) == "f: page 2"
    assert with_bos.where(2) == "f: page 1"


@pytest.mark.parametrize(("held_out", "count"), [(639, 0), (640, 10), (2560, 10), (5120, 20), (10**6, 40)])
def test_how_many_passages(held_out: int, count: int) -> None:
    assert passages.count_of(held_out) == count
