"""`octavo adapters combine`: writes the weighted sum of adapters as one adapter in PEFT's format."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from octavo._version import __version__
from octavo.adapters.combination import Combination, Weighted, combined, modules_of
from octavo.adapters.low_rank import Truncated
from octavo.bounded_json import read_object, shown
from octavo.commands.adapters.opening import OpenedAdapter, base_text, open_adapter, open_base, with_names_of
from octavo.commands.adapters.readme import ParentAdapter, combined_readme
from octavo.config import AdapterCombineOptions, Config
from octavo.errors import AdapterError, UsageError
from octavo.models import layer_of
from octavo.reporting import Report
from octavo.store import peft
from octavo.store.base_names import is_same_name, licence_of
from octavo.store.files import new_folder
from octavo.store.peft_config import CONFIG
from octavo.store.sinks import check_free
from octavo.store.tokenizer_files import OTHER_FILES, VOCABULARY_FILES
from octavo.system import own_command, quoted

EXAMPLE = "octavo adapters combine runs/a=0.7 runs/b=0.3 --out combined"
TOKENIZER_FILES = (*VOCABULARY_FILES, *OTHER_FILES, "chat_template.jinja")


def combine(config: Config, report: Report) -> dict[str, Any]:
    """Writes the sum of adapters into --out; prints and returns what it is made of, and the error of --rank."""
    options = config[AdapterCombineOptions]
    weights = weights_of(options.adapters)
    if options.out is None:
        raise UsageError("The output folder is missing.", hint=f"Name a new folder with --out: {EXAMPLE}")
    check_free(options.out)
    opened = [open_adapter(name, config, report) for name in weights]
    opened = [opened[0], *(with_names_of(opened[0], one) for one in opened[1:])]
    check_bases(opened, force=options.force, report=report)
    base = open_base(config, opened, report)
    parts = [Weighted(weight, one.adapter) for weight, one in zip(weights.values(), opened, strict=True)]
    result = combined(parts, rank=options.rank, base=base.tensor if base is not None else None)
    parents = [
        ParentAdapter(short_name(one), weight, one.adapter.sha256)
        for weight, one in zip(weights.values(), opened, strict=True)
    ]
    modules = set(base.modules) if base is not None else modules_of(parts, result.adapter)
    _write(options.out, result, opened, parents, modules, report)
    document = {
        "out": str(options.out),
        "sha256": peft.read(options.out).sha256,
        "parents": [{**one.to_dict(), "folder": str(each.folder)} for one, each in zip(parents, opened, strict=True)],
        "base": {"name": opened[0].base_name or None, "sha256": _shared_hash(opened)},
        "rank": max((len(a) for a, _, _ in result.adapter.lora.values()), default=0),
        "error": result.error,
        "modules": [
            {"name": name, "layer": layer_of(name), "rank": len(one.change[0]), "error": one.error}
            for name, one in result.truncated.items()
        ],
        "in_full": sorted(result.adapter.full),
    }
    _show(document, result, options.rank, report)
    return document


def weights_of(arguments: Sequence[str]) -> dict[str, float]:
    """Adapter -> weight, from arguments ADAPTER=WEIGHT. UsageError for another form, and for an adapter twice."""
    if not arguments:
        raise UsageError("The adapters are missing.", hint=f"Name each with its weight: {EXAMPLE}")
    weights: dict[str, float] = {}
    for argument in arguments:
        name, equals, text = argument.rpartition("=")
        if not equals or not name or (os.path.exists(argument) and not os.path.exists(name)):
            raise UsageError(
                f"{shown(argument)} is not ADAPTER=WEIGHT.", hint=f"Name each adapter with its weight: {EXAMPLE}"
            )
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UsageError(
                f"{shown(argument)}: the weight {shown(text)} is no number.",
                hint=f"A weight is a finite number, as 0.7, 1 or -0.5: {EXAMPLE}",
            )
        if any(Path(name).absolute() == Path(other).absolute() for other in weights):
            raise UsageError(f"{name} is given twice.", hint="Give it once, with the sum of the weights.")
        weights[name] = weight
    return weights


def check_bases(opened: Sequence[OpenedAdapter], *, force: bool, report: Report) -> None:
    """AdapterError if two of the adapters have other base hashes; with `force` a warning.

    Where a hash is not known, names that differ are a warning.
    """
    known = [one for one in opened if one.adapter.trained_on]
    for one, other in pairwise(known):
        if one.adapter.trained_on != other.adapter.trained_on:
            text = f"{one.name} and {other.name} were trained on different base weights: "
            text += f"{base_text(one)} and {base_text(other)}."
            if not force:
                hint = "Combine adapters of one base. If you know that the bases are the same model, add --force."
                raise AdapterError(text, hint=hint)
            report.warn(text)
    if len(known) < len(opened):
        named = [one for one in opened if one.base_name]
        for one, other in pairwise(named):
            if not is_same_name(one.base_name, other.base_name):
                report.warn(
                    f"{one.name} names {shown(one.base_name)} as its base, and {other.name} "
                    f"{shown(other.base_name)}; check that they are the same model."
                )


def short_name(opened: OpenedAdapter) -> str:
    """The name of an adapter without the folders of this machine: the last part, of a folder `adapter` the last two."""
    parts = Path(opened.name).absolute().parts
    return "/".join(parts[-2:] if parts[-1] == "adapter" else parts[-1:])


def _shared_hash(opened: Sequence[OpenedAdapter]) -> str | None:
    """The base hash of all of the adapters; None if they differ, or one has none."""
    hashes = {one.adapter.trained_on for one in opened}
    return hashes.pop() if len(hashes) == 1 else None


def _write(
    out: Path,
    result: Combination,
    opened: Sequence[OpenedAdapter],
    parents: Sequence[ParentAdapter],
    modules: set[str],
    report: Report,
) -> None:
    """Writes the folder: PEFT's files, octavo.json, README.md, and a tokenizer if the adapter has its own embedding."""
    base_name = next((one.base_name for one in opened if one.base_name), "")
    recorded = opened[0].adapter.origin.get("base")
    origin: dict[str, Any] = {"version": __version__, "combined": [one.to_dict() for one in parents]}
    if _shared_hash(opened) is not None and isinstance(recorded, dict):
        origin["base"] = recorded
    transposed = any(read_object(one.folder / CONFIG, error=AdapterError).get("fan_in_fan_out") for one in opened)
    adapter = replace(result.adapter, origin=origin, fan_in_fan_out=bool(transposed))
    readme = combined_readme(
        base_name, _shared_hash(opened), parents, ranks={len(a) for a, _, _ in adapter.lora.values()},
        error=result.error, licence=licence_of(base_name),
    )  # fmt: skip
    with new_folder(out) as folder:
        peft.fill(folder, adapter, modules=modules, biases=False, base=base_name, readme=readme)
        if adapter.vocabulary is not None:
            _copy_tokenizer(folder, opened, report)


