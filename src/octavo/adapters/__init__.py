"""LoRA adapters on a model: which parameters are trained, and how an adapter file is applied and written.

Names: NAME is a module's name in the checkpoint, e.g. model.layers.0.self_attn.q_proj. store/peft.py reads and writes
the file.

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.adapters.complete import attached as attached
from octavo.adapters.complete import attached_text as attached_text
from octavo.adapters.matching import check_shapes, frozen_layer, lora_for, matched
from octavo.bounded_json import some
from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora
from octavo.layers.lora import LoraSpec, attach_, put_
from octavo.models import Decoder, WeightEntry, layer_of, weight_entries
from octavo.store import peft
from octavo.store.embedded_adapter import has_embedded_adapter, read_embedded_adapter
from octavo.store.full_weights import put_weights_
from octavo.store.peft import Adapter as Adapter
from octavo.store.peft import renamed
from octavo.store.sources import Source

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterPlan:
    """What is trained: LoRA on `targets` (all-linear: every linear of the blocks), and on request norms and biases."""

    spec: LoraSpec
    targets: tuple[str, ...] = (ALL_LINEAR,)
    norms: bool = False
    biases: bool = False
    loaded: Adapter | None = None  # the adapter applied to the model: `save` keeps the parts that are not trained


def select(model: Decoder, targets: Sequence[str]) -> list[WeightEntry]:
    """The weight-map entries named by `targets`: all-linear, a module's last name (q_proj, lm_head), or a full name."""
    entries = [entry for entry in weight_entries(model).values() if entry.matrix is not None]
    chosen: dict[str, WeightEntry] = {}
    for target in targets:
        if target == ALL_LINEAR:
            matches = [e for e in entries if e.is_linear and layer_of(e.name) is not None]
        else:
            matches = [e for e in entries if target in (e.key, e.name, e.module, e.module.rpartition(".")[2])]
        if not matches:
            keys = sorted({e.key for e in entries})
            near = get_close_matches(target, keys, n=1)
            raise AdapterError(
                f"The model has no layer {target!r} to put LoRA on.",
                hint=(f"Did you mean {near[0]}? " if near else "") + f"There are: {ALL_LINEAR}, {', '.join(keys)}.",
            )
        chosen.update({e.name: e for e in matches})
    return [entry for entry in entries if entry.name in chosen]


def create_(model: Decoder, plan: AdapterPlan, *, seed: int) -> None:
    """Adds new LoRA to the planned targets and marks the trained parameters. B is zero: the output does not change."""
    generator = torch.Generator().manual_seed(seed)
    chosen = select(model, plan.targets)
    for entry in chosen:
        layer = frozen_layer(entry)
        attach_(layer, entry.rows_key, plan.spec, generator=generator)
    mark_trained_(model, plan, chosen)


def mark_trained_(model: Decoder, plan: AdapterPlan, chosen: Sequence[WeightEntry]) -> None:
    """Sets requires_grad on the LoRA matrices and on the planned norms and biases, and clears it on all others."""
    model.requires_grad_(False)
    for entry in weight_entries(model).values():
        if entry.matrix is None and plan.norms:
            entry.layer.requires_grad_(True)
    names = {entry.name for entry in chosen}
    for entry in chosen:
        layer = frozen_layer(entry)
        layer.lora.requires_grad_(True)
        if plan.biases and isinstance(layer, FrozenLinear) and entry.parameter("bias") is not None:
            assert layer.bias is not None
            if missing := _untargeted_biases(entry, names):
                raise AdapterError(
                    f"The bias of {entry.key} is stored with those of {', '.join(missing)}.",
                    hint="To train biases, target all of them or none.",
                )
            layer.bias.requires_grad_(True)


