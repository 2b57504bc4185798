"""A loaded model with its tokenizer: generation and perplexity in this process."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from octavo.api.options import described_options, document, options_of, signature_of
from octavo.api.results import GenerateResult, Interval, Score
from octavo.bounded_json import encodable, shortened
from octavo.commands.data import encode, to_rows, with_windows
from octavo.commands.generate import continuation, prompt_ids, sampling_of
from octavo.config import Config, GenerateOptions, TextOptions, WindowOptions
from octavo.data.documents import Reading
from octavo.data.packing import trained_bytes
from octavo.data.prompt import encode_conversation
from octavo.data.records import from_text
from octavo.data.turns import Message
from octavo.errors import UsageError
from octavo.infer.generate import check_prompt
from octavo.infer.loaded_model import LoadedModel, answer
from octavo.infer.sample import Sampling
from octavo.intervals import interval
from octavo.metrics import score
from octavo.models import Decoder
from octavo.reporting import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_HINT = "help(octavo.LanguageModel.generate) lists the options."
_CHAT_HINT = 'A conversation is a list such as [{"role": "user", "content": "Who are you?"}].'
_EVALUATE_HINT = "help(octavo.LanguageModel.evaluate) describes the parameters."
ROWS = 8  # packed rows that are scored at once


@dataclass(frozen=True, eq=False, repr=False)
class LanguageModel:
    """A model that `octavo.load` returns.

    `decoder` is the PyTorch module, with the adapter applied: `decoder(ids)` are the logits (B, T, V) of token ids
    (B, T). `options` are the defaults of `generate`.
    """

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    options: GenerateOptions

    def __repr__(self) -> str:
        family, c = type(self.decoder.config).__module__.rpartition(".")[2], self.decoder.config
        return f"LanguageModel({family}, {c.layers} layers, width {c.width}, vocabulary {c.vocabulary:,})"

    def generate(self, prompt: str, **options: Any) -> GenerateResult:
        """Continues a text."""
        ids, sampling = self._prompt(prompt), self._sampling(options, "generate")
        return cast(GenerateResult, continuation(self._loaded, ids, sampling))

    def stream(self, prompt: str, **options: Any) -> Generator[str]:
        """The text of `generate`, piece by piece. Closing the generator ends the answer."""
        return _pieces(self._loaded, self._prompt(prompt), self._sampling(options, "stream"))

    def chat(self, messages: str | Sequence[Mapping[str, str]], **options: Any) -> GenerateResult:
        """The answer to a message, or to a conversation: {"role": "user", "content": ..}, .., by the chat template.

        UsageError for a model without one, and for a conversation that is longer than its context.
        """
        ids, sampling = self._conversation(messages), self._sampling(options, "chat")
        return cast(GenerateResult, continuation(self._loaded, ids, sampling))

    def stream_chat(self, messages: str | Sequence[Mapping[str, str]], **options: Any) -> Generator[str]:
        """The text of `chat`, piece by piece."""
        return _pieces(self._loaded, self._conversation(messages), self._sampling(options, "stream_chat"))

    @property
    def _loaded(self) -> LoadedModel:
        return LoadedModel(self.decoder, self.tokenizer, self.stop_ids)

    def _sampling(self, options: Mapping[str, Any], method: str) -> Sampling:
        """The options of one answer over those of `octavo.load`."""
        named = options_of(options, [name for name, _ in _OPTIONS], function=f"LanguageModel.{method}")
        values = {**self.options.model_dump(), **named}
        return sampling_of(Config.read((GenerateOptions,), values, shown=str, hint=_HINT)[GenerateOptions])

    def _prompt(self, prompt: object) -> list[int]:
        if not isinstance(prompt, str):
            raise _mistyped("prompt", "a string", prompt, hint=_HINT)
        return _checked(prompt_ids(prompt, self.tokenizer, chat=False))

    def _conversation(self, messages: object) -> list[int]:
        given = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        expected = 'a string, or a list of {"role": .., "content": ..}'
        if not isinstance(given, Sequence) or isinstance(given, bytes) or not given:
            raise _mistyped("messages", expected, messages, hint=_CHAT_HINT)
        if not all(isinstance(each, Mapping) and each.keys() == {"role", "content"} for each in given):
            raise _mistyped("messages", expected, messages, hint=_CHAT_HINT)
        if not all(isinstance(part, str) and encodable(part) for each in given for part in each.values()):
            raise _mistyped("messages", "Unicode text", messages, hint=_CHAT_HINT)
        turns = [Message(each["role"], each["content"]) for each in given]
        return _checked(encode_conversation(turns, self.tokenizer))

    def evaluate(
        self,
        text: str | Sequence[str],
        *,
        seq_len: int | None = None,
        stride: int | None = None,
        window: int | None = None,
    ) -> Score:
        """How well the model predicts a text, or several documents, packed into rows of `seq_len` tokens.

        The default is that of `octavo evaluate`, at most the model's context. With a `stride` a sliding window of
        `window` tokens moves by so many instead; its default is 1024, at most the context. UsageError without a token
        to predict.
        """
        context = self.decoder.config.context
        given = {
            "seq_len": min(TextOptions().seq_len, context) if seq_len is None else seq_len,
            "stride": stride,
            "window": window,
        }
        config = Config.read((TextOptions, WindowOptions), given, shown=str, hint=_EVALUATE_HINT)
        options = config[TextOptions]
        length = options.seq_len
        if length > context:
            raise UsageError(f"seq_len {length:,} is more than the model's context of {context:,} tokens.")
        texts = list(text) if isinstance(text, Sequence) and not isinstance(text, str | bytes) else [text]
        if not all(isinstance(each, str) for each in texts):
            raise _mistyped("text", "a string, or a list of strings", text, hint=_EVALUATE_HINT)
        if wrong := [number for number, each in enumerate(texts, 1) if not encodable(each)]:
            raise UsageError(
                f"Text {wrong[0]} is not Unicode text: it has a lone surrogate.", hint="Decode it from UTF-8."
            )
        reading = Reading([from_text(each, source=f"text {number}", line=0) for number, each in enumerate(texts, 1)])
        with Report(console=False) as report:
            encoded = encode(reading, options, self.tokenizer, report)
            packed = to_rows(encoded, options, self.tokenizer)
            rows = with_windows(packed, encoded, config, self.tokenizer, context=context).measurable(0)
        # The first token of a document is not predicted, and an EOS token has no bytes.
        if not rows or not (n_bytes := trained_bytes(rows, self.tokenizer)):
            raise UsageError("The text has no token to evaluate.", hint="Give a longer text, or a list of texts.")
        result = score(self.decoder, rows, n_bytes=n_bytes, batch_size=ROWS)
        bounds = interval(result.units) if result.units else None
        return {
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.tokens,
            "loss": result.loss,
            "interval": cast(Interval, asdict(bounds)) if bounds else None,
        }

    def perplexity(self, text: str | Sequence[str], *, seq_len: int | None = None) -> float:
        """e to the mean loss of a token of a text or of several documents; see `evaluate`."""
        return self.evaluate(text, seq_len=seq_len)["perplexity"]


def _checked(ids: list[int]) -> list[int]:
    """The ids of a prompt. UsageError if there are none."""
    check_prompt(ids, max_len=len(ids) + 1)
    return ids


def _pieces(loaded: LoadedModel, ids: list[int], sampling: Sampling) -> Generator[str]:
    """The text of an answer, without empty pieces."""
    with closing(answer(loaded.engine(max_len=len(ids) + sampling.max_new_tokens), ids, sampling)) as tokens:
        for token in tokens:
            if token.text:
                yield token.text


def _mistyped(name: str, expected: str, value: object, *, hint: str) -> UsageError:
    return UsageError(f"{name}: must be {expected}, not {shortened(repr(value))}.", hint=hint)


_OPTIONS = [(name, field) for name, field in GenerateOptions.model_fields.items() if name != "adapter"]
for _method in (LanguageModel.generate, LanguageModel.stream, LanguageModel.chat, LanguageModel.stream_chat):
    _parameters = inspect.signature(_method)
    _own = list(_parameters.parameters.values())[:2]  # self, and prompt or messages
    _signature = signature_of(_OPTIONS, before=_own, returns=_parameters.return_annotation)
    document(_method, _signature, described_options(_OPTIONS))
