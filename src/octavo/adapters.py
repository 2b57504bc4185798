"""An adapter on its model: which numbers are trained, and what a file says put on a model or taken from it.

Names: NAME is a module's name in the checkpoint, e.g. model.layers.0.self_attn.q_proj. store/peft.py has the
file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.bounded_json import shortened, shown
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, LoraPair
from octavo.layers.lora import LoraSpec, attach_, put_
from octavo.layers.multi_lora import AdapterBank, ServedAdapters
from octavo.models import Model, WeightEntry, layer_of, weight_entries
from octavo.store import peft
from octavo.store.full_weights import changed_keys, put_weights_
from octavo.store.peft import Adapter

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterPlan:
    """What is trained: pairs on `targets` (all-linear: every linear of the blocks), and norms and biases."""

    spec: LoraSpec
    targets: tuple[str, ...] = (ALL_LINEAR,)
    norms: bool = False
    biases: bool = False
    loaded: Adapter | None = None  # the adapter that is on the model: `save` keeps what of it is not trained on


def select(model: Model, targets: Sequence[str]) -> list[WeightEntry]:
    """The places that `targets` name: all-linear, a module's last name (q_proj, lm_head), or a whole name."""
    table = [place for place in weight_entries(model).values() if place.matrix is not None]
    chosen: dict[str, WeightEntry] = {}
    for target in targets:
        if target == ALL_LINEAR:
            found = [p for p in table if p.is_linear and layer_of(p.name) is not None]
        else:
            found = [p for p in table if target in (p.key, p.name)]
        if not found:
            known = sorted({p.key for p in table})
            near = get_close_matches(target, known, n=1)
            raise AdapterError(
                f"The model has no layer {target!r} to put LoRA on.",
                hint=(f"Did you mean {near[0]}? " if near else "") + f"There are: {ALL_LINEAR}, {', '.join(known)}.",
            )
        chosen.update({p.name: p for p in found})
    return [place for place in table if place.name in chosen]


def create_(model: Model, plan: AdapterPlan, *, seed: int) -> None:
    """Puts new pairs on the planned targets and marks what is trained; the model's output does not change."""
    generator = torch.Generator().manual_seed(seed)
    chosen = select(model, plan.targets)
    for place in chosen:
        layer = _layer(place)
        attach_(layer, place.rows_key, plan.spec, generator=generator)
    mark_trained_(model, plan, chosen)


def mark_trained_(model: Model, plan: AdapterPlan, chosen: Sequence[WeightEntry]) -> None:
    """Makes the pairs, and norms and biases if planned, take gradients, and nothing else."""
    model.requires_grad_(False)
    for place in weight_entries(model).values():
        if place.matrix is None and plan.norms:
            place.layer.requires_grad_(True)
    names = {place.name for place in chosen}
    for place in chosen:
        layer = _layer(place)
        layer.pairs.requires_grad_(True)
        if plan.biases and isinstance(layer, FrozenLinear) and place.parameter("bias") is not None:
            assert layer.bias is not None
            if lacking := _lacking(place, names):
                raise AdapterError(
                    f"The bias of {place.key} is stored with those of {', '.join(lacking)}.",
                    hint="To train biases, target all of them or none.",
                )
            layer.bias.requires_grad_(True)


def trained(model: Model) -> dict[str, nn.Parameter]:
    """Every trained parameter by a stable name: NAME.lora_A, NAME.lora_B, NAME.weight, NAME.bias."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for place in weight_entries(model).values():
        if isinstance(place.layer, FrozenLinear | FrozenEmbedding):
            pair = _pair(place)
            if pair is not None and pair.a.requires_grad:
                found[f"{place.name}.lora_A"], found[f"{place.name}.lora_B"] = pair.a, pair.b
            bias = place.layer.bias if isinstance(place.layer, FrozenLinear) else None
            if bias is not None and bias.requires_grad and id(bias) not in seen:
                seen.add(id(bias))
                found[f"{place.name}.bias"] = bias
        else:
            for kind, parameter in place.layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    found[f"{place.name}.{kind}"] = parameter
    return found


def collect(model: Model, spec: LoraSpec, *, origin: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter that is on `model`: its pairs, and the norms and biases that are trained. Nothing is copied."""
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    full: dict[str, Tensor] = {}
    embeddings = set()
    for place in weight_entries(model).values():
        pair = _pair(place)
        if pair is not None:
            pairs[place.name] = (pair.a, pair.b, pair.scaling)
        if isinstance(place.layer, FrozenLinear):
            bias = place.parameter("bias")
            whole = place.layer.bias  # of all names that share the matrix
            if bias is not None and whole is not None and whole.requires_grad and pair is not None:
                full[f"{place.name}.bias"] = bias
        elif isinstance(place.layer, FrozenEmbedding):
            if pair is not None:
                embeddings.add(place.name)
        else:
            for kind, parameter in place.layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    full[f"{place.name}.{kind}"] = parameter
    return Adapter(spec, pairs, full, dict(origin or {}), frozenset(embeddings))


