"""Values of a GGUF file's metadata, checked: sizes, decimals, windows. A model's keys start with its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from octavo.bounded_json import shown
from octavo.errors import ModelError
from octavo.store.gguf_header import Header
from octavo.store.gguf_vocabulary import ELSEWHERE


@dataclass(frozen=True)
class Metadata:
    """The entries `ARCHITECTURE.key` of a header. A method raises ModelError for a value of another kind."""

    header: Header
    architecture: str

    @property
    def path(self) -> Path:
        return self.header.path

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is stored."""
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer. A list with one value per layer is accepted if all layers agree."""
        value = self.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "should be a positive number and")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A positive float in its shortest decimal form: float32 0.0000099999997 becomes 1e-05."""
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < float("inf"):
            raise self.wrong(key, "should be a positive number and")
        return float(str(np.float32(value)))

    def optional_decimal(self, key: str, default: float | None = None) -> float | None:
        """A positive float, or None for 0, which llama.cpp takes for "none"."""
        value = self.get(key, default)
        return None if value is None or value == 0 else self.decimal(key, default)

    def window(self, default: int) -> int:
        """The positions that a sliding window covers; `default` without one."""
        window = self.get("attention.sliding_window") or default
        if type(window) is not int or window < 1:
            raise self.wrong("attention.sliding_window", "")
        return window

    def has_tensor(self, name: str) -> bool:
        return name in self.header.tensors

    def wrong(self, key: str, problem: str) -> ModelError:
        """The error for the value of `key`."""
        return ModelError(
            f"{self.path}: {self.architecture}.{key} {problem}{' ' * bool(problem)}is {shown(self.get(key))}.",
            hint=ELSEWHERE,
        )

    def refused(self, feature: str) -> ModelError:
        """The error for a feature that octavo does not compute."""
        return ModelError(f"{self.path}: the model uses {feature}, which is not supported.", hint=ELSEWHERE)
