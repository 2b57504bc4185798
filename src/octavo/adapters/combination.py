"""The weighted sum of adapters of one base as one adapter.

LoRA: sum_i w_i s_i B_i A_i for each module, from the adapters that have it; low_rank.py has the mathematics.
Norms, biases and weights that are trained in full, and rows of trained tokens:

    base + sum_i w_i (full_i - base)

over the adapters i that have the tensor. The base is needed unless their weights sum to 1: then it is their mean.

Legend: r rank, K inputs and N outputs of a linear, V vocabulary size and d width of an embedding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from octavo.adapters.low_rank import Change, Truncated, stacked, truncated
from octavo.bounded_json import some
from octavo.errors import AdapterError
from octavo.layers.lora import LoraSpec
from octavo.models import layer_of
from octavo.store.peft import Adapter
from octavo.store.peft_targets import Targets

Base = Callable[[str], Tensor]  # the base's tensor of a key, NAME.weight or NAME.bias, in the checkpoint's layout
Tokens = tuple[tuple[int, ...], Tensor]  # token ids, their rows (n, d)

NEEDS_BASE = "Give the base with --model, or weights whose sum is 1 over the adapters that have the tensor."


@dataclass(frozen=True)
class Weighted:
    """An adapter and its weight in the sum."""

    weight: float
    adapter: Adapter


@dataclass(frozen=True)
class Combination:
    """The sum, and by module what --rank cut off."""

    adapter: Adapter
    truncated: Mapping[str, Truncated]

    @property
    def error(self) -> float:
        """||X - X'||_F / ||X||_F over all modules."""
        whole = math.fsum(one.whole for one in self.truncated.values())
        return math.sqrt(math.fsum(one.cut for one in self.truncated.values()) / whole) if whole else 0.0


def combined(parts: Sequence[Weighted], *, rank: int | None = None, base: Base | None = None) -> Combination:
    """The sum of `parts`, with LoRA of the sum of their ranks, or of at most `rank` by SVD.

    AdapterError if the adapters do not fit each other, if the sum overflows, and if it needs the base. A part of weight
    0 is left out.
    """
    parts = [part for part in parts if part.weight]
    if not parts:
        raise AdapterError("All weights are 0: the sum is the base.", hint="Give at least one other weight.")
    _check(parts)
    results: dict[str, Truncated] = {}
    for name in _keys(part.adapter.lora for part in parts):
        change = stacked(_changes(parts, name))
        results[name] = truncated(change, len(change[0]) if rank is None else rank)
    tokens = {name: _tokens(parts, name, base) for name in _keys(part.adapter.tokens for part in parts)}
    full = {key: _full(parts, key, base) for key in _keys(part.adapter.full for part in parts)}
    lora = {name: one.change for name, one in results.items()}
    if infinite := [name for name, (a, b, _) in lora.items() if not _finite(a, b)]:
        raise AdapterError(f"The sum is not finite in float32: {some(infinite)}.", hint="Give smaller weights.")
    adapter = Adapter(
        _spec(parts, lora), lora, full,
        embeddings=frozenset().union(*(part.adapter.embeddings for part in parts)),
        tokens=tokens,
        separate=frozenset().union(*(part.adapter.separate for part in parts)),
        base_layers=frozenset(key for key in full if all(_untrained(part.adapter, key) for part in parts)),
        base=parts[0].adapter.base,
    )  # fmt: skip
    return Combination(replace(adapter, full=_with_biases(parts, adapter, base)), results)


def by_layer(names: Iterable[str]) -> list[str]:
    """Names of modules or tensors, sorted: layer by layer, then those outside. A file has them in any order."""
    return sorted(names, key=lambda name: (layer_of(name) is None, layer_of(name) or 0, name))


def modules_of(parts: Sequence[Weighted], adapter: Adapter) -> set[str]:
    """Names of modules for `peft.fill` where the model is not known.

    The last name of a module alone selects all modules of that name. It is written alone only if one of the adapters
    says so. Else the set has that last name too, as a module without LoRA, so that full names are written.
    """
    selected = [part.adapter.config.targets for part in parts if part.weight and part.adapter.config]
    plain = [one for one in selected if one and not one.excluded and one.layers is None]
    last_names = {name.rpartition(".")[2] for name in adapter.lora}
    return {*adapter.lora, *(name for name in last_names if not any(_names(targets, name) for targets in plain))}


def _names(targets: Targets, name: str) -> bool:
    return isinstance(targets.modules, frozenset) and name in targets.modules


def _check(parts: Sequence[Weighted]) -> None:
    """AdapterError unless each module is the same kind of module, trained the same way, in all adapters."""
    for name in _keys(part.adapter.lora for part in parts):
        having = [part.adapter for part in parts if name in part.adapter.lora]
        shapes = [(one.lora[name][0].shape[1], one.lora[name][1].shape[0]) for one in having]
        if len(set(shapes)) > 1 or len({name in one.embeddings for one in having}) > 1:
            sizes = " and ".join(f"{inputs:,} inputs and {outputs:,} outputs" for inputs, outputs in shapes)
            raise AdapterError(f"The adapters do not fit each other: {name} has {sizes}.", hint="Check their bases.")
    key_of = "{}.weight".format
    lora = set(_keys(part.adapter.lora for part in parts))
    tokens = set(_keys(part.adapter.tokens for part in parts))
    trained = {key for part in parts for key in part.adapter.full if not _untrained(part.adapter, key)}
    if mixed := sorted(name for name in lora | tokens if key_of(name) in trained or name in lora & tokens):
        raise AdapterError(
            f"The adapters train {some(mixed)} in different ways: with LoRA, by tokens, or in full.",
            hint="Combine adapters that train it in one way.",
        )


