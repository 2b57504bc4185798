"""Adapters: which numbers of a model are trained, and PEFT's own file format for them, in and out.

A folder holds adapter_config.json and adapter_model.safetensors, which `peft` loads as they are, and two
files that it ignores: octavo.json (what the adapter was trained on) and README.md (the model card).

Names: NAME is a module's name in the checkpoint, e.g. model.layers.0.self_attn.q_proj. In the file, all
stands under base_model.model.NAME: lora_A.weight (r, K) and lora_B.weight (N, r) of a linear,
lora_embedding_A (r, V) and lora_embedding_B (d, r) of an embedding, base_layer.bias of a linear with a
trained bias, and weight and bias of a trained norm (PEFT's modules_to_save).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.errors import AdapterError, ModelError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, LowRankPair
from octavo.layers.lora import LoraSpec, attach_, put_
from octavo.models import Model, Place, layer_of, places
from octavo.store.files import fsync_file, fsync_folder, json_bytes
from octavo.store.sources import read_json

PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HALVES = {"lora_A": "lora_B", "lora_B": "lora_A"}
HALVES |= {"lora_embedding_A": "lora_embedding_B", "lora_embedding_B": "lora_embedding_A"}
# Options of PEFT's that make its output another function than W x + s B A x. Source: peft 0.21, LoraConfig.
UNKNOWN_OPTIONS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "layer_replication",
)  # fmt: skip
# Ways to start that take something away from the frozen weights, so that the pairs fit no plain base model.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterPlan:
    """What is trained: pairs on `targets` (all-linear: every linear of the blocks), and norms and biases."""

    spec: LoraSpec
    targets: tuple[str, ...] = (ALL_LINEAR,)
    norms: bool = False
    biases: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter as read from its folder. `pairs` and `full` are by module name; `origin` is octavo.json."""

    spec: LoraSpec
    pairs: dict[str, tuple[Tensor, Tensor, float]]  # A, B, scaling
    full: dict[str, Tensor]  # NAME.weight or NAME.bias of norms, NAME.bias of linears
    origin: dict[str, Any] = field(default_factory=dict)


def select(model: Model, targets: Sequence[str]) -> list[Place]:
    """The places that `targets` name: all-linear, a module's last name (q_proj, lm_head), or a whole name."""
    table = [place for place in places(model).values() if place.matrix is not None]
    chosen: dict[str, Place] = {}
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


def mark_trained_(model: Model, plan: AdapterPlan, chosen: Sequence[Place]) -> None:
    """Makes the pairs, and norms and biases if planned, take gradients, and nothing else."""
    model.requires_grad_(False)
    for place in places(model).values():
        if place.matrix is None and plan.norms:
            place.layer.requires_grad_(True)
    names = {place.name for place in chosen}
    for place in chosen:
        layer = _layer(place)
        layer.pairs.requires_grad_(True)
        if plan.biases and isinstance(layer, FrozenLinear) and place.parameter("bias") is not None:
            assert layer.bias is not None
            lacking = [key for key in layer.bias_names if not _targeted(key, place, names)]
            if lacking:
                raise AdapterError(
                    f"The bias of {place.key} is stored with those of {', '.join(lacking)}.",
                    hint="To train biases, target all of them or none.",
                )
            layer.bias.requires_grad_(True)


