"""`octavo adapters diff`: how two adapters differ, in their settings and in what they change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.adapters import attached
from octavo.adapters.difference import Distance, ModuleDistance, distances, full_difference, total
from octavo.bounded_json import some
from octavo.commands.adapters.opening import OpenedAdapter, base_text, open_adapter, with_names_of
from octavo.config import AdapterDiffOptions, Config
from octavo.errors import UsageError
from octavo.reporting import Report

BASES = {True: "same", False: "different", None: "unknown"}


def diff(config: Config, report: Report) -> dict[str, Any]:
    """Prints the differences of two adapters; returns the JSON result. UsageError unless there are two."""
    names = config[AdapterDiffOptions].adapters
    if len(names) != 2:
        raise UsageError(
            f"octavo adapters diff needs two adapters, not {len(names)}.", hint="octavo adapters diff runs/a runs/b"
        )
    a, b = (open_adapter(name, config, report) for name in names)
    b = with_names_of(a, b)
    modules = distances(a.adapter, b.adapter)
    base, settings, whole = same_base(a, b), settings_that_differ(a, b), total(modules)
    only_a, only_b, difference, norm = full_difference(a.adapter, b.adapter)
    document: dict[str, Any] = {
        "a": str(a.folder), "b": str(b.folder), "base": BASES[base],
        "base_sha256": [a.adapter.trained_on, b.adapter.trained_on],
        "settings": settings,
        "only_in_a": [one.name for one in modules if one.name not in b.adapter.lora],
        "only_in_b": [one.name for one in modules if one.name not in a.adapter.lora],
        **_values(whole),
        "layers": [{"layer": layer, **_values(total(own))} for layer, own in _by_layer(modules)],
        "modules": [{"name": one.name, "layer": one.layer, **_values(one.distance)} for one in modules],
        "in_full": {
            "only_in_a": only_a, "only_in_b": only_b, "difference": difference,
            "relative_to_a": difference / norm if norm else None,
        },
        "text": summary(base, whole, len(modules)),
    }  # fmt: skip
    _show(document, a, b, report)
    return document


def same_base(a: OpenedAdapter, b: OpenedAdapter) -> bool | None:
    """Whether both were trained on the same base weights, by their hashes; None if one has no hash."""
    hashes = a.adapter.trained_on, b.adapter.trained_on
    return None if None in hashes else hashes[0] == hashes[1]


def settings_that_differ(a: OpenedAdapter, b: OpenedAdapter) -> dict[str, list[Any]]:
    """The values of both by setting, of the settings that differ."""
    values = [
        {
            "base": one.base_name or None, "rank": one.adapter.spec.rank, "alpha": one.adapter.spec.alpha,
            "rslora": one.adapter.spec.rslora, "dropout": one.adapter.spec.dropout,
            "targets": attached(one.adapter), "step": one.adapter.origin.get("step"),
            "tokens": {name: list(ids) for name, (ids, _) in one.adapter.tokens.items()},
            "modules_to_save": sorted(one.adapter.separate),
        }
        for one in (a, b)
    ]  # fmt: skip
    return {name: [each[name] for each in values] for name in values[0] if values[0][name] != values[1][name]}


def summary(base: bool | None, whole: Distance, modules: int) -> str:
    """One sentence on the base, and one on the changes."""
    first = {
        True: "Both adapters were trained on the same base weights.",
        False: "The adapters were trained on different base weights: their changes are not of one weight.",
        None: "It is not known whether both were trained on the same base weights.",
    }[base]
    if whole.difference == 0:
        return f"{first} Their LoRA is the same in all {modules:,} modules."
    if whole.cosine is None:
        return f"{first} One of them changes nothing with LoRA."
    return (
        f"{first} The cosine of their changes is {whole.cosine:.4f}; the norm of the difference is "
        f"{whole.relative_to_a:.4g} times that of A, and {whole.relative_to_b:.4g} times that of B."
    )


def _by_layer(modules: Sequence[ModuleDistance]) -> list[tuple[int | None, list[ModuleDistance]]]:
    """The modules of each layer; None for those outside, at the end."""
    order = sorted({one.layer for one in modules}, key=lambda layer: (layer is None, layer))
    return [(layer, [one for one in modules if one.layer == layer]) for layer in order]


def _values(distance: Distance) -> dict[str, Any]:
    return {
        "norm_a": distance.norm_a, "norm_b": distance.norm_b, "cosine": distance.cosine,
        "difference": distance.difference, "relative_to_a": distance.relative_to_a,
        "relative_to_b": distance.relative_to_b,
    }  # fmt: skip


def _show(document: dict[str, Any], a: OpenedAdapter, b: OpenedAdapter, report: Report) -> None:
    report.result("\n".join(f"{letter}  {one.folder}  base {base_text(one)}" for letter, one in (("A", a), ("B", b))))
    if document["settings"]:
        rows = [[name, *map(_shown, values)] for name, values in document["settings"].items()]
        report.table("Settings that differ", ["", "A", "B"], rows, result=True)
    else:
        report.result("Settings that differ: none")
    names = ("cosine", "norm_a", "norm_b", "difference", "relative_to_a", "relative_to_b")
    rows = [
        ["-" if row["layer"] is None else row["layer"], *("" if row[name] is None else row[name] for name in names)]
        for row in document["layers"]
    ]
    if rows:
        columns = ["layer", "cosine", "||A||", "||B||", "||A - B||", "over ||A||", "over ||B||"]
        report.table("The changes by layer", columns, rows, result=True)
    for letter in ("a", "b"):
        if only := document[f"only_in_{letter}"]:
            report.result(f"LoRA in {letter.upper()} alone: {len(only):,} modules ({some(only)}).")
        if only := document["in_full"][f"only_in_{letter}"]:
            report.result(f"In full in {letter.upper()} alone: {len(only):,} tensors ({some(only)}).")
    if document["in_full"]["relative_to_a"] is not None:
        share = document["in_full"]["relative_to_a"]
        report.result(f"The tensors that both train in full differ by {share:.4g} of the norm of those of A.")
    report.result(document["text"])


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} ({count})" for name, count in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
