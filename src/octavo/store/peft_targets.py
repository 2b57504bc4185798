"""The modules that adapter_config.json selects for LoRA, by PEFT's rules.

target_modules is a list of names and name ends, a regular expression of whole names, or "all-linear".
exclude_modules is a list or a regular expression. layers_to_transform keeps the modules of some layers, unless
target_modules has their full name. Source: peft 0.21, tuners_utils.check_target_module_exists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.bounded_json import JsonError, shown
from octavo.store.name_pattern import NamePattern

ALL_LINEAR = "all-linear"
_LAYERS_NAME = re.compile(r"[A-Za-z0-9_.]+")  # of layers_pattern, which PEFT puts into a regular expression

Selected = frozenset[str] | NamePattern  # names and name ends, or a pattern of whole names


@dataclass(frozen=True)
class Targets:
    """The selection of an adapter_config.json. `modules` is None for all-linear: every linear but the head."""

    modules: Selected | None
    excluded: Selected = frozenset()
    layers: frozenset[int] | None = None  # None: all
    lists: tuple[str, ...] = ()  # names of the lists of layers that `layers` counts in; (): any

    def includes(self, name: str, *, is_block_linear: bool) -> bool:
        """Whether PEFT would put LoRA on the module `name`. `is_block_linear`: it is a linear other than the head."""
        if _matches(self.excluded, name):
            return False
        if self.modules is None:
            return is_block_linear
        if not _matches(self.modules, name):
            return False
        if isinstance(self.modules, NamePattern) or name in self.modules or self.layers is None:
            return True
        return self._layer(name) in self.layers

    def _layer(self, name: str) -> int | None:
        """The index of the layer that a module belongs to, or None."""
        parts = name.split(".")
        for i, part in enumerate(parts[1:-1], start=1):
            before = f".{'.'.join(parts[:i])}"
            if part.isdecimal() and (any(before.endswith(f".{one}") for one in self.lists) if self.lists else i > 1):
                return int(part)
        return None


def read_targets(content: Mapping[str, Any]) -> Targets | None:
    """The selection of an adapter_config.json; None if it has none. JsonError for one that octavo does not read."""
    value = content.get("target_modules")
    if not value:
        return None
    modules = None if isinstance(value, str) and value.lower() == ALL_LINEAR else _selected(content, "target_modules")
    return Targets(modules, _selected(content, "exclude_modules"), _layers(content), _lists(content))


def _selected(content: Mapping[str, Any], key: str) -> Selected:
    value = content.get(key) or []
    if isinstance(value, str):
        try:
            return NamePattern(value)
        except JsonError as error:
            raise JsonError(f"{key}: {error}") from error
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise JsonError(f"{key} is {shown(value)}; it must be a list of names or a regular expression")
    return frozenset(value)


def _layers(content: Mapping[str, Any]) -> frozenset[int] | None:
    value = content.get("layers_to_transform")
    layers = [value] if isinstance(value, int) else value or []
    if not isinstance(layers, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in layers):
        raise JsonError(f"layers_to_transform is {shown(value)}; it must be a list of integers")
    return frozenset(layers) or None


def _lists(content: Mapping[str, Any]) -> tuple[str, ...]:
    value = content.get("layers_pattern") or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(one, str) and _LAYERS_NAME.fullmatch(one) for one in names):
        raise JsonError(f"layers_pattern is {shown(value)}; octavo takes names")
    return tuple(names)


def _matches(selected: Selected, name: str) -> bool:
    if isinstance(selected, NamePattern):
        return selected.fullmatch(name)
    parts = name.split(".")
    return any(".".join(parts[i:]) in selected for i in range(len(parts)))
