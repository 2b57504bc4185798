"""Single weights of a base, under the names that an adapter has for its modules; the model is not loaded.

Legend: N outputs and K inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from octavo.errors import AdapterError
from octavo.models import WeightEntry, build, names_in_file, weight_entries
from octavo.store.contents import Item, check_shapes, entries, stored_scheme_at
from octavo.store.sources import Source
from octavo.store.weights import full_rows, matrix_parts, row_blocks


class BaseWeights:
    """The weights of `source` for adapters whose modules have the names `given`. Quantized ones are dequantized."""

    def __init__(self, source: Source, given: Collection[str]) -> None:
        self._source = source
        model = build(source.config)
        self._items = entries(source, model)
        check_shapes(source, self._items)
        by_name = weight_entries(model)
        in_file = names_in_file([entry.module for entry in by_name.values()], given)
        self._entries = by_name | {in_file[entry.module]: entry for entry in by_name.values()}
        self.modules = tuple(in_file.values())

    def norm(self, name: str) -> float:
        """||W||_F of the matrix of a module. AdapterError if the base has none of this name."""
        _, item = self._item(f"{name}.weight")
        if not item.is_matrix:
            raise _unknown(name)
        blocks = self._blocks(f"{name}.weight")
        return math.sqrt(math.fsum(float(torch.linalg.vector_norm(block)) ** 2 for block in blocks))

    def tensor(self, key: str) -> Tensor:
        """A weight or a bias in float32, in the layout of the checkpoint: NAME.weight or NAME.bias."""
        name, item = self._item(key)
        if not item.is_matrix:
            return self._source.tensor(name).float()
        weight = torch.cat(list(self._blocks(key)))  # (N, K)
        return weight.t().contiguous() if item.entry.transposed else weight

    def _blocks(self, key: str) -> Iterator[Tensor]:
        """The rows of a matrix (N, K) in float32, a block at a time."""
        name, item = self._item(key)
        scheme = stored_scheme_at(self._source, item.entry)
        parts = matrix_parts(self._source, name, item.entry, scheme)
        for rows in row_blocks(item.shape, scheme):
            yield full_rows(parts, item.shape, rows, scheme).float()

    def _item(self, key: str) -> tuple[str, Item]:
        """The name and the item of a tensor of the checkpoint. A tied head is the embedding."""
        module, _, kind = key.rpartition(".")
        entry = self._entries.get(module)
        if entry is None:
            raise _unknown(module)
        name = f"{entry.name}.{kind}"
        if name not in self._items and entry.is_head and kind == "weight":
            name = f"{self._embedding().name}.weight"
        if name not in self._items:
            raise _unknown(key)
        return name, self._items[name]

    def _embedding(self) -> WeightEntry:
        return next(item.entry for item in self._items.values() if item.is_matrix and item.entry.is_embedding)


def _unknown(name: str) -> AdapterError:
    return AdapterError(
        f"The base has no {name}, which the adapter changes.", hint="Give the model that it was trained on."
    )
