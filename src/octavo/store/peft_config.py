"""adapter_config.json of PEFT's format, as typed and bounded values.

The tensors in the adapter file must be those of the modules that the options select (store/peft_targets.py), which
adapters/complete.py checks where the model is known. In PEFT the keys of rank_pattern and alpha_pattern are regular
expressions. Here they must be names: a regular expression of an untrusted file can run endlessly (catastrophic
backtracking). target_modules and exclude_modules may be one, which store/name_pattern.py matches in bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.bounded_json import JsonError, flag, integer, number, read_object, shown, text
from octavo.errors import AdapterError
from octavo.layers.lora import MAX_ALPHA, MAX_RANK, LoraSpec
from octavo.models import embedding_keys
from octavo.store.peft_targets import Targets, read_targets

CONFIG = "adapter_config.json"
# Options with which PEFT computes something else than W x + s B A x. Source: peft 0.21, LoraConfig.
UNKNOWN_OPTIONS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "layer_replication", "target_parameters", "megatron_config",
)  # fmt: skip
# Initializations that change the frozen weights, so that A and B do not fit a plain base model.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The config values that decide the adapter's output, together with its tensors. They are part of its hash.
FUNCTION_KEYS = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
)  # fmt: skip
# A module name or its end after a dot; "|" separates several, "^" marks a full name, and a dot may be escaped.
_NAME_KEY = re.compile(r"\^?(?:[A-Za-z0-9_.|]|\\\.)+")


@dataclass(frozen=True)
class PeftConfig:
    """The values of adapter_config.json. `modules_to_save` and the keys of `token_indices` are names or name ends."""

    spec: LoraSpec
    ranks: dict[str, tuple[int, int]]  # name or name end -> (position of its key, rank)
    alphas: dict[str, tuple[int, float]]
    modules_to_save: tuple[str, ...]
    token_indices: dict[str, tuple[int, ...]]
    base: str  # base_model_name_or_path, or ""
    bias: str  # whose biases were trained: "none", "all" or "lora_only"
    targets: Targets | None  # the modules with LoRA; None if the file does not say
    function: dict[str, Any]  # the values of FUNCTION_KEYS

    def spec_of(self, name: str) -> LoraSpec:
        """The rank and alpha of one module."""
        rank, alpha = _first(self.ranks, name), _first(self.alphas, name)
        return LoraSpec(
            self.spec.rank if rank is None else int(rank), self.spec.alpha if alpha is None else alpha,
            self.spec.dropout, self.spec.rslora,
        )  # fmt: skip

    def saves(self, name: str) -> bool:
        """Whether modules_to_save names a module or a parent of it, by PEFT's rule."""
        return any(f".{saved}." in f".{name}." for saved in self.modules_to_save)

    def indices_of(self, name: str) -> tuple[int, ...] | None:
        """The token ids of a module with trainable tokens, in the order of its rows; None if there are none."""
        matches = (indices for key, indices in self.token_indices.items() if f".{name}".endswith(f".{key}"))
        return next(matches, None)


def read_config(folder: Path) -> PeftConfig:
    """The config in an adapter folder. AdapterError with the key of a value that octavo does not support."""
    content = read_object(folder / CONFIG, error=AdapterError)
    _refuse_unknown(folder, content)
    try:
        spec = LoraSpec(
            integer(content, "r", least=1, most=MAX_RANK),
            float(number(content, "lora_alpha", least=-MAX_ALPHA, most=MAX_ALPHA)),
            float(number(content, "lora_dropout", least=0, most=0.9999, default=0.0)),
            flag(content, "use_rslora"),
        )
        return PeftConfig(
            spec,
            _pattern(content, "rank_pattern", least=1, most=MAX_RANK),
            _pattern(content, "alpha_pattern", least=-MAX_ALPHA, most=MAX_ALPHA),
            _names(content, "modules_to_save"),
            _token_indices(content),
            text(content, "base_model_name_or_path", default=""),
            text(content, "bias", default="none"),
            read_targets(content),
            function_of(content),
        )
    except JsonError as error:
        raise AdapterError(f"The {CONFIG} in {folder} is not usable: {error}.", hint=_hint(error)) from error


def function_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values of FUNCTION_KEYS, which decide the adapter's output together with its tensors."""
    return {key: content.get(key) for key in FUNCTION_KEYS}


def _refuse_unknown(folder: Path, content: Mapping[str, Any]) -> None:
    kind = content.get("peft_type")
    unknown = [key for key in UNKNOWN_OPTIONS if content.get(key)]
    if str(content.get("init_lora_weights")).lower().startswith(CHANGES_THE_BASE):
        unknown.append(f"init_lora_weights={shown(content['init_lora_weights'])}")
    if kind != "LORA" or unknown:
        what = f"of the type {shown(kind)}" if kind != "LORA" else f"made with {', '.join(unknown)}"
        raise AdapterError(
            f"The adapter in {folder} is {what}.",
            hint="octavo reads LoRA and rsLoRA, with biases, modules_to_save and trainable_token_indices.",
        )


def _pattern(content: Mapping[str, Any], key: str, *, least: float, most: float) -> dict[str, tuple[int, Any]]:
    """rank_pattern or alpha_pattern: each name with the position of its key, since the first matching key applies.

    A name that must match in full starts with a dot, so that it is not the end of another name.
    """
    table = content.get(key) or {}
    if not isinstance(table, dict):
        raise JsonError(f"{key} is {shown(table)}; it must be an object")
    values: dict[str, tuple[int, Any]] = {}
    for position, name in enumerate(table):
        if not _NAME_KEY.fullmatch(name):
            raise JsonError(f"{key} has the key {shown(name)}, a regular expression; octavo takes names")
        value = number(table, name, least=least, most=most)
        if key == "rank_pattern":
            value = integer(table, name, least=int(least), most=int(most))
        full = "." if name.startswith("^") else ""
        for single in name.removeprefix("^").replace("\\.", ".").split("|"):
            values.setdefault(full + single, (position, value))
    return values


def _first(table: Mapping[str, tuple[int, Any]], name: str) -> Any:
    """The value of the first key that is the name, or its end after a dot; None without one."""
    parts = name.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    matches = [table[key] for key in (f".{name}", *ends) if key in table]
    return min(matches, key=lambda match: match[0])[1] if matches else None


def _names(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise JsonError(f"{key} is {shown(names)}; it must be a list of names")
    return tuple(names)


def _token_indices(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices by module. A list applies to the embedding, whatever its name."""
    key = "trainable_token_indices"
    value = content.get(key) or {}
    table = dict.fromkeys(embedding_keys(), value) if isinstance(value, list) else value
    if not isinstance(table, dict):
        raise JsonError(f"{key} is {shown(value)}; it must be a list of token ids, or one for each module")
    for indices in table.values():
        integers = isinstance(indices, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in indices)
        if not integers or not all(0 <= i < 2**31 for i in indices) or len(set(indices)) != len(indices):
            raise JsonError(f"{key} does not hold lists of different token ids")
    return {name: tuple(indices) for name, indices in table.items()}


def _hint(error: JsonError) -> str:
    if "regular expression" not in str(error):
        return ""
    each = "one key each" if "_pattern" in str(error) else "a list in place of the expression"
    return f"Write the modules' names into {CONFIG}, {each}: letters, digits, _ and dots."