def save(folder: Path, model: Model, plan: AdapterPlan, *, base: str, origin: Mapping[str, Any], card: str) -> None:
    """Writes the adapter of `model` into `folder`, whole or not at all; `origin` is octavo.json's content."""
    found = collect(model, plan.spec, origin=origin)
    if plan.loaded is not None:
        before = plan.loaded
        found = replace(
            found, full={**before.full, **found.full}, tokens=before.tokens, separate=before.separate,
            base_layers=before.base_layers,
        )  # fmt: skip
    peft.write(folder, found, modules=weight_entries(model), biases=plan.biases, base=base, card=card)


def apply_(model: Model, adapter: Adapter) -> AdapterPlan:
    """Puts an adapter on `model` and returns its plan; AdapterError if a tensor finds no place.

    Its LoRA pairs, norms and biases are trained on from there where all biases of a matrix are the adapter's; full
    weights of linears, embedding and head stay as they are.
    """
    table = _checked(model, adapter)
    put_weights_(model, adapter, table)
    for name in adapter.pairs:
        put_(_layer(table[name]), table[name].rows_key, _pair_for(table[name], adapter), dropout=adapter.spec.dropout)
    plan = _plan_of(adapter, table)
    mark_trained_(model, plan, [table[name] for name in adapter.pairs])
    return plan


def serve_(model: Model, routing: ServedAdapters, adapter: Adapter, name: str) -> None:
    """Holds an adapter beside others under `name`, for the rows that the routing sends through its number.

    AdapterError if a tensor finds no place, or if a norm, a bias or a full weight differs from the model's: those all
    rows share.
    """
    table = _checked(model, adapter)
    if changed := changed_keys(adapter, table):
        raise AdapterError(
            f"The adapter {name} has trained norms, biases or full weights ({_some(changed)}); only LoRA pairs can be "
            "served beside other adapters.",
            hint="Use `octavo generate --adapter`, or merge it into its base with PEFT and serve that. An adapter "
            "trained without --train-norms, --train-biases and modules_to_save can be served.",
        )
    pairs = {place: _pair_for(table[place], adapter) for place in adapter.pairs}
    before = _bank_places(model)
    _take_off_(model, routing, name)
    number = routing.free_id()
    for place, pair in pairs.items():
        layer = _layer(table[place])
        if layer.bank is None:
            layer.bank = _new_bank(layer)
        layer.bank.put(number, table[place].rows_key, pair.a.detach(), pair.b.detach(), pair.scaling)
    for layer in _frozen_layers(model):
        if layer.bank is not None:
            layer.bank.make_room(number + 1)  # rows of this adapter look into all banks, its own or not
    routing.served[name] = number
    routing.changes += _bank_places(model) != before


def remove_(model: Model, routing: ServedAdapters, name: str) -> None:
    """Takes a served adapter off again."""
    before = _bank_places(model)
    _take_off_(model, routing, name)
    routing.changes += _bank_places(model) != before


def _take_off_(model: Model, routing: ServedAdapters, name: str) -> None:
    number = routing.served.pop(name, None)
    if number is None:
        return
    for layer in _frozen_layers(model):
        if layer.bank is not None:
            layer.bank.clear(number)
        if not routing.served:
            layer.bank = None


def _bank_places(model: Model) -> list[object]:
    """Where the tensors of all banks are, and how large: what a recorded step has taken down."""
    banks = [layer.bank for layer in _frozen_layers(model)]
    return [bank and (bank.a.data_ptr(), bank.a.shape, bank.b.data_ptr(), bank.b.shape) for bank in banks]


def _frozen_layers(model: Model) -> list[FrozenLinear | FrozenEmbedding]:
    return [module for module in model.modules() if isinstance(module, FrozenLinear | FrozenEmbedding)]


def _new_bank(layer: FrozenLinear | FrozenEmbedding) -> AdapterBank:
    matrix = layer.matrix
    if isinstance(layer, FrozenEmbedding):  # a table's inputs are the ids of its rows
        return AdapterBank(
            matrix.shape[0], dict.fromkeys(matrix.outputs, matrix.in_features), matrix.dtype, matrix.device
        )
    return AdapterBank(matrix.in_features, matrix.outputs, matrix.dtype, matrix.device)


