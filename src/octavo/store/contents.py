"""What a checkpoint must hold for a model: the names of its tensors, their schemes and their shapes."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from octavo.bounded_json import shortened, shown
from octavo.errors import ModelError
from octavo.models import Model, WeightEntry, weight_entries
from octavo.ops.quantize import SCHEMES, Scheme, Shape, scheme_named
from octavo.store.foreign import refuse_tensors
from octavo.store.sources import Source

SCALE_KINDS = ("absmax", "code")
# Adapters that a checkpoint carries itself, the ends of A's and B's names; store/embedded_adapter.py reads them.
PAIR_ENDS = (".adapter.0.weight", ".adapter.1.weight")
# Buffers that older checkpoints carry and that are computed here.
UNUSED_TENSORS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attn.rotary_emb.inv_freq")


@dataclass(frozen=True)
class Item:
    """One entry of a checkpoint that belongs to a place: a frozen weight, or a norm's or bias's numbers."""

    place: WeightEntry
    kind: str  # "weight" or "bias"

    @property
    def is_matrix(self) -> bool:
        return self.place.matrix is not None and self.kind == "weight"

    @property
    def shape(self) -> Shape:
        """(N, K) of a frozen weight."""
        matrix = self.place.matrix
        assert matrix is not None
        return matrix.outputs[self.place.rows_key], matrix.in_features


def stored_scheme(source: Source) -> Scheme:
    """The scheme that the source's frozen weights are stored under."""
    own = source.config.get("octavo")
    if isinstance(own, dict):
        name = own.get("scheme")
        if not isinstance(name, str) or name not in SCHEMES:
            raise ModelError(
                f"The model's config.json names the scheme {shown(name)}, which octavo does not support.",
                hint=f"It supports {', '.join(SCHEMES)}. Was the folder written by a newer octavo?",
            )
        return scheme_named(name)
    coded = any(name.endswith(".code") for name in source.names())
    return scheme_named("dynamic8" if coded else "none")


def scheme_at(place: WeightEntry, scheme: Scheme) -> Scheme:
    """The scheme of one weight of a model that is under `scheme`."""
    return scheme_named(scheme.embedding_scheme) if place.is_embedding else scheme


def entries(source: Source, model: Model) -> dict[str, Item]:
    """Tensor name -> what it is, in the model's order. Everything needed is there, nothing is left over."""
    refuse_pairs(source)
    wanted = dict(items_of(model))
    present = set(source.names())
    needless = {"lm_head.weight"} if model.config.tied else set()  # equal to the embedding, or it would not be tied
    missing = [name for name in wanted if name not in present]
    unknown = [
        name
        for name in present - wanted.keys() - needless
        if not name.endswith(UNUSED_TENSORS) and name.rpartition(".")[2] not in SCALE_KINDS
    ]
    if missing or unknown:
        refuse_tensors(sorted(unknown), str(source.files[0].parent))
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(sorted(unknown))} too many"] * bool(unknown)
        raise ModelError(
            f"The checkpoint {source.files[0].parent} does not fit its config.json: it {' and '.join(parts)}.",
            hint="Is the download complete, and is config.json the one that belongs to it?",
        )
    return wanted


def refuse_pairs(source: Source) -> None:
    """ModelError if the source carries adapters: to read or write its weights alone would lose them."""
    carried = [name for name in source.names() if name.endswith(PAIR_ENDS)]
    if carried:
        folder, allow = source.files[0].parent, " --allow-pickle" * (source.files[0].suffix == ".bin")
        raise ModelError(
            f"{folder} holds trained adapters beside its frozen weights ({len(carried):,} tensors like {carried[0]}).",
            hint=f"Split it once with `octavo convert {shlex.quote(str(folder))}{allow} --out NEW_FOLDER`: "
            "NEW_FOLDER/base is then a model like any other, and NEW_FOLDER/adapter its adapter.",
        )


def check_shapes(source: Source, items: Mapping[str, Item]) -> None:
    """ModelError unless all tensors that `entries` lists have the shapes that the model gives them. Reads no weights,
    so that it can be called before any memory is allocated for a model of wrong sizes.
    """
    stored = stored_scheme(source)
    for name, item in items.items():
        found = source.shape(name)
        if not item.is_matrix:
            target = item.place.parameter(item.kind)
            assert target is not None
            wanted = tuple(target.shape)
        else:
            scheme = scheme_at(item.place, stored)
            wanted = tuple(scheme.layout(item.shape, torch.float32)["weight"][0])
            if scheme.name == "nf4":
                found = (math.prod(found),)  # bitsandbytes writes a column
        if found != wanted:
            raise misshapen(name, found, wanted)


def items_of(model: Model) -> Iterator[tuple[str, Item]]:
    """(tensor name, item) of all that a checkpoint holds, in order; a tied head has no weight of its own."""
    tied = model.config.tied
    for place in weight_entries(model).values():
        for kind in ("weight", "bias"):
            if _has(place, kind) and not (tied and place.is_head and kind == "weight"):
                yield f"{place.name}.{kind}", Item(place, kind)


def _has(place: WeightEntry, kind: str) -> bool:
    return (kind == "weight" and place.matrix is not None) or place.parameter(kind) is not None


def misshapen(name: str, found: Sequence[int], wanted: Sequence[int]) -> ModelError:
    """The error of a tensor of a wrong shape."""
    return ModelError(f"{name} has the shape {tuple(found)}, but the model's config.json makes it {tuple(wanted)}.")


def _some(names: list[str], most: int = 3) -> str:
    some = ", ".join(shortened(name) for name in names[:most])
    return some if len(names) <= most else f"{some} and {len(names) - most:,} more"
