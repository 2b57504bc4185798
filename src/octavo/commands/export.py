"""`octavo export`: writes a model, with or without an adapter merged, or an adapter alone as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Any

import torch

from octavo.adapters.merging import merged
from octavo.commands.loading import tokenizer_with
from octavo.commands.merge import adapter_and_base, check_base
from octavo.config import Config, ExportOptions
from octavo.errors import ModelError, UsageError
from octavo.models import parse
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.store.contents import refuse_embedded_adapter, stored_scheme
from octavo.store.gguf import open_gguf, shapes_of
from octavo.store.gguf_lora import write_lora
from octavo.store.gguf_sink import gguf_sink
from octavo.store.gguf_write_config import as_written, checked_architecture
from octavo.store.hf_folder import header_of, weight_names, write_tensors
from octavo.store.peft import Adapter
from octavo.store.resolve import open_source
from octavo.store.sinks import check_new_file
from octavo.store.sources import Source


def export(config: Config, report: Report) -> dict[str, Any]:
    """Writes the file `--out`, reads its header and tokenizer back, and returns the JSON result."""
    options, began = config[ExportOptions], monotonic()
    if options.model is None and options.adapter is None:
        raise UsageError("The model to export is missing.", hint="Name it with --model, or an adapter with --adapter.")
    if options.to == "gguf-lora" and options.adapter is None:
        raise UsageError("--to gguf-lora writes an adapter alone.", hint="Name the adapter with --adapter.")
    out = _out(options)
    name, source, adapter, folder = _opened(options, report)
    stored = stored_scheme(source).name
    result = {
        "out": str(out),
        "to": options.to,
        "type": options.type,
        "model": name,
        "model_scheme": stored,
        "adapter": None if folder is None else str(folder),
        "adapter_sha256": None if adapter is None else adapter.sha256,
    }
    if options.to == "gguf-lora":
        assert adapter is not None
        kind = torch.float32 if options.type == "f32" else torch.float16
        size = write_lora(out, adapter, source.config, name=out.stem, dtype=kind)
        report.result(f"{out}: {size / 2**20:,.1f} MiB, LoRA of {len(adapter.lora)} modules for {name} as GGUF.")
        return {**result, "bytes": size, "seconds": monotonic() - began}
    if stored != "none":
        report.say(f"{name} is quantized: the file has its dequantized {stored} weights, and their error.")
    if adapter is not None:
        source = merged(source, adapter, tokenizer=tokenizer_with(adapter, folder, source, report))
    size = _write(source, out, options.type, report)
    report.result(f"{out}: {size / 2**20:,.1f} MiB of {options.type}. llama.cpp, Ollama and LM Studio open it.")
    return {**result, "bytes": size, "seconds": monotonic() - began}


def _out(options: ExportOptions) -> Path:
    if options.out is None:
        raise UsageError("The output file is missing.", hint="Name a new file with --out, as model.gguf.")
    out = options.out if options.out.suffix == ".gguf" else options.out.with_name(f"{options.out.name}.gguf")
    check_new_file(out)  # before hashes of gigabytes are computed
    return out


def _opened(options: ExportOptions, report: Report) -> tuple[str, Source, Adapter | None, Path | None]:
    """(name of the model, its source, the adapter, its folder)."""
    if options.adapter is None:
        assert options.model is not None
        source = open_source(options.model, revision=options.revision, allow_pickle=options.allow_pickle, report=report)
        refuse_embedded_adapter(source)
        checked_architecture(source.config)
        return options.model, source, None, None
    folder, adapter, name, source = adapter_and_base(options, options.adapter, report)
    checked_architecture(source.config)  # before hashes of gigabytes are computed
    check_base(adapter, folder, source, report, force=options.force)
    return name, source, adapter, folder


def _write(source: Source, out: Path, kind: str, report: Report) -> int:
    """Writes the model; ModelError if the file would be read as another one than it was written from."""
    none = scheme_named("none")
    header = header_of(source, none)
    with (
        report.progress(len(weight_names(source)), f"Writing {out} ({kind})") as bar,
        gguf_sink(out, header, shapes_of(header.config), kind, name=out.stem) as sink,
    ):
        size = write_tensors(source, none, sink, on_layer=lambda _: bar.advance())
    again = open_gguf(out)
    if parse(again.config) != parse(as_written(header.config)):
        out.unlink()
        raise ModelError(
            f"{out} is removed: llama.cpp would compute another model than this config.json describes.",
            hint="Write a Hugging Face folder with `octavo merge` instead.",
        )
    again.tokenizer()
    return size
