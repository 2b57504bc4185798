"""What the commands share: opening a model, its adapter and its tokenizer.

Functions take a `Config` and a `Report` and return what `--json` prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from octavo.bounded_json import shown
from octavo.config import ModelOptions
from octavo.errors import AdapterError, ModelError, UsageError
from octavo.hardware import Hardware, pick
from octavo.models import Model
from octavo.ops.quantize import Scheme, scheme_named
from octavo.reporting import Report
from octavo.store import peft
from octavo.store.base_names import base_warning
from octavo.store.contents import refuse_embedded_adapter, stored_scheme
from octavo.store.embedded_adapter import apply_embedded_adapter_, base_of
from octavo.store.peft import Adapter
from octavo.store.resolve import open_source
from octavo.store.sources import Source
from octavo.store.tokenizer_files import VOCABULARY_FILES, check_ids, load_tokenizer
from octavo.store.weights import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_END_IDS = 1000


def open_model(options: ModelOptions, report: Report, *, own_adapters: bool = False, weights: bool = True) -> Source:
    """The source of the base model, not yet loaded. ModelError if it carries adapters, unless `own_adapters`.

    Without `weights` they are not even fetched.
    """
    source = open_source(
        options.model, revision=options.revision, allow_pickle=options.allow_pickle, weights=weights, report=report
    )
    if not own_adapters:
        refuse_embedded_adapter(source)
    return source


def opened(options: ModelOptions, report: Report, *, own_adapters: bool = False) -> tuple[Hardware, Source]:
    """(what the work runs on, which is said; the source of the base model as `open_model` gives it)."""
    hardware = pick(options.device, options.dtype)
    report.say(hardware.reason)
    return hardware, open_model(options, report, own_adapters=own_adapters)


def chosen_scheme(options: ModelOptions, source: Source) -> Scheme:
    """The scheme asked for; auto takes the folder's own, and int8 where it has none."""
    if options.scheme != "auto":
        return scheme_named(options.scheme)
    stored = stored_scheme(source)
    return stored if stored.name != "none" else scheme_named("int8")


def load_model(source: Source, scheme: Scheme, hardware: Hardware, report: Report) -> Model:
    """The model, with a bar while its weights come in, and with the adapters on it that its source carries."""
    base = base_of(source)
    with report.progress(len(base.names()), f"Loading weights ({scheme.name})") as bar:
        model = load(base, scheme, dtype=hardware.dtype, device=hardware.device, progress=lambda *_: bar.advance())
    apply_embedded_adapter_(model, source, say=report.say)
    return model


def read_adapter(folder: Path, source: Source, report: Report, *, allow_pickle: bool = False) -> Adapter:
    """The adapter of a folder, for the model of `source`; warns if it was trained on other weights."""
    read = peft.read(folder, allow_pickle=allow_pickle)
    if warning := base_warning(read, folder, source):
        report.warn(warning)
    return read


def tokenizer_with(
    adapter: Adapter | None, folder: Path | None, source: Source, report: Report
) -> PreTrainedTokenizerFast:
    """The tokenizer for the model of `source` with an adapter on it.

    An adapter that changes the vocabulary's tables may bring a tokenizer with more tokens or another chat template:
    that one is taken then. ModelError or AdapterError if the tokenizer has tokens beyond the tables.
    """
    if adapter is None or folder is None or (rows := adapter.vocabulary) is None:
        return source.tokenizer()
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        tokenizer = load_tokenizer(folder)
        report.say(f"The adapter brings an embedding: its own tokenizer ({len(tokenizer):,} tokens) is used.")
        check_ids(tokenizer, rows, where=str(folder))
        return tokenizer
    tokenizer = source.tokenizer()
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise AdapterError(
            f"The embedding in the adapter {folder} has {rows:,} rows; the model's tokenizer has the token {last:,}.",
            hint="Give the model that it was trained on, or put the tokenizer's files that it was trained with into "
            "its folder.",
        )
    return tokenizer


def check_context(model_context: int, seq_len: int) -> None:
    """UsageError if rows are longer than what the model was made for."""
    if seq_len > model_context:
        raise UsageError(
            f"--seq-len {seq_len:,} is more than the model's context of {model_context:,} tokens.",
            hint=f"Use --seq-len {model_context} or less.",
        )


def end_ids(source: Source) -> tuple[int, ...]:
    """The end tokens that a model's configs name, besides the tokenizer's. ModelError if they are no ids."""
    found: list[int] = []
    for config in (source.config, source.generation_config):
        named = config.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if len(ids) > MOST_END_IDS or not all(type(number) is int and 0 <= number < 2**31 for number in ids):
            raise ModelError(f"The model's eos_token_id is {shown(named)}; it must be an id or a list of ids.")
        found += ids
    return tuple(found)
