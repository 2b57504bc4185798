"""The documents of `show_adapter`, `diff_adapters` and `combine_adapters`, as results.py has the others."""

from __future__ import annotations

from typing import Any, TypedDict

from octavo.api.results import Verdict


class AdapterBase(TypedDict):
    """The base of an adapter: the name that it gives, and the SHA-256 of the weights if octavo trained it."""

    name: str | None
    sha256: str | None


class Change(TypedDict):
    """||s B A||_F, and over ||W||_F if the base was given."""

    norm: float
    relative: float | None


class LayerChange(Change):
    """The change of a layer (None: of the modules outside the layers), together and by the modules' last names."""

    layer: int | None
    types: dict[str, Change]


class ModuleChange(Change):
    """The LoRA of a module. `type` is its last name, `parameters` are those of A and B."""

    name: str
    layer: int | None
    type: str
    rank: int
    scaling: float
    parameters: int


class AdapterRun(TypedDict):
    """The run that an adapter is in. `data_sha256` is the hash over the sorted hashes of its training files.

    `verdict` is that of the adapter that a finished run has; None for a checkpoint's.
    """

    path: str
    state: str
    data_sha256: str | None
    verdict: Verdict | None


class CombinedPart(TypedDict):
    """A part of a combined adapter: its weight, and the SHA-256 of its tensors' file."""

    name: str
    weight: float
    sha256: str


class ShownAdapter(TypedDict):
    """An adapter. `targets` and `in_full`: how many modules have LoRA by last name, and tensors are trained in full.

    `rank`, `alpha` and `scaling` are those of adapter_config.json; `modules` has those of each module.
    """

    adapter: str
    sha256: str
    base: AdapterBase
    rank: int
    alpha: float
    scaling: float
    rslora: bool
    dropout: float
    targets: dict[str, int]
    parameters: int
    in_full: dict[str, int]
    norm: float
    relative: float | None
    layers: list[LayerChange]
    modules: list[ModuleChange]
    step: int | None
    parents: list[CombinedPart]
    run: AdapterRun | None


class Distance(TypedDict):
    """Two changes: their norms, the cosine, the norm of the difference, and this over each of the norms."""

    norm_a: float
    norm_b: float
    cosine: float | None
    difference: float
    relative_to_a: float | None
    relative_to_b: float | None


class LayerDistance(Distance):
    """A layer; None: the modules outside the layers."""

    layer: int | None


class ModuleDistance(LayerDistance):
    """A module. An adapter without LoRA on it changes it by 0."""

    name: str


class AdapterDifference(Distance):
    """Two adapters. `base` is same, different or unknown; `settings` has the values of both where they differ.

    `in_full`: the tensors that one alone trains in full, and how much those of both differ.
    """

    a: str
    b: str
    base: str
    base_sha256: list[str | None]
    settings: dict[str, list[Any]]
    only_in_a: list[str]
    only_in_b: list[str]
    layers: list[LayerDistance]
    modules: list[ModuleDistance]
    in_full: dict[str, Any]
    text: str


class CombinedAdapter(TypedDict):
    """A written adapter. `error` is the relative one of the SVD, of all modules together; `rank` the largest."""

    out: str
    sha256: str
    parents: list[dict[str, Any]]
    base: AdapterBase
    rank: int
    error: float
    modules: list[dict[str, Any]]
    in_full: list[str]
