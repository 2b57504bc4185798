"""What a model learned, forgot and copies: measured before and after training, the same way each time.

- forgot: the loss on a small general text that octavo has (`octavo.general_text`), paired by document;
- learned: cloze probes of the held-out text (data/cloze.py), with answers from other probes as a shuffled control;
- copies: greedy samples from held-out and training text, and the n-grams of them that the training text has.

All rows have ROW tokens whatever --seq-len is, and are scored as held-out rows are. docs/reading-the-verdict.md
describes the figures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.commands.data import pad_id_of
from octavo.data import cloze, copies
from octavo.data.cloze import Probe, choose_probes, probe_rows
from octavo.data.encoding import bos_ids
from octavo.data.packing import Row, pack, trained_bytes
from octavo.data.records import from_text
from octavo.data.tokens import Tokens, encode_all
from octavo.general_text import general_documents
from octavo.infer.generate import all_stop_ids, greedy_batch
from octavo.intervals import interval, units_of
from octavo.metrics import document_losses, label_losses
from octavo.models import Decoder
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.interval import Interval
from octavo.runs.probe_results import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Floats = npt.NDArray[np.float64]
Change = tuple[float, float, float, Interval | None]  # before, after, after - before, the interval of this

ROW = 256  # tokens of the packed rows of general text and cloze probes
EXAMPLES = 8  # cloze probes that are recorded with their answers
SHOWN_CONTEXT = 20  # tokens of their contexts


@dataclass(frozen=True, eq=False)
class ProbeSet:
    """What is measured: it depends on the text and the tokenizer alone. A reason says what is missing."""

    general: list[Row]
    general_tokens: npt.NDArray[np.int64]  # (documents,) with a loss
    general_bytes: int
    probes: list[Probe]
    cloze: list[Row]
    prompts: list[npt.NDArray[np.int32]]
    held_out_prompts: int = 0  # the first ones; the others are from the training text
    no_probes: str = ""
    no_prompts: str = ""


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of one model."""

    general: Floats  # (documents,) nats
    cloze: Floats  # (probes, answers) nats a token
    samples: npt.NDArray[np.int64]  # (samples, tokens); -1 after an end

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ("general", "cloze", "samples")}

    @classmethod
    def of_tensors(cls, saved: Mapping[str, Tensor]) -> Measured:
        """The measurements of `tensors`. KeyError if one is missing."""
        return cls(saved["general"].numpy(), saved["cloze"].numpy(), saved["samples"].numpy())

    def is_like(self, other: Measured) -> bool:
        """Whether both are of the same general text, probes and prompts, as far as their numbers show."""
        return (self.general.shape, self.cloze.shape, len(self.samples)) == (
            other.general.shape, other.cloze.shape, len(other.samples),
        )  # fmt: skip


def prepare(
    held_out: Sequence[Row], training: Sequence[Row] | None, tokenizer: PreTrainedTokenizerFast, *, context: int
) -> ProbeSet:
    """The probes of held-out rows; `training` rows are None where the training text is not known."""
    encoded = encode_all([from_text(text, source="general text", line=0) for text in general_documents()], tokenizer)
    general = _packed(encoded, tokenizer, context=context)
    tokens = document_losses(general, np.ones(sum(int((row.labels >= 0).sum()) for row in general)), len(encoded))
    probes = choose_probes(held_out, training or [], tokenizer) if held_out else []
    scored = [Tokens("probe", 0, ids, trained, 0) for ids, trained in probe_rows(probes)]
    prompts = [copies.choose_prompts(side, tokenizer) for side in (held_out, training or [])]
    fits = training is not None and context > copies.PROMPT + copies.NEW_TOKENS
    which = "rare words that the training text has too" if training else "rare words"
    few = f"the held-out text has fewer than {cloze.MIN_PROBES} {which}"
    no_prompts = "" if any(prompts) else f"no text is longer than {copies.PROMPT + copies.COPY} tokens"
    return ProbeSet(
        general,
        tokens.astype(np.int64),
        trained_bytes(general, tokenizer),
        probes,
        _packed(scored, tokenizer, context=context) if scored else [],
        [*prompts[0], *prompts[1]] if fits else [],
        len(prompts[0]),
        "" if probes else few if held_out else "there is no held-out text",
        no_prompts if training is not None else "the training text is not given",
    )


