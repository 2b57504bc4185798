"""The options of `octavo adapters show`, `diff` and `combine`. See options.py."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from octavo.config.section import Paths, Section


def _weights(value: object) -> object:
    """A list of ADAPTER=WEIGHT from one such string, a list of them, or a mapping from adapters to numbers."""
    if isinstance(value, Mapping):
        pairs = [(fspath(key) if isinstance(key, PathLike) else key, weight) for key, weight in value.items()]
        return [f"{name}={weight!r}" for name, weight in pairs]
    return [value] if isinstance(value, str) else value


Weights = Annotated[list[str], BeforeValidator(_weights)]


class AdapterBaseOptions(Section):
    """The base model of the adapters."""

    panel = "Base model"

    model: str | None = Field(None, description="Base model: a folder, a .gguf file, a hub id, or smollm2.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")


class AdapterFileOptions(Section):
    """How adapter files are read."""

    panel = "Files"

    allow_pickle: bool = Field(
        False, description="Read pickled .bin files (weights only) if there is no safetensors file."
    )


class AdapterShowOptions(Section):
    """The adapter to show."""

    panel = "Adapter"

    adapter: str | None = Field(None, description="Folder of an adapter or of a run, or RUN@STEP for a checkpoint.")


class AdapterDiffOptions(Section):
    """The two adapters to compare."""

    panel = "Adapters"

    adapters: Paths = Field([], description="Adapter, run, or RUN@STEP; two of them.")


class AdapterCombineOptions(Section):
    """The adapters to combine, and the folder to write."""

    panel = "Adapters"

    adapters: Weights = Field(
        [], description="ADAPTER=WEIGHT, as runs/a=0.7: an adapter, a run, or RUN@STEP; may be repeated."
    )
    out: Path | None = Field(None, description="New folder to write.")
    rank: int | None = Field(
        None, ge=1, description="LoRA rank of the result, by SVD; default: the sum of the ranks, which is exact."
    )
    force: bool = Field(False, description="Combine also adapters that were trained on different base weights.")
