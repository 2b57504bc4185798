"""Folders that scripts around hivemind/gpt-j-6B-8bit save: frozen weights and trained adapters in one file.

Such a script saves the whole patched model. That is what hivemind/gpt-j-6B-8bit holds (dynamic8; the LayerNorms
and biases are the trained ones), and for each module NAME that has an adapter two tensors more, float32:

    NAME.adapter.0.weight    A: (r, K) of a linear, (V, r) of the embedding
    NAME.adapter.1.weight    B: (N, r) of a linear, (d, r) of the embedding

The module gives base(x) + B A x, without a scaling: LoRA with alpha = r. Legend: K inputs and N outputs of a
linear, V and d the shape of the embedding, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from octavo._version import __version__
from octavo.adapters import apply_
from octavo.errors import ModelError
from octavo.layers.lora import LoraSpec
from octavo.models import Model, WeightEntry, build, weight_entries
from octavo.store import peft
from octavo.store.contents import PAIR_ENDS, entries, stored_scheme
from octavo.store.files import new_folder
from octavo.store.hf_folder import WrittenLayer, check_free, write_folder
from octavo.store.peft import Adapter
from octavo.store.sources import FolderSource, Source, fingerprint
from octavo.store.weights import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Base:
    """A source without the adapters that it carries: a model like any other."""

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
        return [name for name in self.whole.names() if not name.endswith(PAIR_ENDS)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(name)

    def tensor(self, name: str) -> Tensor:
        return self.whole.tensor(name)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.whole.tokenizer()


def carries_pairs(source: Source) -> bool:
    """Whether the source holds adapters beside its weights."""
    return any(name.endswith(PAIR_ENDS) for name in source.names())


def base_of(source: Source) -> Source:
    """The source itself, or what is left of it without the adapters that it carries."""
    return Base(source) if carries_pairs(source) else source


def put_own_pairs_(model: Model, source: Source, *, say: Callable[[str], None]) -> None:
    """Puts the adapters that `source` carries on its base's `model` and says so; nothing if it carries none."""
    if carries_pairs(source):
        own = read_pairs(source)
        apply_(model, own)
        say(f"{source.files[0].parent} holds trained adapters on {len(own.pairs)} layers: they are on.")


def read_pairs(source: Source) -> Adapter:
    """The adapters of a source, and with them all of its norms and the biases of the layers that have one.

    So they are the whole of what was trained, and fit the original base as well as the source's own. ModelError
    names what has no place, no other half, another shape or a number that is not finite, and what the base lacks.
    """
    model = build(source.config)
    items, table = entries(Base(source), model), weight_entries(model)
    carried = [name for name in source.names() if name.endswith(PAIR_ENDS)]
    owners = {name.rpartition(".adapter.")[0] for name in carried}
    if lost := [name for name in carried if not _takes_pair(table.get(name.rpartition(".adapter.")[0]))]:
        raise ModelError(f"The checkpoint {source.files[0].parent} has an adapter that fits no layer: {lost[0]}.")
    pairs = {name: _pair(source, place, set(carried)) for name, place in table.items() if name in owners}
    trained = [
        name
        for name, item in items.items()
        if not item.is_matrix and (item.place.matrix is None or item.place.name in pairs)
    ]
    rank = next(iter(pairs.values()))[0].shape[0]
    embeddings = frozenset(name for name in pairs if not table[name].is_linear)
    full = {name: source.tensor(name).float() for name in trained}
    return Adapter(LoraSpec(rank, alpha=float(rank)), pairs, full, embeddings=embeddings)


def _takes_pair(place: WeightEntry | None) -> bool:
    return place is not None and place.matrix is not None


def _pair(source: Source, place: WeightEntry, carried: set[str]) -> tuple[Tensor, Tensor, float]:
    """(A (r, K), B (N, r), 1), or of an embedding (A (r, V), B (d, r), 1): views where the file has the type."""
    names = [place.name + end for end in PAIR_ENDS]
    if lacking := [name for name in names if name not in carried]:
        raise ModelError(f"The checkpoint {source.files[0].parent} lacks {lacking[0]}.")
    a, b = (source.tensor(name).float() for name in names)
    assert place.matrix is not None
    rows, columns = place.matrix.outputs[place.rows_key], place.matrix.in_features
    rank = b.shape[-1] if b.ndim else 0
    wanted = [(rank, columns), (rows, rank)] if place.is_linear else [(rows, rank), (columns, rank)]
    if [tuple(half.shape) for half in (a, b)] != wanted or rank < 1:
        raise ModelError(
            f"The adapter of {place.name} in {source.files[0].parent} has the shapes {tuple(a.shape)} and "
            f"{tuple(b.shape)}; its layer has {columns} inputs and {rows} outputs."
        )
    for name, half in zip(names, (a, b), strict=True):
        check_finite(name, half)
    return (a if place.is_linear else a.T), b, 1.0


def split(source: Source, out: Path, *, card: str, on_layer: Callable[[WrittenLayer], None] | None = None) -> Adapter:
    """Writes a source with adapters as out/base, a model that loads by itself, and out/adapter, PEFT's format.

    The base is stored as the source has it, bit for bit. The original's norms and biases are not in the source:
    the base has the trained ones, and so has the adapter, which thereby fits the original base too. `out` appears
    whole or not at all; in memory are one tensor, one open shard and the adapter. UsageError if `out` holds
    something; ModelError if the source carries no adapter or has no tokenizer, and what `read_pairs` refuses.
    `on_layer` is told of each frozen weight, `card` becomes the adapter's README.md. Returns the adapter.
    """
    check_free(out)
    if not carries_pairs(source):
        raise ModelError(
            f"{source.files[0].parent} holds no adapters: there is nothing to convert.",
            hint="It is a plain model. `octavo quantize --out NEW_FOLDER` writes it as safetensors.",
        )
    found, scheme = read_pairs(source), stored_scheme(source)
    with new_folder(out) as temporary:
        write_folder(Base(source), temporary / "base", scheme, on_layer=on_layer)
        identity = fingerprint(FolderSource(temporary / "base"))
        base = {"name": str(out / "base"), "sha256": identity, "scheme": scheme.name}
        found = replace(found, origin={"version": __version__, "base": base})
        modules = weight_entries(build(source.config))
        peft.write(temporary / "adapter", found, modules=modules, biases=True, base=str(out / "base"), card=card)
    return found