def _packed(tokens: Sequence[Tokens], tokenizer: PreTrainedTokenizerFast, *, context: int) -> list[Row]:
    """Rows of documents that are no longer than a row, except in models with a small context."""
    rows, _ = pack(
        tokens, seq_len=min(ROW, context), pad_id=pad_id_of(tokenizer), bos_ids=bos_ids(tokenizer),
    )  # fmt: skip
    return rows


def measure(
    model: Decoder,
    probes: ProbeSet,
    tokenizer: PreTrainedTokenizerFast,
    *,
    batch: int,
    report: Report,
    stop_ids: Collection[int] = (),
    tiled_head: bool = False,
) -> Measured:
    """Scores the general text and the cloze probes in batches of `batch` rows, and generates the samples."""
    options: dict[str, Any] = {"batch_size": batch, "tiled_head": tiled_head}
    rows = [*probes.general, *probes.cloze]
    with report.progress(len(rows), "Scoring general text and cloze probes") as bar:
        general = label_losses(model, probes.general, **options, progress=bar.advance)
        answers = [answer for probe in probes.probes for answer in probe.answers]
        nats = np.zeros(0)
        if answers:
            losses = label_losses(model, probes.cloze, **options, progress=bar.advance)
            nats = document_losses(probes.cloze, losses, len(answers)) / [len(answer) for answer in answers]
    samples = np.zeros((0, copies.NEW_TOKENS), dtype=np.int64)
    if probes.prompts:
        prompts = [prompt.tolist() for prompt in probes.prompts]
        samples = greedy_batch(model, prompts, new_tokens=copies.NEW_TOKENS, vocab_size=len(tokenizer)).numpy()
        ended = np.cumsum(np.isin(samples, list(all_stop_ids(tokenizer, stop_ids))), axis=1) > 0
        samples = np.where(ended, -1, samples)
    return Measured(
        document_losses(probes.general, general, len(probes.general_tokens)),
        nats.reshape(len(probes.probes), 2 + cloze.WRONG),
        samples,
    )


def results(
    probes: ProbeSet,
    before: Measured | None,
    after: Measured,
    training: Sequence[Row] | None,
    tokenizer: PreTrainedTokenizerFast,
    *,
    step: int | None,
) -> list[events.Event]:
    """The three events. `before` is None if it is not known, or of other text."""
    if before is None or not before.is_like(after):
        reason = "the measurement before training is not in the checkpoint, or is of other text"
        return [
            events.Forgot(step, reason=reason), events.Learned(step, reason=reason), events.Copies(step, reason=reason),
        ]  # fmt: skip
    return [
        forgot(probes, before, after, step=step),
        learned(probes, before, after, tokenizer, step=step),
        copied(probes, before, after, training or [], tokenizer, step=step),
    ]


def forgot(probes: ProbeSet, before: Measured, after: Measured, *, step: int | None) -> events.Forgot:
    """The change of the loss on the general text."""
    tokens, rise = probes.general_tokens, after.general - before.general
    bits = 1 / np.log(2) / probes.general_bytes
    documents = np.arange(len(tokens))
    bounds = interval(units_of(rise, tokens, documents, documents)) if np.isfinite(rise).all() else None
    return events.Forgot(
        step,
        documents=int((tokens > 0).sum()),
        tokens=int(tokens.sum()),
        before=float(before.general.sum() * bits),
        after=float(after.general.sum() * bits),
        rise=float(rise.sum() * bits),
        interval=_scaled(bounds, float(tokens.sum()) * bits),
        reason="" if bounds else "a loss is not finite",
    )


def _scaled(bounds: Interval | None, factor: float) -> Interval | None:
    return replace(bounds, low=bounds.low * factor, high=bounds.high * factor) if bounds else None


def recovered(nats: Floats, answer: int) -> npt.NDArray[np.bool_]:
    """(probes,) Whether an answer is likelier a token than the WRONG last ones; 0 is the true one, 1 the control."""
    best: Floats = nats[:, 2:].min(axis=1)
    return np.less(nats[:, answer], best, dtype=np.bool_)


