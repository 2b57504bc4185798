"""commands/probes.py: the figures of constructed measurements."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from octavo.commands import probes
from octavo.commands.probes import Measured, ProbeSet, forgot, learned, recovered
from octavo.data.cloze import WRONG, Probe
from octavo.runs import events
from octavo.runs.probe_sentences import probe_sentences, probe_table

N, DOCUMENTS = 40, 20
IDS = np.arange(9, dtype=np.int32)
PROBES = [Probe(IDS, (IDS,) * (2 + WRONG), tuple("abcde"), "word", n // 2, n // 8) for n in range(N)]
SET = ProbeSet([], np.full(DOCUMENTS, 50), 4000, PROBES, [], [])


class Decoder:
    """A tokenizer that decodes nothing."""

    def decode(self, ids: list[int]) -> str:
        return "context"


def measured(*, true: float, seed: int, general: float = 2.0) -> Measured:
    """Answers of 4 nats a token +- 0.5, of which the true ones are lower by `true`; general text of `general` nats."""
    generator = np.random.default_rng(seed)
    nats = 4 + 0.5 * generator.standard_normal((N, 2 + WRONG))
    nats[:, 0] -= true
    text = 50 * (general + 0.02 * generator.standard_normal(DOCUMENTS))
    return Measured(text, nats, np.zeros((0, 4), dtype=np.int64))


def test_recovery_rises_with_the_true_answers_alone() -> None:
    before, after = measured(true=0, seed=1), measured(true=1.5, seed=2)
    result = learned(SET, before, after, Decoder(), step=3)
    assert result.interval is not None
    assert result.control_interval is not None
    assert result.interval.low > 0
    assert result.control_interval.low <= 0 <= result.control_interval.high
    assert (result.interval.units, result.interval.over) == (20, "documents"), "two probes of one document are one unit"
    assert result.gain == pytest.approx(float((before.cloze - after.cloze)[:, 0].mean()))
    sentence = " ".join(probe_sentences([result]))
    assert sentence.startswith("Recovered words left out of the held-out text: ")


def test_an_answer_is_recovered_if_it_is_the_likeliest() -> None:
    nats = np.array([[1.0, 9, 2, 3, 4], [2.5, 1.5, 2, 3, 4], [1.0, 2.0, 1.0, 3, 4]])
    assert recovered(nats, 0).tolist() == [True, False, False]
    assert recovered(nats, 1).tolist() == [False, True, False]


@pytest.mark.parametrize(("change", "words"), [(0.1, "rises"), (-0.1, "falls"), (0.0, "no change can be told")])
def test_the_general_text_is_paired_by_document_in_bits_per_byte(change: float, words: str) -> None:
    before, after = measured(true=0, seed=1), measured(true=0, seed=2, general=2 + change)
    result = forgot(SET, before, after, step=3)
    assert result.rise == pytest.approx(float((after.general - before.general).sum()) / np.log(2) / 4000)
    assert result.interval is not None
    assert result.rise is not None
    assert result.interval.low < result.rise < result.interval.high
    assert (result.interval.low + result.interval.high) / 2 == pytest.approx(result.rise)
    (sentence,) = probe_sentences([result])
    assert words in sentence


def test_measurements_of_other_text_are_not_compared() -> None:
    before, after = measured(true=0, seed=1), measured(true=0, seed=2)
    other = replace(before, cloze=before.cloze[:-1])
    for earlier in (None, other):
        found = probes.results(SET, earlier, after, None, Decoder(), step=1)
        assert [type(event) for event in found] == [events.Forgot, events.Learned, events.Copies]
        assert all(getattr(event, "reason", "") for event in found)
        assert probe_table(found) == []
        assert all("not measured" in sentence for sentence in probe_sentences(found))


def test_measurements_are_the_same_from_a_checkpoint() -> None:
    before = measured(true=0, seed=1)
    again = Measured.of_tensors(before.tensors())
    assert again.is_like(before)
    assert np.array_equal(again.cloze, before.cloze)
