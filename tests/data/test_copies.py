"""data/copies.py: prompts, copied n-grams and where the longest copy is from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.data import copies
from octavo.data.packing import Row, pack
from octavo.data.tokens import Tokens


def row_of(*documents: list[int], seq_len: int = 64) -> list[Row]:
    tokens = [
        Tokens("a.txt", number, np.array(ids, dtype=np.int32), np.arange(len(ids)) > 0, 0)
        for number, ids in enumerate(documents, 1)
    ]
    return pack(tokens, seq_len=seq_len, pad_id=0)[0]


FIRST, SECOND = list(range(10, 40)), list(range(50, 90))
TRAINING = row_of(FIRST, SECOND)
SAMPLE = np.array([1, 2, *range(60, 75), 3], dtype=np.int32)  # 15 tokens of the second document


def test_copied_runs_are_counted_and_shuffled_ones_are_not() -> None:
    original = np.arange(200, 218, dtype=np.int32)
    assert copies.copied([SAMPLE, original], TRAINING) == ([15 - copies.COPY + 1, 0], [11, 11])
    (shuffled,) = copies.shuffled([SAMPLE])
    assert sorted(shuffled.tolist()) == sorted(SAMPLE.tolist())
    assert copies.copied([shuffled], TRAINING)[0] == [0]


def test_no_copy_goes_over_the_edge_of_a_document() -> None:
    assert copies.copied([np.array([*FIRST[-5:], *SECOND[:5]], dtype=np.int32)], TRAINING)[0] == [0]


def test_the_longest_copy_names_its_document() -> None:
    short = np.array(FIRST[3:12], dtype=np.int32)
    assert copies.longest_copy([short, SAMPLE], TRAINING) == copies.Longest(15, tuple(range(60, 75)), "a.txt:2")
    assert copies.longest_copy([short[:5]], TRAINING) == copies.Longest()


def test_prompts_have_one_length_and_leave_text_to_continue(tiny_llama: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama)
    documents = [list(range(100, 100 + length)) for length in (20, 30, 40, 60)]
    rows = [row for ids in documents for row in row_of(ids)]
    prompts = copies.choose_prompts(rows, tokenizer)
    assert {len(prompt) for prompt in prompts} == {copies.PROMPT}
    assert len(prompts) == 3, "a document of 20 tokens has fewer than 8 after a prompt"


@pytest.mark.parametrize("at", [20, 25])
def test_prompts_of_an_answer_end_where_it_begins(tiny_llama: Path, at: int) -> None:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama)
    ids = np.arange(100, 150, dtype=np.int32)
    rows = pack([Tokens("a", 1, ids, np.arange(50) >= at, 0)], seq_len=64, pad_id=0)[0]
    (prompt,) = copies.choose_prompts(rows, tokenizer)
    assert prompt[-1] == ids[at - 1]
