"""Opening and loading of a model, its adapter and its tokenizer, for all commands."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.adapters import apply_, apply_embedded_adapter_, attached_text
from octavo.bounded_json import shown
from octavo.config import Config, ModelOptions, RunOptions, TextOptions
from octavo.errors import AdapterError, ModelError, UsageError
from octavo.hardware import Hardware, notice, pick, pretend_, restore_
from octavo.models import Decoder, parse
from octavo.ops.quantize import scheme_named
from octavo.ops.scheme import Scheme
from octavo.reporting import Report
from octavo.runs import adapter as named_adapter
from octavo.store.base_names import base_warning
from octavo.store.contents import refuse_embedded_adapter, stored_scheme
from octavo.store.embedded_adapter import base_of
from octavo.store.peft import Adapter
from octavo.store.resolve import open_source
from octavo.store.sources import Source
from octavo.store.tokenizer_files import VOCABULARY_FILES, check_ids, load_tokenizer
from octavo.store.weights import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_STOP_IDS = 1000


def open_model(options: ModelOptions, report: Report, *, own_adapters: bool = False, weights: bool = True) -> Source:
    """The source of the base model, not loaded yet. ModelError if it contains adapters, unless `own_adapters`.

    With `weights=False` the weights are not downloaded.
    """
    source = open_source(
        options.model, revision=options.revision, allow_pickle=options.allow_pickle, weights=weights, report=report
    )
    if not own_adapters:
        refuse_embedded_adapter(source)
    return source


def chosen_hardware(options: ModelOptions, report: Report) -> Hardware:
    """The device and the dtype of --device and --dtype, as the GPU of --pretend if that is given, which is reported.

    First ends the --pretend and the --gpu-memory of an earlier call in this process.
    """
    restore_()
    if options.pretend is None:
        return pick(options.device, options.dtype)
    here = pick(options.device)
    hardware = pretend_(options.pretend, here, options.dtype)
    report.warn(notice(options.pretend, here, hardware))
    return hardware


def opened(options: ModelOptions, report: Report, *, own_adapters: bool = False) -> tuple[Hardware, Source]:
    """(the hardware, after reporting it; the source of the base model, as from `open_model`)."""
    hardware = chosen_hardware(options, report)
    report.say(hardware.reason)
    return hardware, open_model(options, report, own_adapters=own_adapters)


def chosen_scheme(options: ModelOptions, source: Source) -> Scheme:
    """The scheme of --scheme; auto is the scheme of the checkpoint, int8 if it is not quantized."""
    if options.scheme != "auto":
        return scheme_named(options.scheme)
    stored = stored_scheme(source)
    return stored if stored.name != "none" else scheme_named("int8")


def load_model(source: Source, scheme: Scheme, hardware: Hardware, report: Report) -> Decoder:
    """Loads the model with a progress bar, and applies the adapters that its checkpoint contains."""
    base = base_of(source)
    with report.progress(len(base.names()), f"Loading weights ({scheme.name})") as bar:
        model = load(base, scheme, dtype=hardware.dtype, device=hardware.device, progress=bar.reach)
    apply_embedded_adapter_(model, source, say=report.say)
    return model


def read_adapter(path: Path, source: Source, report: Report, *, allow_pickle: bool = False) -> tuple[Path, Adapter]:
    """(folder, adapter) that --adapter names, for the model of `source`; warns if it was trained on another base.

    `runs.adapter` lists what can be named: a folder, a run, a checkpoint of a run.
    """
    find = partial(named_adapter.adapter_folder, say=report.say, warn=report.warn)
    folder, adapter = named_adapter.read_adapter(path, find=find, allow_pickle=allow_pickle)
    if warning := base_warning(adapter, folder, source):
        report.warn(warning)
    return folder, adapter


def apply_adapter(model: Decoder, adapter: Adapter, report: Report) -> None:
    """Applies an adapter to `model`, and says on which modules."""
    apply_(model, adapter)
    report.say(attached_text(adapter))


def tokenizer_with(
    adapter: Adapter | None, folder: Path | None, source: Source, report: Report
) -> PreTrainedTokenizerFast:
    """The tokenizer for the model of `source` with an adapter applied.

    An adapter that replaces the embedding matrix may contain a tokenizer with more tokens or another chat template,
    which then replaces the model's. ModelError or AdapterError if the tokenizer has ids beyond the embedding matrix.
    """
    if adapter is None or folder is None or (rows := adapter.vocabulary) is None:
        return source.tokenizer()
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        tokenizer = load_tokenizer(folder)
        report.say(f"The adapter has its own embedding: its tokenizer ({len(tokenizer):,} tokens) is used.")
        check_ids(tokenizer, rows, where=str(folder))
        return tokenizer
    tokenizer = source.tokenizer()
    if (last := max(tokenizer.get_vocab().values())) >= rows:
        raise AdapterError(
            f"The embedding of the adapter {folder} has {rows:,} rows; the model's tokenizer has the id {last:,}.",
            hint="Use the model that the adapter was trained on, or copy the tokenizer files of its training into its "
            "folder.",
        )
    return tokenizer


def with_fitting_rows(config: Config, source: Source, report: Report) -> Config:
    """The settings, with the model's context as row length if the default of --seq-len is more; says so."""
    context, length = parse(source.config).context, config[TextOptions].seq_len
    resumed = RunOptions in config.kinds and config[RunOptions].resume  # its settings contain the default
    given = "seq_len" in config[TextOptions].model_fields_set
    if length <= context or (given and not (resumed and length == TextOptions().seq_len)):
        return config
    report.say(f"Rows have {context:,} tokens, the model's context. The default of --seq-len, {length:,}, is more.")
    return config.replace(seq_len=context)


def check_context(model_context: int, seq_len: int) -> None:
    """UsageError if rows are longer than the context of the model."""
    if seq_len > model_context:
        raise UsageError(
            f"--seq-len {seq_len:,} is more than the model's context of {model_context:,} tokens.",
            hint=f"Use --seq-len {model_context} or less.",
        )


def end_ids(source: Source) -> tuple[int, ...]:
    """The EOS ids of a model's config and generation config. ModelError if they are not ids."""
    stop_ids: list[int] = []
    for config in (source.config, source.generation_config):
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > MAX_STOP_IDS or not all(type(number) is int and 0 <= number < 2**31 for number in ids):
            raise ModelError(f"The model's eos_token_id is {shown(value)}; it must be an id or a list of ids.")
        stop_ids += ids
    return tuple(stop_ids)
