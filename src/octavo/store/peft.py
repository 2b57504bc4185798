"""An adapter in its file: PEFT's own format, read and written without a model.

A folder holds adapter_config.json and adapter_model.safetensors, which `peft` loads as they are, and two
files that it ignores: octavo.json (what the adapter was trained on) and README.md (the model card).

Names: NAME is a module's name in the checkpoint, e.g. model.layers.0.self_attn.q_proj. In the file, all
stands under base_model.model.NAME: lora_A.weight (r, K) and lora_B.weight (N, r) of a linear,
lora_embedding_A (r, V) and lora_embedding_B (d, r) of an embedding, base_layer.bias of a linear with a
trained bias, and weight and bias of a trained norm (PEFT's modules_to_save).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from octavo.errors import AdapterError, ModelError
from octavo.layers.lora import LoraSpec
from octavo.store.files import fsync_file, fsync_folder, json_bytes
from octavo.store.sources import read_json
from octavo.system import rename_over

PREFIX = "base_model.model."
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
class Adapter:
    """An adapter apart from its model. `pairs` and `full` are by module name; `origin` is octavo.json."""

    spec: LoraSpec
    pairs: dict[str, tuple[Tensor, Tensor, float]]  # A, B, scaling
    full: dict[str, Tensor]  # NAME.weight or NAME.bias of norms, NAME.bias of linears
    origin: dict[str, Any] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()  # the names among `pairs` that are embeddings'
    sha256: str = ""  # of the file of its tensors, where it was read from one

    @property
    def trained_on(self) -> str | None:
        """The identity of the base weights that it was trained on, where octavo trained it."""
        base = self.origin.get("base")
        known = base.get("sha256") if isinstance(base, dict) else None
        return known if isinstance(known, str) else None


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU, each with memory of its own."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b, _) in adapter.pairs.items():
        ends = (".lora_A.weight", ".lora_B.weight")
        if name in adapter.embeddings:
            ends = (".lora_embedding_A", ".lora_embedding_B")
        tensors[name + ends[0]], tensors[name + ends[1]] = a, b
    for key, tensor in adapter.full.items():
        name, _, kind = key.rpartition(".")
        tensors[f"{name}.base_layer.{kind}" if name in adapter.pairs else key] = tensor
    return {PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def write(folder: Path, adapter: Adapter, *, modules: Collection[str], biases: bool, base: str, card: str) -> None:
    """Writes `adapter` into `folder`, beside it first and then renamed over what was there.

    `modules` are the names of all modules of its model, `biases` says whether the biases of its linears are
    trained, `base` names the model and `card` is the text of README.md.
    """
    temporary = folder.parent / f".tmp-{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(tensors_of(adapter), temporary / TENSORS, metadata={"format": "pt"})
        (temporary / CONFIG).write_bytes(json_bytes(_config(adapter, modules, biases=biases, base=base)))
        shutil.copymode(temporary / CONFIG, temporary / TENSORS)  # safetensors writes 0600, whatever the umask
        (temporary / "octavo.json").write_bytes(json_bytes(adapter.origin))
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
        rename_over(folder, old)
    try:
        rename_over(new, folder)
    except OSError:
        if old.exists():
            rename_over(old, folder)
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
        data = (folder / TENSORS).read_bytes()  # not mapped: whoever overwrites the file then changes nothing here
        tensors = load(data)
    except (ModelError, SafetensorError, OSError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {error}") from error
    _refuse_unknown(folder, config)
    spec = _spec(folder, config)
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    full: dict[str, Tensor] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        name, kind = _parse(folder, key)
        if ".base_layer." in key and (kind == "weight" or config.get("bias", "none") == "none"):
            continue  # PEFT saves a targeted embedding's or head's frozen layer along with its pair
        if kind in HALVES and (other := key.replace(kind, HALVES[kind])) not in tensors:
            raise AdapterError(f"The adapter in {folder} lacks {other}.")
        if kind in ("lora_A", "lora_embedding_A"):
            own = _own_spec(folder, config, name, spec)
            if tensor.ndim != 2 or tensors[other].ndim != 2:
                raise AdapterError(f"{folder}: the pair of {name} is not two matrices.")
            if own.rank != tensor.shape[0]:
                raise AdapterError(f"{folder}: {name} has rank {tensor.shape[0]}, {CONFIG} says {own.rank}.")
            pairs[name] = (tensor, tensors[other], own.scaling)
            if kind == "lora_embedding_A":
                embeddings.add(name)
        elif kind not in HALVES:
            full[f"{name}.{kind}"] = tensor
    if not pairs and not full:
        raise AdapterError(f"The adapter in {folder} holds nothing that was trained.")
    return Adapter(spec, pairs, full, origin, frozenset(embeddings), hashlib.sha256(data).hexdigest())


def _config(adapter: Adapter, modules: Collection[str], *, biases: bool, base: str) -> dict[str, Any]:
    # A last name stands for all layers of that name; if some of them have no pair, whole names are needed.
    unpaired = {_last(name) for name in modules if name not in adapter.pairs}
    owners = dict.fromkeys(key.rpartition(".")[0] for key in adapter.full)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.spec.rank,
        "lora_alpha": adapter.spec.alpha,
        "lora_dropout": adapter.spec.dropout,
        "use_rslora": adapter.spec.rslora,
        **_patterns(adapter),
        "target_modules": sorted({name if _last(name) in unpaired else _last(name) for name in adapter.pairs}),
        "modules_to_save": [name for name in owners if name not in adapter.pairs] or None,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _patterns(adapter: Adapter) -> dict[str, dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern: the pairs that differ from the spec, as one of PEFT's may."""
    spec = adapter.spec
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for name, (a, _, scaling) in adapter.pairs.items():
        rank = a.shape[0]
        alpha = scaling * (math.sqrt(rank) if spec.rslora else rank)
        if rank != spec.rank:
            ranks[name] = rank
        if not math.isclose(alpha, spec.alpha):
            alphas[name] = alpha
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
        spec = LoraSpec(
            int(config["r"]), float(config["lora_alpha"]), float(config.get("lora_dropout") or 0.0),
            bool(config.get("use_rslora", False)),
        )  # fmt: skip
        if not math.isfinite(spec.alpha):
            raise ValueError(f"alpha is {spec.alpha}")
        return spec
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"The {CONFIG} in {folder} has no usable rank, alpha or dropout ({error}).") from error


def _own_spec(folder: Path, config: Mapping[str, Any], name: str, spec: LoraSpec) -> LoraSpec:
    """The spec of one pair; PEFT can give a module a rank or alpha of its own."""
    try:
        rank, alpha = (
            next((value for key, value in (config.get(table) or {}).items() if _matches(key, name)), default)
            for table, default in (("rank_pattern", spec.rank), ("alpha_pattern", spec.alpha))
        )
        return LoraSpec(int(rank), float(alpha), spec.dropout, spec.rslora)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise AdapterError(f"The patterns of rank and alpha in {folder}'s {CONFIG} are broken ({error}).") from error


def _matches(pattern: str, name: str) -> bool:
    """PEFT's rule for the keys of its patterns: an expression for the name, or for its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
