"""The adapter that training starts from (--init-adapter): its settings become those of the run.

A run trains LoRA of one rank and scaling, all norms or none, and all biases of the targets or none. An adapter that
trains something else, such as a whole embedding matrix or single tokens, is refused: the run could not go on with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.adapters import ALL_LINEAR, Adapter, select
from octavo.adapters.matching import check_shapes, matched
from octavo.bounded_json import some
from octavo.commands.loading import read_adapter
from octavo.config import Config, LoraOptions, RunOptions
from octavo.config.section import flag_of
from octavo.errors import AdapterError, UsageError
from octavo.models import Decoder, WeightEntry, build
from octavo.reporting import Report
from octavo.runs.folder import RunFolder
from octavo.store.sources import Source

HINT = "Train such an adapter with PEFT, or start a new one: without --init-adapter."


def with_initial_adapter(config: Config, source: Source, report: Report) -> tuple[Config, Adapter | None]:
    """(the settings with those of the adapter of --init-adapter, the adapter); None without one.

    A run that resumes from a checkpoint has the adapter there. UsageError for a given option that contradicts the
    adapter, which names both; AdapterError for an adapter that does not fit the model, is damaged, or trains what
    `octavo finetune` does not.
    """
    options = config[RunOptions]
    if options.init_adapter is None or (options.resume and RunFolder(options.out).steps()):
        return config, None
    folder, adapter = read_adapter(options.init_adapter, source, report)
    model = build(source.config)
    entries, named = matched(model, adapter)
    check_shapes(entries, named)
    _check_trained(entries, named)
    settings = _settings(model, entries, named)
    _check_given(config, settings, model)
    if "dropout" in config[LoraOptions].model_fields_set:  # it is of the training, and changes no trained weight
        settings["dropout"] = config[LoraOptions].dropout
    lora = ", ".join(f"{name} {value}" for name, value in settings.items() if name in ("rank", "alpha", "dropout"))
    report.say(f"Training starts from the adapter in {folder}: {lora}, {len(named.lora)} modules.")
    return config.replace(**settings), adapter


def _settings(model: Decoder, entries: Mapping[str, WeightEntry], adapter: Adapter) -> dict[str, Any]:
    """The options of a run that trains what the adapter has. AdapterError for several ranks or scalings."""
    ranks = {len(a) for a, _, _ in adapter.lora.values()}
    scalings = {round(scaling, 9) for _, _, scaling in adapter.lora.values()}
    if len(ranks) > 1 or len(scalings) > 1:
        raise AdapterError(
            f"{adapter.named} has LoRA of several ranks or scalings (rank_pattern, alpha_pattern); a run has one.",
            hint=HINT,
        )
    rank, scaling = ranks.pop(), next(scaling for _, _, scaling in adapter.lora.values())
    alpha = scaling * (math.sqrt(rank) if adapter.spec.rslora else rank)
    return {
        "rank": rank,
        "alpha": round(alpha, 9),
        "dropout": adapter.spec.dropout,
        "rslora": adapter.spec.rslora,
        "lora_targets": _targets(model, entries, adapter),
        "train_norms": any(entries[key.rpartition(".")[0]].matrix is None for key in adapter.full),
        "train_biases": any(entries[key.rpartition(".")[0]].matrix is not None for key in adapter.full),
    }


def _targets(model: Decoder, entries: Mapping[str, WeightEntry], adapter: Adapter) -> list[str]:
    """The shortest --lora-targets that select the modules of the adapter."""
    last = sorted({entries[name].module.rpartition(".")[2] for name in adapter.lora})
    for targets in ([ALL_LINEAR], last):
        if _selected(model, targets) == adapter.lora.keys():
            return targets
    return sorted(entries[name].module for name in adapter.lora)


def _selected(model: Decoder, targets: Sequence[str]) -> set[str]:
    return {entry.name for entry in select(model, targets)}


def _check_trained(entries: Mapping[str, WeightEntry], adapter: Adapter) -> None:
    """AdapterError for an adapter with trained parts that a run does not train."""
    if not adapter.lora:
        raise AdapterError(f"{adapter.named} has no LoRA; octavo finetune trains LoRA.", hint=HINT)
    if adapter.tokens:
        raise AdapterError(f"{adapter.named} trains single tokens of {some([*adapter.tokens])}.", hint=HINT)
    weights = [key for key in adapter.full if _owner(entries, key).matrix is not None and key.endswith(".weight")]
    if weights:
        raise AdapterError(
            f"{adapter.named} trains whole matrices (modules_to_save): {some(weights)}; octavo finetune trains none.",
            hint=HINT,
        )
    norms = {
        f"{entry.name}.{kind}"
        for entry in entries.values()
        if entry.matrix is None
        for kind, _ in entry.layer.named_parameters(recurse=False)
    }
    biases = {f"{name}.bias" for name in adapter.lora if entries[name].parameter("bias") is not None}
    for what, all_of_them in (("norms", norms), ("biases of the modules with LoRA", biases)):
        if adapter.full.keys() & all_of_them and (missing := sorted(all_of_them - adapter.full.keys())):
            raise AdapterError(
                f"{adapter.named} trains some of the {what}, and a run all or none: it lacks {some(missing)}.",
                hint=HINT,
            )
    if others := sorted(adapter.full.keys() - norms - biases):
        raise AdapterError(f"{adapter.named} trains what octavo finetune does not: {some(others)}.", hint=HINT)


def _owner(entries: Mapping[str, WeightEntry], key: str) -> WeightEntry:
    return entries[key.rpartition(".")[0]]


def _check_given(config: Config, settings: Mapping[str, Any], model: Decoder) -> None:
    """UsageError for a given option of the adapter with another value than the adapter's.

    The settings file of a run that is resumed before its first checkpoint may have the defaults.
    """
    options, defaults = config[LoraOptions], LoraOptions()
    for name, value in settings.items():
        given = getattr(options, name)
        if name == "dropout" or name not in options.model_fields_set:
            continue
        if config[RunOptions].resume and given == getattr(defaults, name):
            continue
        same = _selected(model, given) == _selected(model, value) if name == "lora_targets" else _equal(given, value)
        if not same:
            raise UsageError(
                f"{flag_of(name)} is {_text(given)}; the adapter {config[RunOptions].init_adapter} has {_text(value)}.",
                hint="Leave the option out: it is taken from the adapter.",
            )


def _equal(given: Any, value: Any) -> bool:
    return math.isclose(given, value, rel_tol=1e-6) if isinstance(given, float) else bool(given == value)


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
