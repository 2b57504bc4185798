"""A base with an adapter merged into its weights, as a source: W' = W + s B A, computed when a tensor is read.

    linear              W (N, K) + s B A             B (N, r), A (r, K)
    Conv1D of GPT-2     W (K, N) + s (B A)^T         as the checkpoint stores it
    embedding           W (V, d) + s A^T B^T         A (r, V), B (d, r)
    trained in full     the adapter's tensor in place of the base's: norms, biases, modules_to_save
    trained tokens      the adapter's rows in place of those of the matrix

The names, shapes and the order of rows are those of an unquantized checkpoint. A quantized base is dequantized. Sums
are in float32, in blocks of rows: in memory are one matrix of the result and a few blocks.

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding, s the scaling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from octavo.errors import AdapterError
from octavo.models import Decoder, WeightEntry, build, table_names, text_config, weight_entries
from octavo.ops.quantize import scheme_named
from octavo.ops.scheme import Parts, Scheme, Shape
from octavo.store.contents import Item, check_shapes, entries, items_of, stored_scheme_at
from octavo.store.full_weights import check_shape, check_tokens, check_vocabulary
from octavo.store.peft import Adapter
from octavo.store.sources import Source, fingerprint
from octavo.store.weights import check_finite, full_rows, matrix_parts, row_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUANTIZED = ("octavo", "quantization_config")  # entries of a config.json that describe quantized weights


class Change(NamedTuple):
    """What the adapter does to a matrix, in this order: another weight, other rows of tokens, LoRA."""

    weight: Tensor | None = None  # as the checkpoint stores it
    tokens: tuple[tuple[int, ...], Tensor] | None = None  # token ids, rows (n, d)
    lora: tuple[Tensor, Tensor, float] | None = None  # A, B, scaling

    @property
    def is_empty(self) -> bool:
        return all(part is None for part in self)


UNCHANGED = Change()


@dataclass(frozen=True)
class MergedSource:
    """`base` with `adapter` merged, all tensors in `dtype`; `adapters.merged` makes and checks one.

    The adapter has the names of the base's checkpoint. `own_tokenizer` replaces that of the base. An embedding and a
    head that are tied in the base and differ after the merge are untied.
    """

    base: Source
    adapter: Adapter
    dtype: torch.dtype = torch.float32
    own_tokenizer: PreTrainedTokenizerFast | None = field(default=None, repr=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json as that of an unquantized model, with the vocabulary and the type of the result."""
        kept = {key: value for key, value in self.base.config.items() if key not in QUANTIZED}
        changed: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.vocabulary != self._model.config.vocabulary:
            changed["vocab_size"] = self.vocabulary
        merged = _with_values(kept, changed)
        if text_config(kept) is not None:  # a composite model
            merged["text_config"] = _with_values(kept["text_config"], changed)
        if self._model.config.tied and not self._tied:
            merged["tie_word_embeddings"] = False
        return merged

    @property
    def vocabulary(self) -> int:
        """The rows of the merged embedding."""
        return self._matrix_shape(self._tables[0])[0]

    @property
    def generation_config(self) -> dict[str, Any]:
        return self.base.generation_config

    @property
    def files(self) -> list[Path]:
        return self.base.files

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.own_tokenizer or self.base.tokenizer()

    def names(self) -> list[str]:
        return list(self._items)

    def shape(self, name: str) -> tuple[int, ...]:
        item = self._items[name]
        if not item.is_matrix:
            parameter = item.entry.parameter(item.kind)
            assert parameter is not None
            return tuple(parameter.shape)
        return item.shape[::-1] if item.entry.transposed else item.shape

    def tensor(self, name: str) -> Tensor:
        """One merged tensor in `dtype`. ModelError if it has values that are not finite in this type."""
        item = self._items[name]
        if item.is_matrix:
            return self._matrix(name, item)
        given = self.adapter.full.get(name)
        return self._rounded(name, self.base.tensor(name) if given is None else given)

    def merged(self) -> dict[str, list[str]]:
        """What is merged: by module "LoRA", "tokens", and "weight" or "bias" that the adapter replaces."""
        kinds: dict[str, list[str]] = {name: [] for name in self._entries}
        for name in self.adapter.lora:
            kinds[name].append("LoRA")
        for name in self.adapter.tokens:
            kinds[name].append("tokens")
        for key in self.adapter.full:
            name, _, kind = key.rpartition(".")
            kinds[name].append(kind)
        return {name: each for name, each in kinds.items() if each}

    def fingerprint(self) -> str:
        """The identity of the merged weights, from those of base and adapter."""
        scalings = {name: scaling for name, (_, _, scaling) in sorted(self.adapter.lora.items())}
        parts = (fingerprint(self.base), self.adapter.sha256, json.dumps(scalings))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check(self) -> None:
        """AdapterError unless the adapter's full weights and tokens fit the base; ModelError for an incomplete base."""
        check_shapes(self.base, entries(self.base, self._model))
        for name, change in self._changes.items():
            entry = self._entries[self._stored_module(name)]
            if change.weight is not None:
                check_shape(entry, change.weight.t() if entry.transposed else change.weight)
            if change.tokens is not None:
                check_tokens(entry, self._matrix_shape(name), *change.tokens)
        check_vocabulary(*(self._matrix_shape(name)[0] for name in self._tables))
        for name, item in self._items.items():
            if not item.is_matrix:
                given = self.adapter.full.get(name)
                actual = tuple(self.base.shape(name) if given is None else given.shape)
                if actual != self.shape(name):
                    raise AdapterError(
                        f"{name} is {actual} in {'the base' if given is None else 'the adapter'}, and the merged "
                        f"model's must be {self.shape(name)}.",
                        hint="Give the model that the adapter was trained on.",
                    )

    @cached_property
    def _model(self) -> Decoder:
        """The base's decoder, without weights."""
        return build(self.base.config)

    @cached_property
    def _entries(self) -> dict[str, WeightEntry]:
        return weight_entries(self._model)

    @cached_property
    def _tables(self) -> tuple[str, str]:
        """The names of the embedding and of the head."""
        return table_names(self.base.config)

    @cached_property
    def _items(self) -> dict[str, Item]:
        """The tensors of the merged model."""
        return dict(items_of(build(self.config)))

    @cached_property
    def _changes(self) -> dict[str, Change]:
        """The change of each matrix that the adapter changes, by its module's name."""
        adapter, changes = self.adapter, {}
        for name, entry in self._entries.items():
            if entry.matrix is not None:
                changes[name] = Change(adapter.full.get(f"{name}.weight"), adapter.tokens.get(name))
        if self._model.config.tied:
            # A weight of one of the two outside PEFT's modules_to_save belongs to both (store/full_weights.py).
            embedding, head = self._tables
            for name, other in ((embedding, head), (head, embedding)):
                if changes[other].is_empty and name not in adapter.separate:
                    changes[other] = changes[name]
        changes = {name: change._replace(lora=adapter.lora.get(name)) for name, change in changes.items()}
        return {name: change for name, change in changes.items() if not change.is_empty}

    @cached_property
    def _tied(self) -> bool:
        """Whether embedding and head are one matrix after the merge."""
        embedding, head = (self._changes.get(name, UNCHANGED) for name in self._tables)
        if not self._model.config.tied:
            return False
        without_lora = embedding.lora is None and head.lora is None
        if without_lora and embedding.weight is head.weight and embedding.tokens is head.tokens:
            return True
        if len({self._matrix_shape(name) for name in self._tables}) > 1:
            return False
        both = zip(*map(self._blocks, self._tables), strict=True)
        return all(torch.equal(one, other) for (_, one), (_, other) in both)

    def _stored_module(self, name: str) -> str:
        """The module of the base whose weight belongs to `name`: the embedding for a tied head."""
        return self._tables[0] if self._model.config.tied and name == self._tables[1] else name

    def _matrix_shape(self, name: str) -> Shape:
        """(N, K) of a merged matrix, by its module's name."""
        entry = self._entries[name]
        assert entry.matrix is not None
        weight = self._changes.get(name, UNCHANGED).weight
        if weight is not None and weight.ndim == 2:
            rows, columns = weight.t().shape if entry.transposed else weight.shape
            return rows, columns
        return entry.matrix.outputs[entry.rows_key], entry.matrix.in_features

    def _unmerged(self, name: str) -> tuple[Parts, Scheme]:
        """The stored parts (N, K) of a matrix without tokens and LoRA, and their scheme."""
        weight = self._changes.get(name, UNCHANGED).weight
        if weight is not None:
            return {"weight": weight.t() if self._entries[name].transposed else weight}, scheme_named("none")
        entry = self._entries[self._stored_module(name)]
        stored = stored_scheme_at(self.base, entry)
        return matrix_parts(self.base, f"{entry.name}.weight", entry, stored), stored

    def _blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Slices of rows of a merged matrix (N, K), each with its values in float32."""
        shape, change = self._matrix_shape(name), self._changes.get(name, UNCHANGED)
        parts, stored = self._unmerged(name)
        if change.lora is not None:
            a, b, scaling = change.lora
            left, right = (b, a) if self._entries[name].is_linear else (a.t(), b.t())  # (N, r), (r, K)
            left, right = left.float(), right.float()
        for rows in row_blocks(shape, stored):
            block = full_rows(parts, shape, rows, stored).float()  # may be the base's own memory: not changed in place
            if change.tokens is not None:
                block = _with_tokens(block, rows, *change.tokens)
            if change.lora is not None:
                block = torch.addmm(block, left[rows], right, alpha=scaling)
            yield rows, block

    def _matrix(self, name: str, item: Item) -> Tensor:
        module, transposed = item.entry.name, item.entry.transposed
        if module not in self._changes:
            parts, stored = self._unmerged(module)
            if stored.name == "none" and parts["weight"].dtype == self.dtype:  # nothing is copied
                return parts["weight"].t() if transposed else parts["weight"]
        merged = torch.empty(self.shape(name), dtype=self.dtype)
        for rows, block in self._blocks(module):
            (merged.t() if transposed else merged)[rows] = self._rounded(name, block)
        return merged

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self.dtype)
        check_finite(f"{name}, merged, as {self.dtype}", rounded, hint="Choose a type of a larger range: bfloat16.")
        return rounded


def _with_tokens(block: Tensor, rows: slice, ids: tuple[int, ...], trained: Tensor) -> Tensor:
    """A copy of the rows `rows` of a matrix, with the trained rows of those of the tokens `ids` that are among them."""
    block = block.clone()
    for row, values in zip(ids, trained, strict=True):
        if rows.start <= row < rows.stop:
            block[row - rows.start] = values.float()
    return block


def _with_values(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, or its text part, with other values. torch_dtype is the former name of dtype."""
    return {key: value for key, value in config.items() if key != "torch_dtype"} | dict(values)