def _copy_tokenizer(folder: Path, opened: Sequence[OpenedAdapter], report: Report) -> None:
    """Copies the tokenizer of the first adapter that has one; warns if another one has a different one."""
    having = [one for one in opened if any((one.folder / name).is_file() for name in VOCABULARY_FILES)]
    for name in TOKENIZER_FILES if having else ():
        contents = [(one.folder / name).read_bytes() for one in having if (one.folder / name).is_file()]
        if any(content != contents[0] for content in contents):
            report.warn(f"The adapters have different files {name}: that of {having[0].name} is copied.")
        if (having[0].folder / name).is_file():
            shutil.copyfile(having[0].folder / name, folder / name)


def _show(document: Mapping[str, Any], result: Combination, rank: int | None, report: Report) -> None:
    rows = [[one["name"], one["weight"], one["sha256"]] for one in document["parents"]]
    report.table(f"{document['out']}: the sum of", ["adapter", "weight", "SHA-256"], rows, result=True)
    if rank is None:
        report.result(f"LoRA of rank {document['rank']:,}: the sum is exact, up to the rounding of float32.")
    else:
        _show_errors(result.truncated, report)
        report.result(
            f"LoRA of rank {document['rank']:,}: what the SVD cut off has {100 * result.error:.3g} % of the norm of "
            "the sum."
        )
    report.result(
        f"Next: {own_command()} generate {quoted(['--adapter', Path(document['out'])])} --prompt '..' with the "
        "--model of its base."
    )


def _show_errors(truncated: Mapping[str, Truncated], report: Report) -> None:
    """The relative error of each module: a row a layer, a column a module type."""
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in truncated))
    layers = sorted({layer_of(name) for name in truncated}, key=lambda layer: (layer is None, layer))
    errors = {(layer_of(name), name.rpartition(".")[2]): one.error for name, one in truncated.items()}
    rows = [["-" if layer is None else layer, *(errors.get((layer, kind), "") for kind in kinds)] for layer in layers]
    report.table("Relative error of the SVD by layer and module", ["layer", *kinds], rows, result=True)
