"""data/cloze.py and data/ngrams.py: which words are probes, and their wrong answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from octavo.data import cloze
from octavo.data.ngrams import hashes, occurrences
from octavo.data.packing import Row, pack
from octavo.data.records import Document, from_text
from octavo.data.tokens import encode_all
from octavo.data.turns import Message

NAMES = [f"{first}{second}x" for first in "bdfgk" for second in "aeiou"]
TRAINING = [f"the {name} came to the hall" for name in NAMES]
HELD_OUT = [f"to the king of the hall came the {name}" for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_llama)
    return loaded


def rows_of(documents: Sequence[str | Document], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    texts = [from_text(one, source="a", line=1) if isinstance(one, str) else one for one in documents]
    return pack(encode_all(texts, tokenizer), seq_len=64, pad_id=0)[0]


def chosen(
    held_out: Sequence[str | Document], training: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[cloze.Probe]:
    return cloze.choose_probes(rows_of(held_out, tokenizer), rows_of(training, tokenizer), tokenizer)


def test_the_rare_words_of_the_training_text_are_the_probes(tokenizer: PreTrainedTokenizerFast) -> None:
    probes = chosen(HELD_OUT, TRAINING, tokenizer)
    assert sorted(probe.words[0] for probe in probes) == sorted(NAMES), "the other words are in every document"
    for probe in probes:
        text = str(tokenizer.decode([*probe.context.tolist(), *probe.answers[0].tolist()]))
        assert text == f"to the king of the hall came the {probe.words[0]}"
        assert len(probe.context) >= cloze.MIN_CONTEXT
        assert len(set(probe.words)) == len(probe.answers) == 2 + cloze.WRONG


def test_the_answers_of_the_control_are_the_true_ones_in_another_order(tokenizer: PreTrainedTokenizerFast) -> None:
    probes = chosen(HELD_OUT, TRAINING, tokenizer)
    assert sorted(probe.words[1] for probe in probes) == sorted(probe.words[0] for probe in probes)
    assert all(probe.words[0] != probe.words[1] for probe in probes)


def test_a_word_that_the_training_text_lacks_or_the_context_has_is_no_probe(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    missing = [text for text in TRAINING if "bax" not in text]
    repeated = [text.replace("the king", "the fax", 1) if text.endswith("fax") else text for text in HELD_OUT]
    words = {probe.words[0] for probe in chosen(repeated, missing, tokenizer)}
    assert set(NAMES) - words == {"bax", "fax"}


def test_copies_of_training_text_are_no_probes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert chosen(HELD_OUT, HELD_OUT, tokenizer) == []


def test_probes_of_a_conversation_are_in_its_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [
        Document("a", 1, messages=(Message("user", f"who? {name}q"), Message("assistant", f"to the hall came {name}")))
        for name in NAMES
    ]
    probes = chosen(chats, [*TRAINING, *(f"of {name}q" for name in NAMES)], tokenizer)
    assert {probe.words[0] for probe in probes} == set(NAMES)


def test_the_budget_bounds_the_rows_and_takes_some_of_every_document(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = [f"{text} to the {other}" for text, other in zip(HELD_OUT, NAMES[1:] + NAMES[:1], strict=True)]
    monkeypatch.setattr(cloze, "BUDGET", 2000)
    probes = chosen(held_out, TRAINING, tokenizer)
    assert sum(len(ids) for ids, _ in cloze.probe_rows(probes)) <= 2000
    assert len({probe.document for probe in probes}) == len(probes) < len(NAMES)


def test_occurrences_are_those_of_a_search() -> None:
    generator = np.random.default_rng(0)
    text = generator.integers(0, 4, 300).astype(np.int32)
    wanted = generator.integers(0, 4, (20, 3)).astype(np.int32)
    found = occurrences(np.concatenate([hashes(one, 3) for one in wanted]), [text[:150], text[148:]], 3)
    expected = [sum(np.array_equal(text[at : at + 3], one) for at in range(298)) for one in wanted]
    assert found.tolist() == expected
