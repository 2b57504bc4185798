"""Layers with frozen weights, stored under a scheme and dequantized for each use. Their LoRA and biases can be trained.

`FrozenLinear` multiplies by a `FrozenMatrix` (layers/frozen_matrix.py), `FrozenEmbedding` gathers its rows; a tied head
is a `FrozenLinear` on the embedding's matrix. A `FrozenMatrix` stacks the weights of several outputs, each with a name
(q_proj, k_proj, v_proj).

Legend: B sequences, T positions, M = B T rows of input; K inputs, N outputs (rows of the weight); r the rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.layers.context import ForwardContext
from octavo.layers.dropout import Dropout
from octavo.layers.frozen_matrix import FrozenMatrix
from octavo.layers.fused_linear import FusedLinear, fused_linear
from octavo.layers.multi_lora import AdapterBank
from octavo.ops import inference
from octavo.ops.linear import LoraSlice, frozen_linear
from octavo.ops.linear_spec import LinearSpec, Matmul8
from octavo.ops.tiles import Phase


class Lora(nn.Module):
    """A and B of one name: adds scaling * (x A^T) B^T to that name's rows. A is (r, K), B is (rows, r)."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """scaling * (x A^T) B^T, (..., rows) in x's type."""
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scaling


class FrozenLinear(nn.Module):
    """y = x W^T + b + LoRA, with W frozen. `bias` names the outputs that have one; their rows are adjacent."""

    def __init__(self, matrix: FrozenMatrix, *, bias: Collection[str] = ()) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias_names = [name for name in matrix.outputs if name in bias]
        self.bias: nn.Parameter | None = None
        self.bias_start = 0
        if self.bias_names:
            sizes = [matrix.outputs[name] for name in self.bias_names]
            self.bias_start = matrix.starts[self.bias_names[0]]
            end = matrix.starts[self.bias_names[-1]] + sizes[-1]
            assert end - self.bias_start == sum(sizes), "the rows of the outputs with a bias must be adjacent"
            self.bias = nn.Parameter(torch.empty(sum(sizes)), requires_grad=False)
        self.lora = nn.ModuleDict()
        self.dropout = 0.0
        self.path = ""  # in the blocks of a decoder ("3.qkv"): the key of this layer in `Precision`
        self.bank: AdapterBank | None = None  # the A and B of all served adapters, stacked

    def replace_matrix_(self, matrix: FrozenMatrix) -> None:
        """Takes another matrix. With one output its name may change, and the bias follows: an untied head has the rows
        lm_head in place of the embedding's."""
        self.matrix = matrix
        if self.bias_names and len(matrix.outputs) == 1:
            self.bias_names = list(matrix.outputs)
        assert set(self.bias_names) <= matrix.outputs.keys()

    def bias_of(self, name: str) -> Tensor:
        """The bias of one name, a view (rows,)."""
        assert self.bias is not None
        return self.bias.detach().narrow(0, self.matrix.starts[name] - self.bias_start, self.matrix.outputs[name])

    def lora_slices(self) -> tuple[LoraSlice, ...]:
        """The LoRA of every name, with the rows of the name."""
        slices = []
        for name, lora in self.lora.items():
            assert isinstance(lora, Lora)
            start = self.matrix.starts[name]
            slices.append(LoraSlice(start, start + self.matrix.outputs[name], lora.a, lora.b, lora.scaling))
        return tuple(slices)

    def spec(self, matmul8: Matmul8 | None = None) -> LinearSpec:
        """This layer as a matmul reads it: in 8 bits if `matmul8` is given, with LoRA dropout in training."""
        rows, columns = self.matrix.shape
        dropout = self.dropout if self.training else 0.0
        return LinearSpec(
            rows, columns, fill=self.matrix.fill, bias=self.bias, bias_start=self.bias_start, lora=self.lora_slices(),
            dropout=dropout, int8_weight=self.matrix.int8_weight, matmul8=matmul8, fill_rows=self.matrix.fill_rows,
        )  # fmt: skip

    def forward(self, x: Tensor, ctx: ForwardContext | None = None, residual: Tensor | None = None) -> Tensor:
        """(B, T, K) -> (B, T, N), plus `residual` if given: with a cache in `ctx` by `infer`, else under autograd.

        The outputs of one matrix share the dropout mask of their input.
        """
        if ctx is None:  # the head, which is outside the blocks and exact
            return fused_linear(x, FusedLinear((self.spec(),)), Dropout(), residual)
        if ctx.cache is not None:
            return self.infer(x, phase=ctx.phase, adapter_ids=ctx.adapter_ids, residual=residual)
        return fused_linear(x, FusedLinear((self.spec(ctx.matmul8.get(self.path)),)), ctx.dropout, residual)

    def reference(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The reference of `forward`: one matmul after the other (ops/linear.py)."""
        lora = self.lora_slices()
        dropping = bool(lora) and self.training and self.dropout > 0
        y = frozen_linear(
            x,
            self.matrix.unpack,
            bias=self.bias,
            bias_start=self.bias_start,
            lora=lora,
            dropped=F.dropout(x, self.dropout) if dropping else None,
        )
        return y if residual is None else residual + y

    def infer(
        self, x: Tensor, *, phase: Phase, adapter_ids: Tensor | None = None, residual: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, K) -> (B, T, N) in `dtype`, by default that of x, plus `residual`.

        `phase` is prefill or decode, which have tiles of their own: a row's bits depend neither on B nor on T
        (ops/tiles.py). `adapter_ids` (B,) says which served adapter each sequence takes, 0 none. No gradient flows.
        """
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        lora = None
        if self.bank is not None and adapter_ids is not None:
            # All T positions of a sequence use its adapter.
            row_ids = adapter_ids.repeat_interleave(x.shape[1]) if x.shape[1] > 1 else adapter_ids  # (M,)
            lora = self.bank.lora(rows, row_ids, phase)
        # int8 (N, K) with absmax (N,), or under the other schemes a matrix (N, K) in the dtype of x, and None.
        weight, absmax = self.matrix.stored(x.dtype)
        y = inference.matmul(
            rows,
            weight,
            absmax,
            phase=phase,
            bias=self.bias,
            bias_start=self.bias_start,
            lora=lora,
            residual=None if residual is None else residual.reshape(len(rows), -1),
            dtype=dtype,
        )  # (M, N)
        for part in self.lora_slices():  # an adapter that is applied to the model, as `octavo generate` does
            t = inference.matmul(rows, part.a.to(x.dtype), phase=phase, dtype=torch.float32) * part.scaling  # (M, r)
            y[:, part.start : part.stop] += inference.matmul(
                t.to(x.dtype), part.b.to(x.dtype), phase=phase, dtype=dtype
            )
        return y.view(*x.shape[:-1], -1)

    @property
    def trained(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(parameter.requires_grad for parameter in self.parameters())


class FrozenEmbedding(nn.Module):
    """Rows of a frozen embedding (V, K) plus LoRA: row i + scaling * B A[:, i]. A is (r, V), B is (K, r).

    V is the number of tokens, K the width of the model: an embedding is a lookup of rows, not a matmul over V inputs.
    """

    def __init__(self, matrix: FrozenMatrix) -> None:
        super().__init__()
        assert len(matrix.outputs) == 1
        self.matrix = matrix
        self.lora = nn.ModuleDict()
        self.dropout = 0.0  # embeddings have none, as in PEFT
        self.bank: AdapterBank | None = None

    def forward(self, ids: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, K) in the compute dtype; `adapter_ids` (B,) as for `FrozenLinear.infer`."""
        x = self.matrix.rows(ids)  # (B, T, K)
        for lora in self.lora.values():
            assert isinstance(lora, Lora)
            x = x + self._lora_term(ids, lora, x.dtype)
        if self.bank is not None and adapter_ids is not None:
            self.bank.add_rows_(x, ids, adapter_ids)
        return x

    def _lora_term(self, ids: Tensor, lora: Lora, dtype: torch.dtype) -> Tensor:
        t = F.embedding(ids, lora.a.T).to(dtype)  # (B, T, r)
        return (t @ lora.b.T.to(dtype)) * lora.scaling
