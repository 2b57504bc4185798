"""The tensors that a checkpoint must contain for a model: names, schemes and shapes. Legend: (N, K) of a matrix."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from octavo.bounded_json import shortened, shown
from octavo.errors import ModelError
from octavo.models import Decoder, WeightEntry, weight_entries
from octavo.ops.quantize import SCHEMES, scheme_named
from octavo.ops.scheme import Scheme, Shape
from octavo.store.files import check_format
from octavo.store.foreign import refuse_tensors
from octavo.store.manifest import OTHER_FORMAT
from octavo.store.sources import Source

FORMAT = 1  # of the tensors of quantized folders; increase it when the layout of a scheme changes
SCALE_KINDS = ("absmax", "code", "nested_absmax", "nested_offset")
# Suffixes of the A and B of adapters that are embedded in a checkpoint; store/embedded_adapter.py reads them.
ADAPTER_SUFFIXES = (".adapter.0.weight", ".adapter.1.weight")
# Buffers in older checkpoints that octavo computes.
UNUSED_TENSORS = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq",
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One tensor of a checkpoint with its weight-map entry: a frozen weight, or another weight or a bias."""

    entry: WeightEntry
    kind: str  # "weight" or "bias"

    @property
    def is_matrix(self) -> bool:
        return self.entry.matrix is not None and self.kind == "weight"

    @property
    def shape(self) -> Shape:
        """(N, K) of a frozen weight."""
        matrix = self.entry.matrix
        assert matrix is not None
        return matrix.outputs[self.entry.rows_key], matrix.in_features


def stored_scheme(source: Source) -> Scheme:
    """The scheme of the source's frozen weights. ModelError for an unknown scheme and another format version."""
    written = source.config.get("octavo")
    if isinstance(written, dict):
        where = source.files[0].parent if source.files else Path("config.json")
        check_format(written.get("format"), FORMAT, where=where, error=ModelError, hint=OTHER_FORMAT)
        name = written.get("scheme")
        if not isinstance(name, str) or name not in SCHEMES:
            raise ModelError(
                f"The model's config.json names the scheme {shown(name)}, which octavo does not support.",
                hint=f"It supports {', '.join(SCHEMES)}. Was the folder written by a newer octavo?",
            )
        return scheme_named(name)
    has_code_tables = any(name.endswith(".code") for name in source.names())
    return scheme_named("dynamic8" if has_code_tables else "none")


def stored_scheme_at(source: Source, entry: WeightEntry) -> Scheme:
    """The scheme of one weight of the source. Other programs leave the embedding, the head and more unquantized."""
    written = source.config.get("octavo")
    if isinstance(written, dict) and entry.name in written.get("unquantized", ()):
        return scheme_named("none")
    return scheme_at(entry, stored_scheme(source))


def scheme_at(entry: WeightEntry, scheme: Scheme) -> Scheme:
    """The scheme of one weight of a model under `scheme`: embedding and head may have another one."""
    return scheme_named(scheme.embedding_scheme) if entry.is_embedding else scheme


def is_transposed(entry: WeightEntry, scheme: Scheme) -> bool:
    """Whether a weight is stored as (K, N) under `scheme`. Quantized ones are (N, K), as bitsandbytes has them too."""
    return entry.transposed and scheme.name == "none"


def entries(source: Source, model: Decoder) -> dict[str, Item]:
    """Tensor name -> Item, in the model's order. ModelError unless all needed tensors exist and no unknown ones."""
    refuse_embedded_adapter(source)
    expected = dict(items_of(model))
    present = set(source.names())
    redundant = {f"{model.config.head}.weight"} if model.config.tied else set()  # a tied head is equal to the embedding
    missing = [name for name in expected if name not in present]
    unknown = [
        name
        for name in present - expected.keys() - redundant
        if not name.endswith(UNUSED_TENSORS) and name.rpartition(".")[2] not in SCALE_KINDS
    ]
    if missing or unknown:
        refuse_tensors(sorted(unknown), str(source.files[0].parent))
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(sorted(unknown))} too many"] * bool(unknown)
        raise ModelError(
            f"The checkpoint {source.files[0].parent} does not fit its config.json: it {' and '.join(parts)}.",
            hint="Is the download complete, and is config.json the one that belongs to it?",
        )
    return expected


def refuse_embedded_adapter(source: Source) -> None:
    """ModelError if the source contains adapters: reading or writing its weights alone would lose them."""
    embedded = [name for name in source.names() if name.endswith(ADAPTER_SUFFIXES)]
    if embedded:
        folder, allow = source.files[0].parent, " --allow-pickle" * (source.files[0].suffix == ".bin")
        raise ModelError(
            f"{folder} has trained adapters next to its weights ({len(embedded):,} tensors, e.g. {embedded[0]}).",
            hint=f"Split it once with `octavo convert {shlex.quote(str(folder))}{allow} --out NEW_FOLDER`: "
            "NEW_FOLDER/base is then a plain model, and NEW_FOLDER/adapter its adapter.",
        )


def check_shapes(source: Source, items: Mapping[str, Item]) -> None:
    """ModelError unless all tensors of `items` have the shapes that the model gives them.

    Reads no weights, so it can run before memory is allocated for a model of wrong sizes.
    """
    for name, item in items.items():
        shape = source.shape(name)
        if not item.is_matrix:
            target = item.entry.parameter(item.kind)
            assert target is not None
            expected = tuple(target.shape)
        else:
            scheme = stored_scheme_at(source, item.entry)
            expected = tuple(scheme.layout(item.shape, torch.float32)["weight"][0])
            if is_transposed(item.entry, scheme):
                expected = expected[::-1]
            if len(expected) == 1:
                shape = (math.prod(shape),)  # bitsandbytes writes a column
        if shape != expected:
            raise misshapen(name, shape, expected)


def items_of(model: Decoder) -> Iterator[tuple[str, Item]]:
    """(tensor name, Item) of all tensors of a checkpoint, in order. A tied head has no weight of its own."""
    tied = model.config.tied
    for entry in weight_entries(model).values():
        for kind in ("weight", "bias"):
            if _has(entry, kind) and not (tied and entry.is_head and kind == "weight"):
                yield f"{entry.name}.{kind}", Item(entry, kind)


def _has(entry: WeightEntry, kind: str) -> bool:
    return (kind == "weight" and entry.matrix is not None) or entry.parameter(kind) is not None


def misshapen(name: str, shape: Sequence[int], expected: Sequence[int]) -> ModelError:
    """The error for a tensor of a wrong shape."""
    return ModelError(f"{name} has the shape {tuple(shape)}, but the model's config.json makes it {tuple(expected)}.")


def _some(names: list[str], most: int = 3) -> str:
    some = ", ".join(shortened(name) for name in names[:most])
    return some if len(names) <= most else f"{some} and {len(names) - most:,} more"
