"""LoRA on a frozen model, and all trained parameters in flat buffers.

`attach_` adds new LoRA matrices to a linear or embedding (LoRA, arXiv 2106.09685; rsLoRA, 2312.03732), `flatten_` moves
all trained parameters into one buffer for each weight-decay group, so that the optimizer is one kernel on one tensor,
`merged_rows` is a weight with its LoRA added.

Legend: r the rank, K inputs and N outputs of a linear, V and d the shape of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from octavo.errors import AdapterError
from octavo.layers.frozen import FrozenEmbedding, FrozenLinear, Lora

MAX_RANK = 2**16  # more than the inputs of any layer in use
MAX_ALPHA = 1e6  # bounds the scaling: B A x times it must not overflow float32


@dataclass(frozen=True)
class LoraSpec:
    """The settings of LoRA. Its term is alpha / r times B A x, or alpha / sqrt(r) times with `rslora`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"The LoRA rank is {self.rank}; it must be at least 1.")
        if self.rank > MAX_RANK:
            raise AdapterError(f"The LoRA rank is {self.rank:,}; it must be at most {MAX_RANK:,}.")
        if not abs(self.alpha) <= MAX_ALPHA:  # a NaN is refused too
            raise AdapterError(f"The LoRA alpha is {self.alpha}; it must be at most {MAX_ALPHA:,.0f}.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"The LoRA dropout is {self.dropout}; it must be at least 0 and under 1.")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def attach_(layer: FrozenLinear | FrozenEmbedding, key: str, spec: LoraSpec, *, generator: torch.Generator) -> None:
    """Adds new LoRA to the rows `key` of `layer`. The model's output does not change: A or B is zero.

    Linear: A (r, K) is drawn from U(-1/sqrt(K), 1/sqrt(K)), B (N, r) is zero. Embedding: A (r, V) is zero,
    B (d, r) standard normal. Both as PEFT does. float32, for any compute dtype.
    """
    matrix = layer.matrix
    rows, columns, device = matrix.outputs[key], matrix.in_features, matrix.device
    if isinstance(layer, FrozenEmbedding):
        a = torch.zeros(spec.rank, rows)  # (r, V)
        b = torch.randn(columns, spec.rank, generator=generator)  # (d, r)
    else:
        bound = 1 / math.sqrt(columns)
        a = torch.empty(spec.rank, columns).uniform_(-bound, bound, generator=generator)  # (r, K)
        b = torch.zeros(rows, spec.rank)  # (N, r)
    put_(layer, key, Lora(a.to(device), b.to(device), spec.scaling), dropout=spec.dropout)


def put_(layer: FrozenLinear | FrozenEmbedding, key: str, lora: Lora, *, dropout: float) -> None:
    """Puts given LoRA on the rows `key` of `layer`; `layer.lora` has the order of the rows."""
    loras = {**dict(layer.lora.items()), key: lora}
    layer.lora = nn.ModuleDict({name: loras[name] for name in layer.matrix.outputs if name in loras})
    layer.dropout = dropout


@dataclass(frozen=True)
class FlatGroup:
    """Trained parameters that share a weight decay: `values` (n,) float32 with `values.grad` of the same layout.

    `parameters` are views into `values`, and their gradients into its gradient, in the order of `names`.
    """

    values: nn.Parameter
    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    decays: bool


def flatten_(named: Mapping[str, nn.Parameter]) -> list[FlatGroup]:
    """Moves the trained parameters into flat buffers: one with weight decay, one for norms and biases without.

    Autograd accumulates into existing gradients, so they must be zeroed in place and never set to None.
    """
    groups = []
    for decays in (True, False):
        chosen = {name: p for name, p in named.items() if (p.ndim > 1) is decays}
        if not chosen:
            continue
        values = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in chosen.values()]))
        values.grad = torch.zeros_like(values)
        start = 0
        for p in chosen.values():  # each becomes a view, so the optimizer's update of `values` updates it
            stop = start + p.numel()
            p.data = values.detach()[start:stop].view(p.shape)
            p.grad = values.grad[start:stop].view(p.shape)
            start = stop
        groups.append(FlatGroup(values, tuple(chosen), tuple(chosen.values()), decays))
    return groups


def gradients_in_place(groups: Sequence[FlatGroup]) -> bool:
    """Whether every parameter's gradient still is the view that `flatten_` made."""
    return all(
        p.grad is not None and g.values.grad is not None
        and p.grad.untyped_storage().data_ptr() == g.values.grad.untyped_storage().data_ptr()
        for g in groups
        for p in g.parameters
    )  # fmt: skip


def merged_rows(layer: FrozenLinear | FrozenEmbedding, key: str, weight: Tensor) -> Tensor:
    """weight (N, K) of the rows `key` plus its LoRA, W + scaling B A, in float32."""
    if key not in layer.lora:
        return weight.float()
    lora = layer.lora[key]
    assert isinstance(lora, Lora)
    delta = lora.b.detach() @ lora.a.detach()  # (rows, K)
    return weight.float() + lora.scaling * (delta.T if isinstance(layer, FrozenEmbedding) else delta)


def lora_of(layers: Iterable[nn.Module]) -> list[Lora]:
    """The LoRA of the given layers."""
    return [
        lora
        for layer in layers
        if isinstance(layer, FrozenLinear | FrozenEmbedding)
        for lora in layer.lora.values()
        if isinstance(lora, Lora)
    ]
