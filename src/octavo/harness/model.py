"""A model as lm-evaluation-harness asks it: how likely is a text, and what comes after it?

Which tokens are asked about is lm-eval's convention, that of its class for transformers (`hf`), so that numbers compare
with published ones. It is not that of octavo's own perplexity: the first token of a text is scored too, given the
tokenizer's begin token (else its end token), no end token is scored, and strings of control tokens in a text are
control tokens, since tasks write templates so. A model whose texts start with a begin token gets one before contexts
and prompts; a text scored whole has one already and gets no second, as in lm-eval's clients of servers.

Importing this file needs lm-eval, which the extra octavo[eval] brings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from octavo.commands.generate import Speaker, until_finished
from octavo.data.encoding import bos_ids, coder_of
from octavo.errors import ModelError, UsageError
from octavo.fused.loss import CHUNK_BYTES
from octavo.infer.engine import Engine
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.reporting import Report

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  # where a task names no limit: lm-eval's own
# What a task may ask of generation. `normalize_gen_kwargs` has read "do_sample": without it the temperature is 0.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}

Scored = tuple[Any, list[int], list[int]]  # (the texts, ids of the context, ids of the continuation)


@dataclass(frozen=True)
class _Asked:
    """An answer to write: the tokens that end it, and how many its prompt has too many (0 or less: it fits)."""

    request: Request
    stop_ids: frozenset[int]
    cut: int


class OctavoLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """What `lm_eval.evaluate` takes. `batch` texts are scored at once, and as many answers written at once."""

    def __init__(self, speaker: Speaker, *, batch: int, report: Report) -> None:
        super().__init__()
        self.model, self.tokenizer, self.stop_ids = speaker.model.eval(), speaker.tokenizer, speaker.stop_ids
        self.batch, self.report = batch, report
        self._begin = bos_ids(speaker.tokenizer)
        self._told: set[str] = set()  # what was warned of: once is enough

    @property
    def max_length(self) -> int:
        return self.model.config.context

    @property
    def eot_token_id(self) -> int | None:
        end = self.tokenizer.eos_token_id
        return None if end is None else int(end)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError("The tokenizer has no begin token and no end token.", hint="Name one in its config.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, behind the model's begin token unless that is forbidden or there already."""
        ids: list[int] = coder_of(self.tokenizer).control.encode(string, add_special_tokens=False).ids
        bare = add_special_tokens is False or ids[: len(self._begin)] == self._begin
        return ids if bare else [*self._begin, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(sum of log p in nats, whether greedy decoding writes just this) of each continuation in its context."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Nats of whole texts. One longer than the context goes over windows of it, each token scored once."""
        windows: list[Scored] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (nats, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += nats
        return totals

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_: Any) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of ids. Requests that differ in their last token alone share one row."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            if continuation:  # nothing costs nothing
                rows.setdefault(self._inputs(context, continuation), []).append(number)
        longest_first = sorted(rows, key=len, reverse=True)  # what does not fit in memory fails at once
        scores = [(0.0, True)] * len(requests)
        with self.report.progress(sum(map(len, rows.values())), "Scoring texts") as bar:
            for start in range(0, len(longest_first), self.batch):
                inputs = longest_first[start : start + self.batch]
                asked = [(row, number) for row, ids in enumerate(inputs) for number in rows[ids]]
                targets = [requests[number][2] for _, number in asked]
                places = [(row, len(inputs[row])) for row, _ in asked]
                for (_row, number), score in zip(asked, self._scores(inputs, places, targets), strict=True):
                    scores[number] = score
                bar.advance(len(asked))
        self._warn_of_cut([len(context) + len(rest) - 1 - self.max_length for _, context, rest in requests], "text")
        return scores

    def _inputs(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model reads: all but the last token, of a longer text than the context its end."""
        if len(continuation) > self.max_length:
            raise UsageError(
                f"A task has an answer of {len(continuation):,} tokens; the model's context is {self.max_length:,}.",
                hint="Take a model with a longer context, or leave this task out.",
            )
        return tuple((context + continuation)[-self.max_length - 1 : -1])

    def _scores(
        self, inputs: Sequence[tuple[int, ...]], places: Sequence[tuple[int, int]], targets: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """The score of each of `targets`, whose last one is predicted at the end of row r's n ids: `places` (r, n).

        Rows are padded behind, where nothing before it looks.
        """
        longest, device = len(inputs[0]), self.model.embed.matrix.device
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs], device=device)
        hidden = self.model.hidden(ids)
        picked = torch.cat([hidden[row, n - len(own) : n] for (row, n), own in zip(places, targets, strict=True)])
        labels = torch.tensor([token for own in targets for token in own], dtype=torch.long, device=device)
        costs, greedy = [], []
        size = max(1, CHUNK_BYTES // (8 * self.model.config.vocabulary))  # logits and their softmax, in float32
        for start in range(0, len(labels), size):
            logits, own = self.model.logits(picked[start : start + size]).float(), labels[start : start + size]
            costs.append(F.cross_entropy(logits, own, reduction="none").double())
            greedy.append(logits.argmax(dim=1) == own)
        lengths = [len(own) for own in targets]
        parts = zip(torch.cat(costs).split(lengths), torch.cat(greedy).split(lengths), strict=True)
        return [(-float(nats.sum()), bool(hit.all())) for nats, hit in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What follows each prompt, up to a stop string of its own, an end token or its limit of tokens."""
        asked = [self._asked(*request.args, seed=number) for number, request in enumerate(requests)]
        self._warn_of_cut([one.cut for one in asked], "prompt")
        together: dict[frozenset[int], list[int]] = {}
        for number, one in enumerate(asked):
            together.setdefault(one.stop_ids, []).append(number)
        answers = [""] * len(asked)
        with self.report.progress(len(asked), "Writing answers") as bar:
            for stop_ids, numbers in together.items():
                engine = self._engine([asked[number].request for number in numbers], stop_ids)
                streams = [engine.submit(asked[number].request) for number in numbers]
                for number, stream in zip(numbers, streams, strict=True):
                    answers[number] = _answer(engine, stream)
                    bar.advance()
        return answers

    def _engine(self, requests: Sequence[Request], stop_ids: frozenset[int]) -> Engine:
        max_len = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
        limits = Limits(slots=min(self.batch, len(requests)), max_len=max_len, queue=len(requests))
        return Engine(self.model, self.tokenizer, base="model", limits=limits, stop_ids=stop_ids)

    def _asked(self, prompt: str, asked: Mapping[str, Any], *, seed: int) -> _Asked:
        """A prompt with a task's `generation_kwargs`.

        Of a prompt that leaves no room for its answer the beginning is cut off. A stop string may name a control
        token, which an answer's text never shows: it is told by its id.
        """
        options = dict(normalize_gen_kwargs(dict(asked), NEW_TOKENS))
        for name in sorted(options.keys() - _KNOWN - self._told):
            self._told.add(name)
            self.report.warn(f"A task asks for generation with {name}, which octavo does not know and leaves out.")
        max_len = self.max_length - options["max_gen_toks"]
        if max_len < 1:
            raise UsageError(
                f"A task asks for {options['max_gen_toks']:,} new tokens; the model's context is {self.max_length:,}.",
                hint="Lower max_gen_toks in the task's generation_kwargs.",
            )
        ids = self.tok_encode(prompt) or [self.prefix_token_id]
        control = coder_of(self.tokenizer).control_ids
        sampling = Sampling(
            temperature=float(options.get("temperature", 0.0)),
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 1.0)),
            repetition_penalty=float(options.get("repetition_penalty", 1.0)),
            max_new_tokens=options["max_gen_toks"],
            stop=tuple(word for word in options["until"] if word),
            seed=seed,
        )
        stop_ids = {control[word] for word in options["until"] if word in control}
        return _Asked(
            Request(tuple(ids[-max_len:]), sampling), frozenset({*self.stop_ids, *stop_ids}), len(ids) - max_len
        )

    def _warn_of_cut(self, excess: Sequence[int], what: str) -> None:
        """Says how many texts or prompts lost their beginning."""
        if cut := sum(1 for tokens in excess if tokens > 0):
            self.report.warn(f"{cut:,} {what}{'s' * (cut > 1)} did not fit the context and lost the beginning.")


def _answer(engine: Engine, stream: Stream) -> str:
    """The whole text of a stream."""
    tokens = until_finished(engine, stream)
    if tokens[-1].finish_reason == "error":
        raise ModelError(f"The model could not write an answer ({stream.error}).")
    return "".join(token.text for token in tokens)
