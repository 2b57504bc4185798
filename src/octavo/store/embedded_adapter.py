"""Checkpoints of scripts around hivemind/gpt-j-6B-8bit: frozen weights and trained adapters in one file.

Such a script saves the whole patched model. The file contains the tensors of hivemind/gpt-j-6B-8bit (dynamic8; the
LayerNorms and biases are trained), and for each module NAME with an adapter two more tensors, float32:

    NAME.adapter.0.weight    A: (r, K) of a linear, (V, r) of the embedding
    NAME.adapter.1.weight    B: (N, r) of a linear, (d, r) of the embedding

The module computes base(x) + B A x without a scaling: LoRA with alpha = r.

Legend: K inputs and N outputs of a linear, V vocabulary size and d width of the embedding, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from octavo._version import __version__
from octavo.errors import ModelError
from octavo.layers.lora import LoraSpec
from octavo.models import WeightEntry, build, module_names, parse, weight_entries
from octavo.store import peft
from octavo.store.contents import ADAPTER_SUFFIXES, entries, stored_scheme
from octavo.store.files import new_folder
from octavo.store.hf_folder import WrittenLayer, write_folder
from octavo.store.peft import Adapter
from octavo.store.sinks import check_free
from octavo.store.sources import FolderSource, Source, fingerprint
from octavo.store.weights import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Base:
    """A source without its embedded adapters, as a plain model."""

    whole: Source

    @property
    def config(self) -> dict[str, Any]:
        return self.whole.config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.whole.generation_config

    @property
    def files(self) -> list[Path]:
        return self.whole.files

    def names(self) -> list[str]:
        return [name for name in self.whole.names() if not name.endswith(ADAPTER_SUFFIXES)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(name)

    def tensor(self, name: str) -> Tensor:
        return self.whole.tensor(name)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.whole.tokenizer()


def has_embedded_adapter(source: Source) -> bool:
    """Whether the source contains adapters in addition to its weights."""
    return any(name.endswith(ADAPTER_SUFFIXES) for name in source.names())


def base_of(source: Source) -> Source:
    """The source without its embedded adapters."""
    return Base(source) if has_embedded_adapter(source) else source


def read_embedded_adapter(source: Source) -> Adapter:
    """The embedded adapters of a source, all of its norms, and the biases of the layers with an adapter.

    These are all parameters that the script trained, so the result fits the original base as well as the source's own.
    ModelError for an adapter without a layer, without its A or B, of a wrong shape or with values that are not finite,
    and for a tensor that the base lacks.
    """
    model = build(source.config)
    items, by_name = entries(Base(source), model), weight_entries(model)
    embedded = [name for name in source.names() if name.endswith(ADAPTER_SUFFIXES)]
    owners = {name.rpartition(".adapter.")[0] for name in embedded}
    if unknown := [name for name in embedded if not _takes_lora(by_name.get(name.rpartition(".adapter.")[0]))]:
        raise ModelError(f"The checkpoint {source.files[0].parent} has an adapter that fits no layer: {unknown[0]}.")
    lora = {name: _read_lora(source, entry, set(embedded)) for name, entry in by_name.items() if name in owners}
    trained = [
        name
        for name, item in items.items()
        if not item.is_matrix and (item.entry.matrix is None or item.entry.name in lora)
    ]
    rank = next(iter(lora.values()))[0].shape[0]
    embeddings = frozenset(name for name in lora if not by_name[name].is_linear)
    full = {name: source.tensor(name).float() for name in trained}
    return Adapter(LoraSpec(rank, alpha=float(rank)), lora, full, embeddings=embeddings)


def _takes_lora(entry: WeightEntry | None) -> bool:
    return entry is not None and entry.matrix is not None


def _read_lora(source: Source, entry: WeightEntry, embedded: set[str]) -> tuple[Tensor, Tensor, float]:
    """(A (r, K), B (N, r), 1.0) of a linear, (A (r, V), B (d, r), 1.0) of an embedding. float32 tensors are not copied.

    The scaling is 1, since the scripts use none.
    """
    names = [entry.name + suffix for suffix in ADAPTER_SUFFIXES]
    if missing := [name for name in names if name not in embedded]:
        raise ModelError(f"The checkpoint {source.files[0].parent} lacks {missing[0]}.")
    a, b = (source.tensor(name).float() for name in names)  # linear: (r, K), (N, r); embedding: (V, r), (d, r)
    assert entry.matrix is not None
    rows, columns = entry.matrix.outputs[entry.rows_key], entry.matrix.in_features
    rank = b.shape[-1] if b.ndim else 0
    expected = [(rank, columns), (rows, rank)] if entry.is_linear else [(rows, rank), (columns, rank)]
    if [tuple(matrix.shape) for matrix in (a, b)] != expected or rank < 1:
        raise ModelError(
            f"The adapter of {entry.name} in {source.files[0].parent} has the shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)}; its layer has {columns} inputs and {rows} outputs."
        )
    for name, matrix in zip(names, (a, b), strict=True):
        check_finite(name, matrix)
    return (a if entry.is_linear else a.T), b, 1.0


def split(source: Source, out: Path, *, readme: str, on_layer: Callable[[WrittenLayer], None] | None = None) -> Adapter:
    """Splits a source with embedded adapters into out/base, a plain model, and out/adapter in PEFT's format.

    The base is stored bit for bit as in the source. The norms and biases of the original model are not in the source:
    the base has the trained ones, and so has the adapter, which therefore fits the original base too. `out` is written
    atomically. In memory are one tensor, one open shard and the adapter. `on_layer` is called for each frozen weight,
    `readme` becomes the adapter's README.md. Returns the adapter.

    UsageError if `out` is not empty; ModelError if the source has no embedded adapter or no tokenizer, and as
    `read_embedded_adapter`.
    """
    check_free(out)
    if not has_embedded_adapter(source):
        raise ModelError(
            f"{source.files[0].parent} holds no adapters: there is nothing to convert.",
            hint="It is a plain model. `octavo quantize --out NEW_FOLDER` writes it as safetensors.",
        )
    adapter, scheme = read_embedded_adapter(source), stored_scheme(source)
    with new_folder(out) as temporary:
        write_folder(Base(source), temporary / "base", scheme, on_layer=on_layer)
        identity = fingerprint(FolderSource(temporary / "base"))
        base = {"name": str(out / "base"), "sha256": identity, "scheme": scheme.name}
        adapter = replace(adapter, origin={"version": __version__, "base": base})
        modules = module_names(parse(source.config))
        peft.write(temporary / "adapter", adapter, modules=modules, biases=True, base=str(out / "base"), readme=readme)
    return adapter