def trained(model: Decoder) -> dict[str, nn.Parameter]:
    """Every trained parameter by a stable name: NAME.lora_A, NAME.lora_B, NAME.weight, NAME.bias."""
    parameters: dict[str, nn.Parameter] = {}
    seen: set[int] = set()  # ids of biases: linears that share a matrix share one bias parameter
    for entry in weight_entries(model).values():
        if isinstance(entry.layer, FrozenLinear | FrozenEmbedding):
            lora = _lora(entry)
            if lora is not None and lora.a.requires_grad:
                parameters[f"{entry.name}.lora_A"], parameters[f"{entry.name}.lora_B"] = lora.a, lora.b
            bias = entry.layer.bias if isinstance(entry.layer, FrozenLinear) else None
            if bias is not None and bias.requires_grad and id(bias) not in seen:
                seen.add(id(bias))
                parameters[f"{entry.name}.bias"] = bias
        else:
            for kind, parameter in entry.layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    parameters[f"{entry.name}.{kind}"] = parameter
    return parameters


def collect(model: Decoder, spec: LoraSpec, *, origin: Mapping[str, Any] | None = None) -> Adapter:
    """The adapter on `model`, under PEFT's names: its LoRA matrices, and the trained norms and biases.

    Only what is stored in another row order is copied.
    """
    loras: dict[str, tuple[Tensor, Tensor, float]] = {}
    full: dict[str, Tensor] = {}
    embeddings, transposed = set(), False
    entries = weight_entries(model)
    for entry in entries.values():
        lora = _lora(entry)
        if lora is not None:
            transposed = transposed or entry.transposed
            loras[entry.name] = (lora.a, _to_checkpoint(entry, lora.b), lora.scaling)
            if isinstance(entry.layer, FrozenEmbedding):
                embeddings.add(entry.name)
        for key, tensor in _trained_in_full(entry):
            full[key] = _to_checkpoint(entry, tensor)
    adapter = Adapter(spec, loras, full, dict(origin or {}), frozenset(embeddings), fan_in_fan_out=transposed)
    return renamed(adapter, {entry.name: entry.module for entry in entries.values()})


def copied(adapter: Adapter) -> Adapter:
    """A copy of `adapter` on the CPU, which training does not change."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().clone()

    lora = {name: (copy(a), copy(b), scaling) for name, (a, b, scaling) in adapter.lora.items()}
    return replace(adapter, lora=lora, full={key: copy(tensor) for key, tensor in adapter.full.items()})


@torch.no_grad()
def restore_(model: Decoder, adapter: Adapter) -> None:
    """Copies a collected adapter into the trained parameters of `model`, which stay where they are.

    They may be views of flat buffers. AdapterError if the adapter lacks one of them, has it in another shape, or has
    LoRA on a module that is not trained.
    """
    entries, adapter = matched(model, adapter)
    if extra := [name for name in adapter.lora if _lora(entries[name]) is None]:
        raise AdapterError(f"The adapter has LoRA on modules that are not trained: {some(extra)}.")
    for entry in entries.values():
        parts = [(key, target, adapter.full.get(key), entry.order) for key, target in _trained_in_full(entry)]
        if (lora := _lora(entry)) is not None:
            a, b, _ = adapter.lora.get(entry.name, (None, None, None))
            parts += [(f"{entry.name}.lora_A", lora.a, a, None), (f"{entry.name}.lora_B", lora.b, b, entry.order)]
        for key, target, stored, order in parts:
            if stored is None or stored.shape != target.shape:
                raise AdapterError(f"The adapter has no {key} of shape {tuple(target.shape)}.")
            target.copy_(stored if order is None else order.from_checkpoint(stored))


def _trained_in_full(entry: WeightEntry) -> list[tuple[str, Tensor]]:
    """The trained norm or bias of an entry: NAME.weight and NAME.bias, each a view of the parameter."""
    if isinstance(entry.layer, FrozenLinear):
        bias = entry.parameter("bias")
        shared_bias = entry.layer.bias  # of all linears that share the matrix
        if bias is None or shared_bias is None or not shared_bias.requires_grad or _lora(entry) is None:
            return []
        return [(f"{entry.name}.bias", bias)]
    if isinstance(entry.layer, FrozenEmbedding):
        return []
    return [(f"{entry.name}.{kind}", p) for kind, p in entry.layer.named_parameters(recurse=False) if p.requires_grad]


def save(folder: Path, model: Decoder, plan: AdapterPlan, *, base: str, origin: Mapping[str, Any], readme: str) -> None:
    """Writes the adapter of `model` into `folder` atomically. `origin` is the content of octavo.json."""
    adapter = collect(model, plan.spec, origin=origin)
    modules = {entry.name: entry.module for entry in weight_entries(model).values()}
    if plan.loaded is not None:
        before = renamed(plan.loaded, modules)
        adapter = replace(
            adapter, full={**before.full, **adapter.full}, tokens=before.tokens, separate=before.separate,
            base_layers=before.base_layers,
        )  # fmt: skip
    peft.write(folder, adapter, modules=modules.values(), biases=plan.biases, base=base, readme=readme)


def apply_(model: Decoder, adapter: Adapter) -> AdapterPlan:
    """Applies an adapter to `model` and returns its plan.

    AdapterError if the model has no module for a tensor, or the adapter lacks one that its config asks for.

    Training continues on its LoRA matrices and norms, and on its biases if it has all biases of each matrix. Full
    weights of linears, embedding and head stay frozen.
    """
    entries, adapter = matched(model, adapter)
    put_weights_(model, adapter, entries)
    check_shapes(entries, adapter)
    for name in adapter.lora:
        entry = entries[name]
        put_(frozen_layer(entry), entry.rows_key, lora_for(entry, adapter), dropout=adapter.spec.dropout)
    plan = _plan_of(adapter, entries)
    mark_trained_(model, plan, [entries[name] for name in adapter.lora])
    return plan


def apply_embedded_adapter_(model: Decoder, source: Source, *, say: Callable[[str], None]) -> None:
    """Applies the embedded adapters of `source` to its base's `model` and reports it; nothing if there are none."""
    if has_embedded_adapter(source):
        adapter = read_embedded_adapter(source)
        apply_(model, adapter)
        say(f"{source.files[0].parent} has trained adapters on {len(adapter.lora)} layers: they are applied.")