def _untrained(adapter: Adapter, key: str) -> bool:
    """Whether the adapter leaves a tensor as in the base: it has none, or PEFT saved it with a LoRA layer."""
    name, _, kind = key.rpartition(".")
    return key not in adapter.full or (kind == "weight" and key in adapter.base_layers and name not in adapter.separate)


def _changes(parts: Sequence[Weighted], name: str) -> list[Change]:
    """The changes w s B A of a module, from the adapters that have it."""
    found = [(part.weight, part.adapter.lora[name]) for part in parts if name in part.adapter.lora]
    return [(a, b, weight * scaling) for weight, (a, b, scaling) in found]


def _full(parts: Sequence[Weighted], key: str, base: Base | None) -> Tensor:
    """A tensor that is trained in full, or a weight of the base that PEFT saved with LoRA."""
    having = [part for part in parts if key in part.adapter.full]
    tensors = [part.adapter.full[key] for part in having]
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise AdapterError(f"The adapters do not fit each other: {key} is {shapes}.", hint="Check their vocabularies.")
    if all(_untrained(part.adapter, key) for part in having) and all(torch.equal(tensors[0], t) for t in tensors):
        return tensors[0]
    return _mean(key, [part.weight for part in having], tensors, partial(base, key) if base is not None else None)


def _tokens(parts: Sequence[Weighted], name: str, base: Base | None) -> Tokens:
    """The rows of the trained tokens of an embedding: of all tokens that one of the adapters trains."""
    having = [(part.weight, *part.adapter.tokens[name]) for part in parts if name in part.adapter.tokens]
    ids = tuple(dict.fromkeys(token for _, tokens, _ in having for token in tokens))
    embedding = cache(partial(base, f"{name}.weight")) if base is not None else None  # (V, d), read once if needed
    rows = []
    for token in ids:
        found = [(weight, trained[tokens.index(token)]) for weight, tokens, trained in having if token in tokens]
        row = partial(_row, embedding, token) if embedding is not None else None
        weights, vectors = [weight for weight, _ in found], [vector for _, vector in found]
        rows.append(_mean(f"the token {token:,} of {name}", weights, vectors, row).float())
    return ids, torch.stack(rows)  # (n, d)


def _row(embedding: Callable[[], Tensor], token: int) -> Tensor:
    """The row of a token. AdapterError if the embedding has none."""
    weight = embedding()
    if token >= len(weight):
        raise AdapterError(f"The base has {len(weight):,} tokens, no token {token:,}.", hint="Check --model.")
    return weight[token]


def _mean(what: str, weights: Sequence[float], tensors: Sequence[Tensor], base: Callable[[], Tensor] | None) -> Tensor:
    """base + sum of w (tensor - base), in float32. AdapterError if it needs the base and there is none."""
    if len(weights) == 1 and weights[0] == 1:
        return tensors[0]
    rest = 1 - math.fsum(weights)  # the weight of the base
    total = sum((weight * tensor.double() for weight, tensor in zip(weights, tensors, strict=True)), torch.zeros(()))
    if not math.isclose(rest, 0, abs_tol=1e-9):
        if base is None:
            raise AdapterError(
                f"The weights of the adapters that train {what} in full sum to {1 - rest:g}, not to 1: the sum needs "
                "the base.",
                hint=NEEDS_BASE,
            )
        original = base()
        if original.shape != total.shape:
            raise AdapterError(
                f"{what} is {tuple(total.shape)} in the adapters and {tuple(original.shape)} in the base.",
                hint="Give weights whose sum is 1.",
            )
        total = total + rest * original.double()
    return total.float()


def _with_biases(parts: Sequence[Weighted], adapter: Adapter, base: Base | None) -> dict[str, Tensor]:
    """The tensors trained in full and, if linears with LoRA have trained biases, the base's bias of the others.

    In PEFT's format the biases of all linears with LoRA are trained, or none (bias="lora_only"). A linear has no bias
    if an adapter that trains biases has LoRA on it and no bias for it. AdapterError if that is not known.
    """
    full = dict(adapter.full)
    training = [one for one in (part.adapter for part in parts) if any(f"{name}.bias" in one.full for name in one.lora)]
    if not training:
        return full
    decided = {name for one in training for name in one.lora} | adapter.embeddings
    for name in adapter.lora.keys() - decided:
        if base is None:
            raise AdapterError(
                f"Some of the adapters train the biases of their linears, and those of {name} are not in them: the sum "
                "needs the base.",
                hint="Give the base with --model.",
            )
        try:
            full[f"{name}.bias"] = base(f"{name}.bias")
        except AdapterError:  # a linear without a bias
            continue
    return full


def _spec(parts: Sequence[Weighted], lora: Mapping[str, Change]) -> LoraSpec:
    """The rank and alpha that most modules have; PEFT's patterns have the others."""
    dropouts = {part.adapter.spec.dropout for part in parts}
    counts = Counter((len(a), scaling * len(a)) for a, _, scaling in lora.values())
    rank, alpha = counts.most_common(1)[0][0] if counts else (parts[0].adapter.spec.rank, parts[0].adapter.spec.alpha)
    return LoraSpec(rank, alpha, dropouts.pop() if len(dropouts) == 1 else 0.0)


def _finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _keys(tables: Iterable[Mapping[str, object]]) -> list[str]:
    """The keys of several mappings, each once, in the order of the layers."""
    return by_layer({key for table in tables for key in table})
