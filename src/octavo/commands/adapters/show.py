"""`octavo adapters show`: what an adapter changes, how much, and what it was trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.adapters import attached, low_rank
from octavo.adapters.combination import by_layer
from octavo.bounded_json import read_object, some
from octavo.commands.adapters.opening import OpenedAdapter, base_text, open_adapter, open_base
from octavo.commands.run_summary import state_of
from octavo.config import AdapterShowOptions, Config
from octavo.errors import CheckpointError, UsageError
from octavo.models import embedding_keys, head_keys, layer_of
from octavo.reporting import Report
from octavo.runs import events
from octavo.runs.folder import RunFolder
from octavo.runs.verdict import verdict_of
from octavo.store.base_weights import BaseWeights
from octavo.store.peft import Adapter

OUTSIDE = "-"  # the row of modules outside the layers


@dataclass(frozen=True)
class ModuleChange:
    """The change s B A of a module, and with the base ||W||_F of its weight."""

    name: str
    rank: int
    scaling: float
    parameters: int
    norm: float
    base_norm: float | None

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object."""
        return {
            "name": self.name, "layer": self.layer, "type": self.kind, "rank": self.rank, "scaling": self.scaling,
            "parameters": self.parameters, "norm": self.norm, "relative": relative([self]),
        }  # fmt: skip


def show(config: Config, report: Report) -> dict[str, Any]:
    """Prints what is in an adapter; returns the JSON result."""
    name = config[AdapterShowOptions].adapter
    if not name:
        raise UsageError("The adapter is missing.", hint="octavo adapters show runs/mine")
    opened = open_adapter(name, config, report)
    adapter = opened.adapter
    changes = changes_of(adapter, open_base(config, [opened], report))
    full = in_full(adapter)
    spec = adapter.spec
    document: dict[str, Any] = {
        "adapter": str(opened.folder),
        "sha256": adapter.sha256,
        "base": {"name": opened.base_name or None, "sha256": adapter.trained_on},
        "rank": spec.rank, "alpha": spec.alpha, "scaling": spec.scaling, "rslora": spec.rslora,
        "dropout": spec.dropout,
        "targets": attached(adapter),
        "parameters": sum(one.parameters for one in changes) + full_parameters(adapter),
        "in_full": {kind: len(names) for kind, names in full.items()},
        "norm": together(changes),
        "relative": relative(changes),
        "layers": _layers(changes),
        "modules": [one.to_dict() for one in changes],
        "step": adapter.origin.get("step"),
        "parents": _parents(adapter),
        "run": _run(opened),
    }  # fmt: skip
    _show(document, opened, changes, full, report)
    return document


def changes_of(adapter: Adapter, base: BaseWeights | None) -> list[ModuleChange]:
    """The LoRA of each module with its norm, layer by layer."""
    found = []
    for name in by_layer(adapter.lora):
        a, b, scaling = change = adapter.lora[name]
        base_norm = base.norm(name) if base is not None else None
        found.append(ModuleChange(name, len(a), scaling, a.numel() + b.numel(), low_rank.norm(change), base_norm))
    return found


def together(changes: Sequence[ModuleChange]) -> float:
    """The norm of several changes as of one vector."""
    return math.hypot(*(one.norm for one in changes))


def relative(changes: Sequence[ModuleChange]) -> float | None:
    """The norm of several changes over that of their weights; None if these are not known, or 0."""
    norms = [one.base_norm for one in changes if one.base_norm is not None]
    whole = math.hypot(*norms)
    return together(changes) / whole if len(norms) == len(changes) and whole else None


def in_full(adapter: Adapter) -> dict[str, list[str]]:
    """What is trained in full, by kind: tensors, or modules whose tokens are trained. Empty kinds are left out."""
    kinds: dict[str, list[str]] = {}
    for key in by_layer(adapter.full):
        tensor, (name, _, part) = adapter.full[key], key.rpartition(".")
        if part == "weight" and key in adapter.base_layers and name not in adapter.separate:
            kind = "weights of the base, not trained"
        elif name.rpartition(".")[2] in embedding_keys() and layer_of(name) is None:
            kind = "embedding"
        elif name.rpartition(".")[2] in head_keys():
            kind = "head"
        elif tensor.ndim > 1:
            kind = "other weights"
        else:
            owner = adapter.full.get(f"{name}.weight")
            kind = "norms" if owner is not None and owner.ndim == 1 else "biases"
        kinds.setdefault(kind, []).append(key)
    for name, (ids, _) in adapter.tokens.items():
        kinds.setdefault("tokens", []).extend(f"{name}[{token}]" for token in ids)
    return kinds


def full_parameters(adapter: Adapter) -> int:
    """The numbers of trained values outside LoRA."""
    trained = [key for kind, keys in in_full(adapter).items() if "not trained" not in kind for key in keys]
    count = sum(adapter.full[key].numel() for key in trained if key in adapter.full)
    return count + sum(rows.numel() for _, rows in adapter.tokens.values())