def trained(model: Model) -> dict[str, nn.Parameter]:
    """Every trained parameter by a stable name: NAME.lora_A, NAME.lora_B, NAME.weight, NAME.bias."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for place in places(model).values():
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


def state(model: Model) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU, each with memory of its own."""
    tensors: dict[str, Tensor] = {}
    for place in places(model).values():
        name = PREFIX + place.name
        pair = _pair(place)
        if pair is not None:
            a, b = (".lora_A.weight", ".lora_B.weight")
            if isinstance(place.layer, FrozenEmbedding):
                a, b = (".lora_embedding_A", ".lora_embedding_B")
            tensors[name + a], tensors[name + b] = pair.a, pair.b
        if isinstance(place.layer, FrozenLinear):
            bias = place.parameter("bias")
            whole = place.layer.bias  # of all names that share the matrix
            if bias is not None and whole is not None and whole.requires_grad and pair is not None:
                tensors[name + ".base_layer.bias"] = bias
        elif not isinstance(place.layer, FrozenEmbedding):
            for kind, parameter in place.layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    tensors[f"{name}.{kind}"] = parameter
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def save(folder: Path, model: Model, plan: AdapterPlan, *, base: str, origin: Mapping[str, Any], card: str) -> None:
    """Writes the adapter of `model` into `folder`, beside it first and then renamed over what was there."""
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(state(model), temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_bytes(json_bytes(_peft_config(model, plan, base)))
        shutil.copymode(temporary / CONFIG, temporary / TENSORS)  # safetensors writes 0600, whatever the umask
        (temporary / "octavo.json").write_bytes(json_bytes(dict(origin)))
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.iterdir():
            fsync_file(path)
        fsync_folder(temporary)
        _exchange(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; what stood there goes only once the new one stands."""
    old = folder.parent / f".old-{folder.name}-{os.getpid()}"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Adapter:
    """The adapter in a folder of PEFT's format. AdapterError names what octavo does not do or cannot read."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} holds no adapter (no {CONFIG}).", hint="Give a run's adapter/ folder.")
    try:
        config = read_json(folder / CONFIG)
        origin = read_json(folder / "octavo.json") if (folder / "octavo.json").is_file() else {}
        tensors = load_file(folder / TENSORS)
    except (ModelError, SafetensorError, OSError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {error}") from error
    _refuse_unknown(folder, config)
    spec = _spec(folder, config)
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, kind = _parse(folder, key)
        if ".base_layer." in key and (kind == "weight" or config.get("bias", "none") == "none"):
            continue  # PEFT saves a targeted embedding's or head's frozen layer along with its pair
        if kind in HALVES and (other := key.replace(kind, HALVES[kind])) not in tensors:
            raise AdapterError(f"The adapter in {folder} lacks {other}.")
        if kind in ("lora_A", "lora_embedding_A"):
            own = _own_spec(config, name, spec)
            if own.rank != tensor.shape[0]:
                raise AdapterError(f"{folder}: {name} has rank {tensor.shape[0]}, {CONFIG} says {own.rank}.")
            pairs[name] = (tensor, tensors[other], own.scaling)
        elif kind not in HALVES:
            full[f"{name}.{kind}"] = tensor
    return Adapter(spec, pairs, full, origin)


def apply_(model: Model, adapter: Adapter) -> AdapterPlan:
    """Puts an adapter on `model` and returns its plan; AdapterError if a tensor finds no place."""
    table = places(model)
    lost = [name for name in adapter.pairs if name not in table or table[name].matrix is None]
    lost += [key for key in adapter.full if not _fits_full(table, key)]
    if lost:
        raise AdapterError(
            f"The adapter does not belong to this model: there is no place for {lost[0]}"
            + (f" and {len(lost) - 1} more." if len(lost) > 1 else "."),
            hint="Give the model that it was trained on.",
        )
    for name, (a, b, scaling) in adapter.pairs.items():
        layer, key = _layer(table[name]), table[name].rows_key
        rows, columns, rank = layer.matrix.outputs[key], layer.matrix.in_features, a.shape[0]
        outer = (rows, columns) if isinstance(layer, FrozenEmbedding) else (columns, rows)
        if tuple(a.shape) != (rank, outer[0]) or tuple(b.shape) != (outer[1], rank):
            raise AdapterError(
                f"The adapter's pair for {name} is {tuple(a.shape)} and {tuple(b.shape)}; this model's layer "
                f"has {columns} inputs and {rows} outputs.",
                hint="Give the model that it was trained on.",
            )
        device = layer.matrix.parts["weight"].device
        pair = LowRankPair(a.to(device, torch.float32), b.to(device, torch.float32), scaling)
        put_(layer, key, pair, dropout=adapter.spec.dropout)
    for key, tensor in adapter.full.items():
        name, _, kind = key.rpartition(".")
        target = table[name].parameter(kind)
        assert target is not None
        if target.shape != tensor.shape:
            raise AdapterError(f"The adapter's {key} is {tuple(tensor.shape)}, the model's {tuple(target.shape)}.")
        target.copy_(tensor)
    plan = _plan_of(adapter, table)
    mark_trained_(model, plan, [table[name] for name in adapter.pairs])
    return plan


def _plan_of(adapter: Adapter, table: Mapping[str, Place]) -> AdapterPlan:
    norms = any(table[key.rpartition(".")[0]].matrix is None for key in adapter.full)
    biases = any(table[key.rpartition(".")[0]].matrix is not None for key in adapter.full)
    return AdapterPlan(adapter.spec, tuple(adapter.pairs), norms=norms, biases=biases)


def _peft_config(model: Model, plan: AdapterPlan, base: str) -> dict[str, Any]:
    table = places(model)
    paired = [place for place in table.values() if _pair(place) is not None]
    keys = {place.key for place in paired}
    # A last name stands for all layers of that name; if some of them have no pair, whole names are needed.
    complete = {place.key for place in table.values() if place.key in keys and _pair(place) is None}
    norms = [p.name for p in table.values() if p.matrix is None and any(q.requires_grad for q in p.layer.parameters())]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": plan.spec.rank,
        "lora_alpha": plan.spec.alpha,
        "lora_dropout": plan.spec.dropout,
        "use_rslora": plan.spec.rslora,
        **_patterns(plan.spec, paired),
        "target_modules": sorted({p.name if p.key in complete else p.key for p in paired}),
        "modules_to_save": norms or None,
        "bias": "lora_only" if plan.biases else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _patterns(spec: LoraSpec, paired: Sequence[Place]) -> dict[str, dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern: the pairs that differ from `spec`, as one of PEFT's may."""
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for place in paired:
        pair = _pair(place)
        assert pair is not None
        rank = pair.a.shape[0]
        alpha = pair.scaling * (math.sqrt(rank) if spec.rslora else rank)
        if rank != spec.rank:
            ranks[place.name] = rank
        if not math.isclose(alpha, spec.alpha):
            alphas[place.name] = alpha
    return {"rank_pattern": ranks, "alpha_pattern": alphas}


def _refuse_unknown(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    unknown = [key for key in UNKNOWN_OPTIONS if config.get(key)]
    if str(config.get("init_lora_weights")).startswith(CHANGES_THE_BASE):
        unknown.append(f"init_lora_weights={config['init_lora_weights']}")
    if kind != "LORA" or unknown:
        what = f"of the type {kind}" if kind != "LORA" else f"made with {', '.join(unknown)}"
        raise AdapterError(f"The adapter in {folder} is {what}.", hint="octavo reads plain LoRA and rsLoRA.")


def _parse(folder: Path, key: str) -> tuple[str, str]:
    """(module name, kind) of a tensor's name in the file."""
    name = key.removeprefix(PREFIX)
    for kind in ("lora_A", "lora_B"):
        if name.endswith(f".{kind}.weight"):
            return name.removesuffix(f".{kind}.weight"), kind
    name = name.replace(".base_layer.", ".")
    module, _, kind = name.rpartition(".")
    if not key.startswith(PREFIX) or not module:
        raise AdapterError(f"The adapter in {folder} holds {key!r}, which is not a name of PEFT's format.")
    return module, kind


def _spec(folder: Path, config: Mapping[str, Any]) -> LoraSpec:
    try:
        return LoraSpec(
            int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout") or 0.0),
            bool(config.get("use_rslora", False)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"The {CONFIG} in {folder} has no usable rank, alpha or dropout ({error}).") from error


def _own_spec(config: Mapping[str, Any], name: str, spec: LoraSpec) -> LoraSpec:
    """The spec of one pair; PEFT can give a module a rank or alpha of its own."""
    rank, alpha = (
        next((value for key, value in (config.get(table) or {}).items() if _matches(key, name)), default)
        for table, default in (("rank_pattern", spec.rank), ("alpha_pattern", spec.alpha))
    )
    return LoraSpec(int(rank), float(alpha), spec.dropout, spec.rslora)


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of its patterns: an expression for the name, or for its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _fits_full(table: Mapping[str, Place], key: str) -> bool:
    name, _, kind = key.rpartition(".")
    return name in table and table[name].parameter(kind) is not None


def _targeted(key: str, place: Place, names: Iterable[str]) -> bool:
    """Whether the name that shares `place`'s bias under `key` is a target too."""
    if place.is_head:
        return True
    siblings = {name.rpartition(".")[2] for name in names if layer_of(name) == layer_of(place.name)}
    return key in siblings


def _pair(place: Place) -> LowRankPair | None:
    if not isinstance(place.layer, FrozenLinear | FrozenEmbedding) or place.rows_key not in place.layer.pairs:
        return None
    pair = place.layer.pairs[place.rows_key]
    assert isinstance(pair, LowRankPair)
    return pair


def _layer(place: Place) -> FrozenLinear | FrozenEmbedding:
    assert isinstance(place.layer, FrozenLinear | FrozenEmbedding)
    return place.layer
