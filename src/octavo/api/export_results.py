"""The documents of the commands that write models for other programs, the same as with `--json`."""

from __future__ import annotations

from typing import TypedDict

from octavo.api.results import WrittenWeight


class ExportResult(TypedDict):
    """A GGUF file. `model_scheme` is that of the weights that it was made from, none: unquantized."""

    out: str
    to: str
    type: str
    model: str
    model_scheme: str
    adapter: str | None
    adapter_sha256: str | None
    bytes: int
    seconds: float


class MergedModule(TypedDict):
    """A module of the base and what the adapter changed: "LoRA", "tokens", "weight", "bias"."""

    name: str
    merged: list[str]


class MergeResult(TypedDict):
    """A merged model. `base_scheme` is that of the weights that the adapter was merged into, none: unquantized.

    `error` is ||W - W'|| / ||W|| over all weights that were quantized, W the merged ones; None for a floating type.
    """

    out: str
    type: str
    base: str
    base_scheme: str
    adapter: str
    adapter_sha256: str
    modules: list[MergedModule]
    bytes: int
    seconds: float
    error: float | None
    layers: list[WrittenWeight]