def _layers(changes: Sequence[ModuleChange]) -> list[dict[str, Any]]:
    """A row for each layer, and one with the layer None for the modules outside."""
    order = sorted({one.layer for one in changes}, key=lambda layer: (layer is None, layer))
    rows = []
    for layer in order:
        own = [one for one in changes if one.layer == layer]
        kinds = list(dict.fromkeys(one.kind for one in own))
        by_kind = {kind: [one for one in own if one.kind == kind] for kind in kinds}
        rows.append(
            {
                "layer": layer, "norm": together(own), "relative": relative(own),
                "types": {
                    kind: {"norm": together(some_), "relative": relative(some_)} for kind, some_ in by_kind.items()
                },
            }
        )  # fmt: skip
    return rows


def _parents(adapter: Adapter) -> list[dict[str, Any]]:
    """Of a combined adapter what it was made from."""
    parents = adapter.origin.get("combined")
    return [one for one in parents if isinstance(one, dict)] if isinstance(parents, list) else []


def _run(opened: OpenedAdapter) -> dict[str, Any] | None:
    """The run that the adapter is in: its state, its training data, and of the adapter that it keeps the verdict."""
    run = opened.run
    if run is None:
        return None
    found = events.read(run.metrics)
    state, _ = state_of(run, found)
    verdict = verdict_of(found).to_dict() if opened.ends_run and state == "finished" else None
    return {"path": str(run.path), "state": state, "data_sha256": data_sha256(run), "verdict": verdict}


def data_sha256(run: RunFolder) -> str | None:
    """SHA-256 over the hashes of the training files, sorted, a line each; None if the ledger has not all of them."""
    try:
        train = read_object(run.ledger, error=CheckpointError, strict=False).get("train")
    except CheckpointError:
        return None
    files = train.get("files") if isinstance(train, dict) else None
    hashes = [one.get("sha256") if isinstance(one, Mapping) else None for one in files or []]
    if not hashes or not all(isinstance(one, str) and one for one in hashes):
        return None
    return hashlib.sha256("".join(f"{one}\n" for one in sorted(map(str, hashes))).encode()).hexdigest()


def _show(
    document: Mapping[str, Any],
    opened: OpenedAdapter,
    changes: Sequence[ModuleChange],
    full: Mapping[str, Sequence[str]],
    report: Report,
) -> None:
    spec, run = opened.adapter.spec, document["run"]
    targets = ", ".join(f"{kind} ({count})" for kind, count in document["targets"].items())
    scaling = f"{spec.scaling:g} = alpha {spec.alpha:g} / {'sqrt(rank)' if spec.rslora else 'rank'}"
    rows = [
        ("adapter", str(opened.folder)),
        ("SHA-256 of its tensors' file", document["sha256"]),
        ("base", base_text(opened)),
        ("targets", targets or "none"),
        ("rank", str(spec.rank) if len({one.rank for one in changes}) < 2 else f"{spec.rank}, others by module"),
        ("scaling", scaling if len({one.scaling for one in changes}) < 2 else f"{scaling}, others by module"),
        ("trained values", f"{document['parameters']:,}"),
        *((f"in full: {kind}", f"{len(keys):,}: {some(keys)}") for kind, keys in full.items()),
        ("norm of the change", _norm_text(document)),
    ]
    rows += [("step", f"{document['step']:,}")] if isinstance(document["step"], int) else []
    rows += [
        ("made from", f"{one.get('name')} times {one.get('weight')} (SHA-256 {one.get('sha256')})")
        for one in document["parents"]
    ]
    if run:
        rows.append(("run", f"{run['path']} ({run['state']})"))
        rows.append(("SHA-256 of the training data", run["data_sha256"] or "-"))
    report.table("Adapter", ["", "value"], rows, result=True)
    _show_norms(document["layers"], changes, report)
    for sentence in run["verdict"]["sentences"] if run and run["verdict"] else ():
        report.result(sentence)


def _norm_text(document: Mapping[str, Any]) -> str:
    share = document["relative"]
    return f"{document['norm']:.4g}" + ("" if share is None else f", {100 * share:.3g} % of that of the weights")


def _show_norms(layers: Sequence[Mapping[str, Any]], changes: Sequence[ModuleChange], report: Report) -> None:
    """The tables of norms by layer and module type: the change, and with the base also its share of the weight."""
    kinds = list(dict.fromkeys(one.kind for one in changes))
    titles = {"norm": "||s B A||_F by layer and module"}
    if any(one.base_norm is not None for one in changes):
        titles["relative"] = "||s B A||_F / ||W||_F by layer and module"
    for value, title in titles.items():
        rows = [
            [
                OUTSIDE if row["layer"] is None else row["layer"],
                *(_cell(row["types"].get(kind, {}).get(value)) for kind in kinds),
                _cell(row[value]),
            ]
            for row in layers
        ]
        if rows:
            report.table(title, ["layer", *kinds, "all"], rows, result=True)


def _cell(value: float | None) -> object:
    return "" if value is None else value