def learned(
    probes: ProbeSet, before: Measured, after: Measured, tokenizer: PreTrainedTokenizerFast, *, step: int | None
) -> events.Learned:
    """Which answers of the cloze probes are the likeliest, and how much likelier they became."""
    if probes.no_probes or not (np.isfinite(before.cloze).all() and np.isfinite(after.cloze).all()):
        return events.Learned(step, reason=probes.no_probes or "a loss is not finite")
    documents, rows = (np.array([getattr(probe, name) for probe in probes.probes]) for name in ("document", "row"))
    changes: list[Change] = []
    gains: list[tuple[float, Interval | None]] = []
    for answer in (0, 1):  # the true answers, and those of the control
        two = [recovered(one.cloze, answer).astype(np.float64) for one in (before, after)]
        changes.append((float(two[0].mean()), float(two[1].mean()), *_mean(two[1] - two[0], documents, rows)))
        gains.append(_mean(before.cloze[:, answer] - after.cloze[:, answer], documents, rows))
    return events.Learned(
        step,
        len(documents),
        len(set(documents.tolist())),
        cloze.WRONG,
        *changes[0],
        *changes[1],
        *gains[0],
        *gains[1],
        _examples(probes, before, after, tokenizer),
    )


def _mean(values: Floats, documents: npt.NDArray[Any], rows: npt.NDArray[Any]) -> tuple[float, Interval | None]:
    """The mean of one value a probe, and its interval over documents, or over rows if there are few documents."""
    return float(values.mean()), interval(units_of(values, np.ones(len(values), dtype=np.int64), documents, rows))


def _examples(
    probes: ProbeSet, before: Measured, after: Measured, tokenizer: PreTrainedTokenizerFast
) -> tuple[Example, ...]:
    """The probes whose true answers changed most, for the better or the worse."""
    change = before.cloze[:, 0] - after.cloze[:, 0]
    others = [0, *range(2, 2 + cloze.WRONG)]

    def likeliest(nats: Floats, number: int) -> str:
        best: int = others[int(np.argmin(nats[number, others]))]
        return str(probes.probes[number].words[best])

    numbers = sorted(np.argsort(-np.abs(change), kind="stable")[:EXAMPLES].tolist())
    return tuple(
        Example(
            str(tokenizer.decode(probes.probes[number].context[-SHOWN_CONTEXT:].tolist())),
            probes.probes[number].words[0],
            likeliest(before.cloze, number),
            likeliest(after.cloze, number),
        )
        for number in numbers
    )


def copied(
    probes: ProbeSet,
    before: Measured,
    after: Measured,
    training: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    *,
    step: int | None,
) -> events.Copies:
    """Which share of the n-grams of the samples the training text has."""
    if not probes.prompts:
        return events.Copies(step, reason=probes.no_prompts or "the model's context is too short")
    sides = [[ids[ids >= 0].astype(np.int32) for ids in one.samples] for one in (before, after)]
    first, then = (_shares(side, training) for side in sides)  # (samples,) each
    numbers, ones = np.arange(len(then)), np.ones(len(then), dtype=np.int64)
    longest = copies.longest_copy(sides[1], training) if then.any() else copies.Longest()
    from_training = then[probes.held_out_prompts :]
    return events.Copies(
        step,
        len(then),
        copies.COPY,
        float(first.mean()),
        float(then.mean()),
        float((then - first).mean()),
        interval(units_of(then - first, ones, numbers, numbers)),
        float(_shares(copies.shuffled(sides[1]), training).mean()),
        float(from_training.mean()) if len(from_training) else None,
        longest.tokens,
        str(tokenizer.decode(longest.text)),
        longest.source,
    )


def _shares(samples: Sequence[npt.NDArray[np.int32]], training: Sequence[Row]) -> Floats:
    """(samples,) Which share of the n-grams of each sample the training text has; 0 for a sample without any."""
    found, total = copies.copied(samples, training)
    return np.array(found, dtype=np.float64) / np.maximum(total, 1)