def _checked(model: Model, adapter: Adapter) -> dict[str, WeightEntry]:
    """The model's places; AdapterError if a tensor of the adapter finds none."""
    table = weight_entries(model)
    lost = [name for name in adapter.pairs if name not in table or table[name].matrix is None]
    lost += [key for key in adapter.full if not _fits_full(table, key)]
    lost += [name for name in adapter.tokens if name not in table or not table[name].is_embedding]
    if lost:
        reason = _reason(model, table, lost[0])
        raise AdapterError(
            f"The adapter does not belong to this model: there is no place for {_some(lost)} ({reason}).",
            hint=f"It names {shown(adapter.base)} as its base: give that with --model."
            if adapter.base
            else "Give the model that it was trained on.",
        )
    return table


def _some(names: Sequence[str]) -> str:
    return shortened(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _reason(model: Model, table: Mapping[str, WeightEntry], key: str) -> str:
    """Why a tensor of an adapter has no place."""
    name, _, kind = key.rpartition(".")
    if name in table:
        return f"this model's {table[name].key} has no {kind}"
    layer, count = layer_of(key), len(model.blocks)
    first = next(name for name in table if layer_of(name) is not None)
    if layer is not None and layer >= count and key.partition(".")[0] == first.partition(".")[0]:
        return f"this model has {count} layers"
    if layer is not None and key.partition(f".{layer}.")[0] != first.partition(".0.")[0]:
        return f"this model's layers are called {first.partition('.0.')[0]}"
    return f"this model has no module {shortened(name if kind in ('weight', 'bias') else key)}"


def _pair_for(place: WeightEntry, adapter: Adapter) -> LoraPair:
    """The adapter's pair of one name, on the model's device; AdapterError if its shape is another layer's."""
    a, b, scaling = adapter.pairs[place.name]
    layer, key = _layer(place), place.rows_key
    rows, columns, rank = layer.matrix.outputs[key], layer.matrix.in_features, a.shape[0]
    outer = (rows, columns) if isinstance(layer, FrozenEmbedding) else (columns, rows)
    if tuple(a.shape) != (rank, outer[0]) or tuple(b.shape) != (outer[1], rank):
        raise AdapterError(
            f"The adapter's pair for {place.name} is {tuple(a.shape)} and {tuple(b.shape)}; this model's layer "
            f"has {columns} inputs and {rows} outputs.",
            hint="Give the model that it was trained on.",
        )
    device = layer.matrix.device
    return LoraPair(a.to(device, torch.float32), b.to(device, torch.float32), scaling)


def _plan_of(adapter: Adapter, table: Mapping[str, WeightEntry]) -> AdapterPlan:
    norms = any(table[key.rpartition(".")[0]].matrix is None for key in adapter.full)
    owners = {key.removesuffix(".bias") for key in adapter.full if key.endswith(".bias")} & adapter.pairs.keys()
    # Trained on only where they are complete: linears that share a matrix have their biases in one parameter.
    biases = bool(owners) and not any(_lacking(table[name], owners) for name in owners)
    return AdapterPlan(adapter.spec, tuple(adapter.pairs), norms=norms, biases=biases, loaded=adapter)


def _fits_full(table: Mapping[str, WeightEntry], key: str) -> bool:
    name, _, kind = key.rpartition(".")
    if name in table and kind == "weight" and table[name].matrix is not None:
        return True
    return name in table and table[name].parameter(kind) is not None


def _lacking(place: WeightEntry, names: Collection[str]) -> list[str]:
    """The keys of the biases that are stored with the bias of `place`, and whose modules `names` lacks."""
    layer = _layer(place)
    assert isinstance(layer, FrozenLinear)
    return [key for key in layer.bias_names if not _targeted(key, place, names)]


def _targeted(key: str, place: WeightEntry, names: Iterable[str]) -> bool:
    """Whether the name that shares `place`'s bias under `key` is a target too."""
    if place.is_head:
        return True
    siblings = {name.rpartition(".")[2] for name in names if layer_of(name) == layer_of(place.name)}
    return key in siblings


def _pair(place: WeightEntry) -> LoraPair | None:
    if not isinstance(place.layer, FrozenLinear | FrozenEmbedding) or place.rows_key not in place.layer.pairs:
        return None
    pair = place.layer.pairs[place.rows_key]
    assert isinstance(pair, LoraPair)
    return pair


def _layer(place: WeightEntry) -> FrozenLinear | FrozenEmbedding:
    assert isinstance(place.layer, FrozenLinear | FrozenEmbedding)
    return place.layer
