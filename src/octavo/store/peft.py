"""Adapter files in PEFT's format, read and written without a model.

A folder contains adapter_config.json and adapter_model.safetensors, which `peft` loads as they are, and two files that
it ignores: octavo.json (a format version, the base weights that the adapter was trained on, the rank and scaling of
every module with LoRA, and the hash of the tensors) and README.md (the model card).

NAME is a module's name in transformers, e.g. model.layers.0.self_attn.q_proj. All tensors of the file have the prefix
base_model.model.NAME:

    lora_A.weight (r, K), lora_B.weight (N, r)             of a linear
    lora_embedding_A (r, V), lora_embedding_B (d, r)       of an embedding
    base_layer.bias (N,)                                   of a linear with LoRA and a trained bias
    weight, bias                                           of a module that is trained in full (modules_to_save)
    token_adapter.trainable_tokens_delta (n, d)            of an embedding of which n tokens are trained

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from octavo.bounded_json import read_object, some
from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec
from octavo.models import TEXT_PREFIX, embedding_keys, head_keys, layer_of
from octavo.store.adapter_file import DAMAGED, changed, no_adapter, read_tensors, tensor_hashes, tensors_sha256
from octavo.store.adapter_file import ORIGIN as ORIGIN
from octavo.store.adapter_file import TENSORS as TENSORS
from octavo.store.files import check_format, json_bytes, new_folder
from octavo.store.peft_config import CONFIG as CONFIG
from octavo.store.peft_config import PeftConfig, read_config
from octavo.store.peft_names import PREFIX as PREFIX
from octavo.store.peft_names import TOKENS, parsed

FORMAT = 1  # of octavo.json; increase it when its content changes. The other files have PEFT's format


@dataclass(frozen=True)
class Adapter:
    """An adapter without its model. `lora` and `full` are by module name; `origin` is octavo.json."""

    spec: LoraSpec
    lora: dict[str, tuple[Tensor, Tensor, float]]  # NAME -> (A, B, scaling)
    full: dict[str, Tensor]  # NAME.weight or NAME.bias, of norms, linears and embeddings
    origin: dict[str, Any] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()  # the names in `lora` of embeddings
    sha256: str = ""  # of the tensor file, if the adapter was read from one
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)  # NAME -> token ids, rows (n, d)
    separate: frozenset[str] = frozenset()  # modules with a weight of their own, untied (modules_to_save)
    base_layers: frozenset[str] = frozenset()  # keys of `full` that PEFT saved with a LoRA layer, not trained
    base: str = ""  # the name of its base (base_model_name_or_path)
    config: PeftConfig | None = None  # adapter_config.json, if the adapter was read from a folder
    folder: Path | None = None  # the one that it was read from
    fan_in_fan_out: bool = False  # whether it has LoRA on weights that the base stores (K, N), as GPT-2 does

    @property
    def named(self) -> str:
        """The adapter as errors name it."""
        return f"The adapter in {self.folder}" if self.folder else "The adapter"

    @property
    def vocabulary(self) -> int | None:
        """The rows of the adapter's embedding or head; None if it has neither."""
        keys = embedding_keys() | head_keys()
        for name, tensor in self.full.items():
            *_, module, kind = ("", *name.split("."))
            if module in keys and kind == "weight" and tensor.ndim == 2 and layer_of(name) is None:
                return len(tensor)
        return None

    @property
    def trained_on(self) -> str | None:
        """The identity of the base weights, if octavo trained the adapter."""
        base = self.origin.get("base")
        identity = base.get("sha256") if isinstance(base, dict) else None
        return identity if isinstance(identity, str) else None


def renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    """The adapter with its modules renamed; those that `names` lacks keep their names."""

    def key(key: str) -> str:
        name, _, kind = key.rpartition(".")
        return f"{names.get(name, name)}.{kind}"

    def sets(values: frozenset[str]) -> frozenset[str]:
        return frozenset(names.get(name, name) for name in values)

    return replace(
        adapter,
        lora={names.get(name, name): value for name, value in adapter.lora.items()},
        full={key(name): tensor for name, tensor in adapter.full.items()},
        embeddings=sets(adapter.embeddings),
        tokens={names.get(name, name): value for name, value in adapter.tokens.items()},
        separate=sets(adapter.separate),
        base_layers=frozenset(map(key, adapter.base_layers)),
    )


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, copied to the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b, _) in adapter.lora.items():
        suffixes = (".lora_A.weight", ".lora_B.weight")
        if name in adapter.embeddings:
            suffixes = (".lora_embedding_A", ".lora_embedding_B")
        tensors[name + suffixes[0]], tensors[name + suffixes[1]] = a, b
    for key, tensor in adapter.full.items():
        name, _, kind = key.rpartition(".")
        wrapper = "base_layer." if name in adapter.lora else ""
        if name in adapter.tokens and kind == "weight":
            wrapper = "token_adapter.base_layer."
        tensors[f"{name}.{wrapper}{kind}"] = tensor
    tensors |= {f"{name}{TOKENS}": rows for name, (_, rows) in adapter.tokens.items()}
    return {PREFIX + key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def write(folder: Path, adapter: Adapter, *, modules: Collection[str], biases: bool, base: str, readme: str) -> None:
    """Writes `adapter` into `folder` atomically, replacing what is there. The arguments are those of `fill`."""
    with new_folder(folder, replace=True) as temporary:
        fill(temporary, adapter, modules=modules, biases=biases, base=base, readme=readme)


def fill(folder: Path, adapter: Adapter, *, modules: Collection[str], biases: bool, base: str, readme: str) -> None:
    """Writes the files of `adapter` into an existing folder, for a writer that makes the folder durable.

    `modules` are the names of all modules of its model, `biases` is True if the biases of its linears are trained,
    `base` names the model, and `readme` is the text of README.md.
    """
    tensors, config = tensors_of(adapter), _config(adapter, modules, biases=biases, base=base)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    (folder / CONFIG).write_bytes(json_bytes(config))
    shutil.copymode(folder / CONFIG, folder / TENSORS)  # safetensors writes mode 0600, whatever the umask
    hashes = tensor_hashes(tensors)
    origin = {"format": FORMAT, **adapter.origin, "targets": _targets_of(adapter), "tensors": hashes}
    origin["sha256"] = tensors_sha256(tensors, config)
    (folder / ORIGIN).write_bytes(json_bytes(origin))
    (folder / "README.md").write_text(readme, encoding="utf-8", errors="replace")


def read(folder: Path, *, allow_pickle: bool = False) -> Adapter:
    """The adapter in a folder of PEFT's format. AdapterError for a feature or a tensor that octavo does not read.

    If octavo wrote the folder, its tensors must have the hash in octavo.json. `allow_pickle` allows adapter_model.bin.
    """
    if not (folder / CONFIG).is_file():
        raise no_adapter(folder)
    config = read_config(folder)
    origin = _origin(folder)
    tensors, sha256 = read_tensors(folder, allow_pickle=allow_pickle)
    expected, listed, recorded = (origin.pop(key, None) for key in ("sha256", "targets", "tensors"))
    if expected is not None and expected != tensors_sha256(tensors, config.function):
        raise changed(folder, tensors, recorded)
    lora: dict[str, tuple[Tensor, Tensor, float]] = {}
    full: dict[str, Tensor] = {}
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    embeddings, base_layers = set(), set()
    for key, (name, kind, other) in parsed(folder, tensors).items():
        tensor = tensors[key]
        if kind in ("lora_A", "lora_embedding_A"):
            lora[name] = _lora(folder, config, name, {key: tensor, other: tensors[other]})
            if kind == "lora_embedding_A":
                embeddings.add(name)
        elif kind == "tokens":
            if (indices := config.indices_of(name)) is None:
                raise AdapterError(f"The adapter in {folder} trains tokens of {name}, and {CONFIG} does not say which.")
            tokens[name] = (indices, tensor)
        elif not other:
            full[f"{name}.{kind}"] = tensor
            if ".base_layer." in key:
                base_layers.add(f"{name}.{kind}")
    if not lora and not full and not tokens:
        raise AdapterError(f"The adapter in {folder} holds nothing that was trained.")
    separate = frozenset(name for key in full if config.saves(name := key.rpartition(".")[0]))
    adapter = Adapter(
        config.spec, lora, full, origin, frozenset(embeddings), sha256, tokens, separate, frozenset(base_layers),
        config.base, config, folder=folder,
    )  # fmt: skip
    if listed is not None:
        _check_targets(folder, adapter, listed)
    return adapter


def _targets_of(adapter: Adapter) -> dict[str, dict[str, float]]:
    """The modules with LoRA, as octavo.json lists them."""
    return {name: {"rank": len(a), "scaling": scaling} for name, (a, _, scaling) in adapter.lora.items()}


def _check_targets(folder: Path, adapter: Adapter, listed: Any) -> None:
    """AdapterError if the modules with LoRA are not those of octavo.json, with their ranks and scalings."""
    actual = _targets_of(adapter)
    listed = listed if isinstance(listed, dict) else {}
    different = [name for name in {**listed, **actual} if not _same_target(listed.get(name), actual.get(name))]
    if different:
        raise AdapterError(
            f"The adapter in {folder} does not have the LoRA that {ORIGIN} lists: {some(different)} "
            "is missing, not listed, or of another rank or scaling.",
            hint="Restore it from a copy.",
        )


def _same_target(listed: Any, actual: dict[str, float] | None) -> bool:
    if not isinstance(listed, dict) or actual is None or listed.get("rank") != actual["rank"]:
        return False
    scaling = listed.get("scaling")
    return isinstance(scaling, int | float) and math.isclose(scaling, actual["scaling"], rel_tol=1e-6)


def _origin(folder: Path) -> dict[str, Any]:
    """The content of octavo.json without its format version, {} if there is none."""
    path = folder / ORIGIN
    if not os.path.lexists(path):  # a link to nowhere is damage: the tensors would not be checked
        return {}
    origin = read_object(path, error=AdapterError)
    hint = f"Use the octavo that wrote it. Without {ORIGIN} the folder is read as any other adapter in PEFT's format."
    check_format(origin.pop("format", None), FORMAT, where=path, error=AdapterError, hint=hint)
    return origin


def _lora(folder: Path, config: PeftConfig, name: str, matrices: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """(A, B, scaling) of a module from its two tensors by their names in the file."""
    a, b = matrices.values()
    spec = config.spec_of(name)
    for key, tensor in matrices.items():
        if tensor.ndim != 2:
            shape = tuple(tensor.shape)
            raise AdapterError(f"{folder / TENSORS}: {key} is no matrix, its shape is {shape}.", hint=DAMAGED)
    if spec.rank != a.shape[0]:
        raise AdapterError(
            f"{folder / TENSORS}: {next(iter(matrices))} has rank {a.shape[0]}, {CONFIG} says {spec.rank}.",
            hint=f"Restore the file and {CONFIG} from one copy.",
        )
    return a, b, spec.scaling


def _config(adapter: Adapter, modules: Collection[str], *, biases: bool, base: str) -> dict[str, Any]:
    # In target_modules a last name selects all modules of that name; if some of them have no LoRA, full names are used.
    # So they are for a composite model, whose other parts have modules of the same last names.
    without_lora = {_last(name) for name in modules if name not in adapter.lora or f".{TEXT_PREFIX}" in name}
    in_full = [name for key in adapter.full if key.endswith(".weight") and (name := key.removesuffix(".weight"))]
    owners = {key.removesuffix(".bias") for key in adapter.full if key.endswith(".bias")}
    bias_only = owners - adapter.lora.keys() - set(in_full)  # modules of which only the bias is trained
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
        "target_modules": sorted({name if _last(name) in without_lora else _last(name) for name in adapter.lora}),
        "modules_to_save": sorted(set(in_full) - adapter.lora.keys() - adapter.tokens.keys()) or None,
        "trainable_token_indices": {name: list(indices) for name, (indices, _) in adapter.tokens.items()} or None,
        "bias": "all" if bias_only else "lora_only" if biases or owners & adapter.lora.keys() else "none",
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
    }


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _patterns(adapter: Adapter) -> dict[str, dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern: the modules whose rank or alpha differs from the spec's."""
    spec = adapter.spec
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for name, (a, _, scaling) in adapter.lora.items():
        rank = a.shape[0]
        alpha = scaling * (math.sqrt(rank) if spec.rslora else rank)
        if rank != spec.rank:
            ranks[name] = rank
        if not math.isclose(alpha, spec.alpha):
            alphas[name] = alpha
    return {"rank_pattern": ranks, "alpha_pattern": alphas}
