"""The model class for lm-evaluation-harness: log-likelihoods of texts, and generation.

The scored tokens follow lm-eval's class for transformers (`hf`), so that results compare with published ones. They
differ from octavo's own perplexity: the first token of a text is scored too, given the BOS token (else the EOS token);
the EOS token is not scored; and strings of control tokens in a text are encoded as control tokens, since tasks contain
chat templates. If a model's texts start with a BOS token, contexts and prompts get one. A whole text
(`loglikelihood_rolling`) is scored after one BOS token and gets no second one, as in lm-eval's API clients.

Importing this file needs lm-eval (the extra octavo[eval]).

Legend: B rows of a batch, T positions, d the width of the model, V its vocabulary, N scored tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from octavo.data.encoding import bos_ids, coder_of
from octavo.errors import ModelError, UsageError
from octavo.fused.loss import CHUNK_BYTES
from octavo.infer.engine import Engine
from octavo.infer.loaded_model import LoadedModel, until_finished
from octavo.infer.requests import Limits, Request, Stream
from octavo.infer.sample import Sampling
from octavo.reporting import Report

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  # default limit of generation, that of lm-eval
# Supported generation_kwargs of a task. `normalize_gen_kwargs` handles "do_sample": without it the temperature is 0.
_SUPPORTED = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}

ToScore = tuple[Any, list[int], list[int]]  # lm-eval's: (texts, ids of the context, ids of the continuation)


class _End(NamedTuple):
    """Where a continuation ends: position `length` - 1 of row `row` predicts its last token."""

    row: int
    length: int  # of the row, in tokens


@dataclass(frozen=True)
class _Generation:
    """A request with its stop ids. `excess` is the number of prompt tokens beyond the context (0 or less: it fits)."""

    request: Request
    stop_ids: frozenset[int]
    excess: int


class OctavoLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """The model for `lm_eval.evaluate`. `batch` is the number of texts, or of generated answers, in a batch."""

    def __init__(self, loaded: LoadedModel, *, batch: int, report: Report) -> None:
        super().__init__()
        self.model, self.tokenizer, self.stop_ids = loaded.model.eval(), loaded.tokenizer, loaded.stop_ids
        self.batch, self.report = batch, report
        self._begin = bos_ids(loaded.tokenizer)
        self._warned: set[str] = set()  # unsupported generation_kwargs that were reported

    @property
    def max_length(self) -> int:
        return self.model.config.context

    @property
    def eot_token_id(self) -> int | None:
        end = self.tokenizer.eos_token_id
        return None if end is None else int(end)

    @property
    def prefix_token_id(self) -> int:
        """The token from which the first token of a text is predicted: BOS, else EOS."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError("The tokenizer has no BOS token and no EOS token.", hint="Set one in its config.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after the model's BOS token unless that is excluded or present already."""
        ids: list[int] = coder_of(self.tokenizer).control.encode(string, add_special_tokens=False).ids
        bare = add_special_tokens is False or ids[: len(self._begin)] == self._begin
        return ids if bare else [*self._begin, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(sum of log p in nats, whether greedy decoding gives it) of each continuation in its context."""
        # Always without lm-eval's bar, in all methods: `report` shows octavo's own.
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods (nats) of whole texts; one longer than the context is split, each token counts once."""
        windows: list[ToScore] = []
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
    def _loglikelihood_tokens(self, requests: Sequence[ToScore], **_: Any) -> list[tuple[float, bool]]:
        """As `loglikelihood`, for ids. Requests that differ only in their last token share one row."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            if continuation:  # the score of an empty continuation is 0
                rows.setdefault(self._inputs(context, continuation), []).append(number)
        longest_first = sorted(rows, key=len, reverse=True)  # so that running out of memory happens at once
        scores = [(0.0, True)] * len(requests)
        with self.report.progress(sum(map(len, rows.values())), "Scoring texts") as bar:
            for start in range(0, len(longest_first), self.batch):
                inputs = longest_first[start : start + self.batch]
                pairs = [(row, number) for row, ids in enumerate(inputs) for number in rows[ids]]
                targets = [requests[number][2] for _, number in pairs]
                ends = [_End(row, len(inputs[row])) for row, _ in pairs]
                for (_row, number), score in zip(pairs, self._scores(inputs, ends, targets), strict=True):
                    scores[number] = score
                bar.advance(len(pairs))
        self._warn_of_truncation([self._excess(context, rest) for _, context, rest in requests], "text")
        return scores

    def _excess(self, context: list[int], continuation: list[int]) -> int:
        """Input tokens beyond the model's context; 0 or less if all fit. The last token of a text is no input."""
        return len(context) + len(continuation) - 1 - self.max_length

    def _inputs(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """The input ids: all except the last token; only the end of a text that is longer than the context.

        UsageError for a continuation that is itself longer: a part of it would be scored without its context.
        """
        if len(continuation) > self.max_length:
            raise UsageError(
                f"A task has an answer of {len(continuation):,} tokens; the model's context is {self.max_length:,}.",
                hint="Use a model with a longer context, or leave this task out.",
            )
        return tuple((context + continuation)[max(0, self._excess(context, continuation)) : -1])

    def _scores(
        self, inputs: Sequence[tuple[int, ...]], ends: Sequence[_End], targets: Sequence[list[int]]
    ) -> list[tuple[float, bool]]:
        """The score of each of `targets`, the ids of continuations, which end at `ends`.

        Rows are padded on the right, where causal attention of earlier positions does not see the padding.
        """
        longest, device = len(inputs[0]), self.model.embed.matrix.device
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs], device=device)  # (B, T)
        hidden = self.model.hidden(ids)  # (B, T, d)
        picked = torch.cat(
            [hidden[end.row, end.length - len(target) : end.length] for end, target in zip(ends, targets, strict=True)]
        )  # (N, d)
        labels = torch.tensor(
            [token for target in targets for token in target], dtype=torch.long, device=device
        )  # (N,)
        losses, greedy = [], []
        size = max(1, CHUNK_BYTES // (8 * self.model.config.vocabulary))  # logits and their softmax, in float32
        for start in range(0, len(labels), size):
            logits = self.model.logits(picked[start : start + size]).float()  # (chunk, V)
            chunk = labels[start : start + size]
            losses.append(F.cross_entropy(logits, chunk, reduction="none").double())
            greedy.append(logits.argmax(dim=1) == chunk)
        lengths = [len(target) for target in targets]
        parts = zip(torch.cat(losses).split(lengths), torch.cat(greedy).split(lengths), strict=True)
        return [(-float(nats.sum()), bool(hit.all())) for nats, hit in parts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The continuation of each prompt, up to one of its stop strings, an EOS token or its limit of tokens."""
        # A seed of its own for each request: prompts that a task repeats get different samples, the same in every run.
        generations = [self._generation(*request.args, seed=number) for number, request in enumerate(requests)]
        self._warn_of_truncation([generation.excess for generation in generations], "prompt")
        by_stop_ids: dict[frozenset[int], list[int]] = {}  # an engine has one set of stop ids
        for number, generation in enumerate(generations):
            by_stop_ids.setdefault(generation.stop_ids, []).append(number)
        answers = [""] * len(generations)
        with self.report.progress(len(generations), "Generating answers") as bar:
            for stop_ids, numbers in by_stop_ids.items():
                engine = self._engine([generations[number].request for number in numbers], stop_ids)
                streams = [engine.submit(generations[number].request) for number in numbers]
                for number, stream in zip(numbers, streams, strict=True):
                    answers[number] = _answer(engine, stream)
                    bar.advance()
        return answers

    def _engine(self, requests: Sequence[Request], stop_ids: frozenset[int]) -> Engine:
        max_len = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
        limits = Limits(slots=min(self.batch, len(requests)), max_len=max_len, queue=len(requests))
        # No request names a model, so the name of the base is never used.
        return Engine(self.model, self.tokenizer, base="model", limits=limits, stop_ids=stop_ids)

    def _generation(self, prompt: str, generation_kwargs: Mapping[str, Any], *, seed: int) -> _Generation:
        """The request of a prompt with a task's `generation_kwargs`.

        A prompt that leaves no space for its answer in the context is truncated on the left. A stop string may be a
        control token, which does not occur in an answer's text: it becomes a stop id.
        """
        options = dict(normalize_gen_kwargs(dict(generation_kwargs), NEW_TOKENS))
        for name in sorted(options.keys() - _SUPPORTED - self._warned):
            self._warned.add(name)
            self.report.warn(f"The generation_kwargs of a task have {name}, which octavo does not support and ignores.")
        max_len = self.max_length - options["max_gen_toks"]
        if max_len < 1:
            raise UsageError(
                f"A task generates {options['max_gen_toks']:,} new tokens; the model's context is {self.max_length:,}.",
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
            stop=tuple(text for text in options["until"] if text),
            seed=seed,
        )
        stop_ids = {control[text] for text in options["until"] if text in control}
        return _Generation(
            Request(tuple(ids[-max_len:]), sampling), frozenset({*self.stop_ids, *stop_ids}), len(ids) - max_len
        )

    def _warn_of_truncation(self, excess: Sequence[int], kind: str) -> None:
        """Reports how many texts or prompts were truncated."""
        if count := sum(1 for tokens in excess if tokens > 0):
            self.report.warn(f"{count:,} {kind}{'s' * (count > 1)} did not fit the context and lost the beginning.")


def _answer(engine: Engine, stream: Stream) -> str:
    """The whole text of a stream. ModelError if the engine failed."""
    tokens = until_finished(engine, stream)
    if tokens[-1].finish_reason == "error":
        raise ModelError(f"The model could not generate an answer ({stream.error}).")
    return "".join(token.text for token in tokens)