def _plan_of(adapter: Adapter, entries: Mapping[str, WeightEntry]) -> AdapterPlan:
    norms = any(entries[key.rpartition(".")[0]].matrix is None for key in adapter.full)
    owners = {key.removesuffix(".bias") for key in adapter.full if key.endswith(".bias")} & adapter.lora.keys()
    # Biases are trained only if they are complete: linears that share a matrix have their biases in one parameter.
    biases = bool(owners) and not any(_untargeted_biases(entries[name], owners) for name in owners)
    return AdapterPlan(adapter.spec, tuple(adapter.lora), norms=norms, biases=biases, loaded=adapter)


def _untargeted_biases(entry: WeightEntry, names: Collection[str]) -> list[str]:
    """The keys of the biases stored with the bias of an entry whose modules are not in `names`."""
    layer = frozen_layer(entry)
    assert isinstance(layer, FrozenLinear)
    return [key for key in layer.bias_names if not _targeted(key, entry, names)]


def _targeted(key: str, entry: WeightEntry, names: Iterable[str]) -> bool:
    """Whether the module whose bias is stored under `key` with that of an entry is a target too."""
    if entry.is_head:
        return True
    siblings = {name.rpartition(".")[2] for name in names if layer_of(name) == layer_of(entry.name)}
    return key in siblings


def _lora(entry: WeightEntry) -> Lora | None:
    if not isinstance(entry.layer, FrozenLinear | FrozenEmbedding) or entry.rows_key not in entry.layer.lora:
        return None
    lora = entry.layer.lora[entry.rows_key]
    assert isinstance(lora, Lora)
    return lora


def _to_checkpoint(entry: WeightEntry, rows: Tensor) -> Tensor:
    """Rows (N, ..) of an entry's outputs in the order of the checkpoint."""
    return rows if entry.order is None else entry.order.to_checkpoint(rows.detach())
