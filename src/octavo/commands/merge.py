"""`octavo merge`: merges an adapter into its base and writes the result as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from octavo.adapters.merging import merged
from octavo.bounded_json import shown
from octavo.commands.loading import tokenizer_with
from octavo.commands.merged_readme import MergedModel, merged_readme
from octavo.config import Config, ExportOptions, MergeOptions
from octavo.errors import AdapterError, ModelError, UsageError
from octavo.ops.quantize import scheme_named
from octavo.reporting import Report
from octavo.runs import adapter as named_adapter
from octavo.store.base_names import base_warning
from octavo.store.contents import refuse_embedded_adapter, stored_scheme
from octavo.store.hf_folder import WrittenLayer, error_of_all, weight_names, write_folder
from octavo.store.merged import MergedSource
from octavo.store.peft import Adapter
from octavo.store.resolve import open_if_here, open_source
from octavo.store.sinks import check_free
from octavo.store.sources import Source, fingerprint
from octavo.system import own_command, quoted

FLOATING = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(config: Config, report: Report) -> dict[str, Any]:
    """Writes the merged model into the folder `--out` and prints what was merged; returns the JSON result."""
    options, began = config[MergeOptions], monotonic()
    if options.adapter is None:
        raise UsageError("The adapter is missing.", hint="Name its folder, or that of its run, with --adapter.")
    if options.out is None:
        raise UsageError("The output folder is missing.", hint="Name a new folder with --out.")
    check_free(options.out)  # before hashes of gigabytes are computed
    folder, adapter, name, source = adapter_and_base(options, options.adapter, report)
    check_base(adapter, folder, source, report, force=options.force)
    tokenizer = tokenizer_with(adapter, folder, source, report)
    dtype = FLOATING.get(options.type, torch.float32)
    model = merged(source, adapter, dtype=dtype, tokenizer=tokenizer)
    stored = stored_scheme(source).name
    if stored != "none":
        report.say(
            f"The adapter is merged into dequantized {stored} weights: the unquantized base is not here. "
            "Give it with --model to merge without their error."
        )
    about = MergedModel(options.out.absolute().name, name, stored, folder, options.type, model)
    layers, total = _write(options, model, merged_readme(about), report)
    _print(options, model, layers, total, report)
    return {
        "out": str(options.out),
        "type": options.type,
        "base": name,
        "base_scheme": stored,
        "adapter": str(folder),
        "adapter_sha256": adapter.sha256,
        "modules": [{"name": each, "merged": kinds} for each, kinds in model.merged().items()],
        "bytes": total,
        "seconds": monotonic() - began,
        "error": error_of_all(layers) if options.type not in FLOATING else None,
        "layers": [{"name": x.name, "shape": list(x.shape), "bytes": x.stored_bytes, "error": x.error} for x in layers],
    }


def adapter_and_base(
    options: MergeOptions | ExportOptions, named: Path, report: Report
) -> tuple[Path, Adapter, str, Source]:
    """(folder of the adapter `named`, the adapter, name of its base, the base). `check_base` compares the two."""
    find = partial(named_adapter.adapter_folder, say=report.say, warn=report.warn)
    folder, adapter = named_adapter.read_adapter(named, find=find, allow_pickle=options.allow_pickle)
    return folder, adapter, *base_of(options, adapter, report)


def base_of(options: MergeOptions | ExportOptions, adapter: Adapter, report: Report) -> tuple[str, Source]:
    """(name, source) of the base to merge into: --model, or the one that the adapter names if it is on this machine.

    In place of a quantized --model it is the same model unquantized, if the adapter names that one and it is here.
    UsageError if there is none.
    """
    given = None
    if options.model is not None:
        given = open_source(options.model, revision=options.revision, allow_pickle=options.allow_pickle, report=report)
        refuse_embedded_adapter(given)
        if stored_scheme(given).name == "none":
            return options.model, given
    identity = adapter.trained_on if given is None else fingerprint(given)
    found = dict(_bases_here(adapter, identity, options, report))
    plain = next((name for name, source in found.items() if stored_scheme(source).name == "none"), None)
    if plain is not None:
        if given is not None:
            report.say(f"{options.model} is quantized. The adapter is merged into the same model unquantized, {plain}.")
        return plain, found[plain]
    if given is not None:
        assert options.model is not None
        return options.model, given
    if found:
        return next(iter(found.items()))
    names = " or ".join(map(shown, _base_names(adapter)))
    others = "" if identity is None else ", or has other weights there than those that the adapter was trained on"
    raise UsageError(
        f"{adapter.named} names {f'the base {names}, which is not on this machine{others}' if names else 'no base'}.",
        hint="Give its base with --model: a folder, a .gguf file or a hub id, which is downloaded.",
    )


def _bases_here(
    adapter: Adapter, identity: str | None, options: MergeOptions | ExportOptions, report: Report
) -> Iterator[tuple[str, Source]]:
    """(name, source) of the models on this machine that the adapter names, with the weights `identity` if not None."""
    for name in _base_names(adapter):
        source = open_if_here(name, allow_pickle=options.allow_pickle, report=report)
        if source is not None and identity in (None, fingerprint(source)):
            yield name, source


def _base_names(adapter: Adapter) -> list[str]:
    """What the adapter calls its base: the --model of its training, and the hub id or path for PEFT."""
    recorded = adapter.origin.get("base")
    trained = recorded.get("name") if isinstance(recorded, dict) else None
    return [name for name in dict.fromkeys((trained, adapter.base)) if isinstance(name, str) and name]


def check_base(adapter: Adapter, folder: Path, source: Source, report: Report, *, force: bool) -> None:
    """AdapterError if the adapter was trained on other weights, unless `force`; a warning if only names differ."""
    if not (warning := base_warning(adapter, folder, source)):
        return
    if adapter.trained_on is not None and not force:
        raise AdapterError(
            warning, hint="Give the base that it was trained on with --model, or --force to merge it all the same."
        )
    report.warn(warning)


def _write(options: MergeOptions, model: MergedSource, readme: str, report: Report) -> tuple[list[WrittenLayer], int]:
    """Writes the folder; (its frozen weights, the bytes of its tensors)."""
    assert options.out is not None
    scheme = scheme_named("none" if options.type in FLOATING else options.type)
    layers: list[WrittenLayer] = []
    with report.progress(len(weight_names(model)), f"Writing {options.out} ({options.type})") as bar:

        def on_layer(layer: WrittenLayer) -> None:
            layers.append(layer)
            bar.advance()

        try:
            return layers, write_folder(model, options.out, scheme, on_layer=on_layer, readme=readme)
        except ModelError as error:
            error.hint = error.hint.replace("--scheme", "--type")
            raise


def _print(options: MergeOptions, model: MergedSource, layers: list[WrittenLayer], total: int, report: Report) -> None:
    kinds: dict[tuple[str, str], int] = {}
    for name, merged_kinds in model.merged().items():
        key = (name.rpartition(".")[2], ", ".join(merged_kinds))
        kinds[key] = kinds.get(key, 0) + 1
    title = f"{options.out}: {total / 2**20:,.1f} MiB in {options.type}"
    report.table(title, ["module", "merged", "count"], [[*key, count] for key, count in kinds.items()], result=True)
    if options.type not in FLOATING:
        report.table(
            "Quantization of the merged weights",
            ["layer", "shape", "MiB", "relative error"],
            [[x.name, f"{x.shape[0]} x {x.shape[1]}", x.stored_bytes / 2**20, x.error] for x in layers],
            result=True,
        )
        report.result(f"The relative error of all quantized weights is {error_of_all(layers):.4f}.")
    report.result(f"Next: {own_command()} generate {quoted(['--model', str(options.out)])} --prompt '..'")
