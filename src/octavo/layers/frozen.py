"""Layers with frozen weights, stored under a scheme and dequantized for each use. Their LoRA and biases can be trained.

A `FrozenMatrix` may contain several matrices with the same input, stacked on their rows (q, k and v of a block): one
matmul computes them all, and every name has its rows, its bias, its LoRA and its entry in a checkpoint. `FrozenLinear`
multiplies by a matrix, `FrozenEmbedding` gathers its rows; a tied head is a `FrozenLinear` on the embedding's matrix.

Legend: K inputs, N rows in all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.layers.context import ForwardContext
from octavo.layers.dropout import Dropout
from octavo.layers.fused_linear import FusedLinear, fused_linear
from octavo.layers.multi_lora import AdapterBank
from octavo.ops import inference, matmul8
from octavo.ops.linear import LoraSlice, frozen_linear
from octavo.ops.linear_spec import LinearSpec, Matmul8
from octavo.ops.quantize import INT8_LEVELS, Parts, Plain, Scheme, Shape, stored_bytes
from octavo.ops.tiles import Phase
from octavo.runtime.offload import on_device, on_host


class FrozenMatrix(nn.Module):
    """Stacked (rows, K) matrices under one scheme. Empty until `allocate`; filled by `put`, name by name."""

    def __init__(self, in_features: int, outputs: Mapping[str, int]) -> None:
        super().__init__()
        self.in_features = in_features
        self.outputs = dict(outputs)
        self.starts = _starts(self.outputs)
        self.scheme: Scheme = Plain()
        self.dtype = torch.float32
        self.parts: Parts = {}
        self.on_host = False  # whether the weight is in pinned CPU memory, which the GPU reads over the bus

    @property
    def shape(self) -> Shape:
        return sum(self.outputs.values()), self.in_features

    @property
    def device(self) -> torch.device:
        return self.parts["weight"].device

    @property
    def stored_bytes(self) -> int:
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        return sum(stored_bytes(self.scheme, shape, dtype=self.dtype) for shape in shapes)

    @property
    def weight_bytes(self) -> int:
        """The bytes of the weight alone, without scales and code tables."""
        return self.parts["weight"].nbytes

    def allocate(self, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the parts of `scheme`; `dtype` is the compute type of matmuls."""
        self.scheme, self.dtype = scheme, dtype
        sizes: dict[str, list[int]] = {}
        for rows in self.outputs.values():
            for part, (shape, _) in scheme.layout((rows, self.in_features), dtype).items():
                sizes.setdefault(part, []).append(shape[0])
        layout = scheme.layout(self.shape, dtype)
        self._offsets = {part: dict(zip(self.outputs, _sums(counts), strict=True)) for part, counts in sizes.items()}
        for part, (shape, kind) in layout.items():
            total = (sum(sizes[part]), *shape[1:]) if part != "code" else shape
            self.parts[part] = torch.empty(total, dtype=kind, device=device)

    def put(self, name: str, parts: Parts) -> None:
        """Copies the parts of one name into the matrix. All names of a matrix share a code table."""
        for part, target in self.of(name).items():
            assert target.shape == parts[part].shape, (name, part, target.shape, parts[part].shape)
            target.copy_(parts[part])

    def of(self, name: str) -> Parts:
        """The parts of one name: views, nothing is copied."""
        layout = self.scheme.layout((self.outputs[name], self.in_features), self.dtype)
        return {
            part: self.parts[part] if part == "code" else self._view(part, name, shape[0])
            for part, (shape, _) in layout.items()
        }

    def _view(self, part: str, name: str, length: int) -> Tensor:
        return self.parts[part].narrow(0, self._offsets[part][name], length)

    def unpack(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(matrix (N, K) in `dtype`, row scale (N,) or None), the operands of `frozen_linear`."""
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.joins(shape) for shape in shapes):
            return self.scheme.unpack(self.parts, self.shape, dtype)
        pieces = [
            self.scheme.unpack(self.of(name), shape, dtype) for name, shape in zip(self.outputs, shapes, strict=True)
        ]
        assert all(scale is None for _, scale in pieces)  # schemes with a row scale always join
        return torch.cat([matrix for matrix, _ in pieces]), None

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(weight (N, K), absmax (N,)): the int8 weight as it is stored, or a matrix in `dtype` and None."""
        if self.scheme.straight:
            return self.parts["weight"], self.parts["absmax"]
        matrix, scale = self.unpack(dtype)
        assert scale is None  # only int8 has a scale for each row
        return matrix, None

    def fill(self, out: Tensor) -> None:
        """Writes the matrix into `out` (N, K), which may be columns of a wider one."""
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.joins(shape) for shape in shapes):
            self.scheme.fill(self.parts, out)
            return
        for name, rows in self.outputs.items():
            self.scheme.fill(self.of(name), out[self.starts[name] : self.starts[name] + rows])

    def codes(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(int8 codes (N, K), absmax (N,)), to multiply in 8 bits: as they are stored, or written anew."""
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.joins(shape) for shape in shapes):
            found = self.scheme.codes(self.parts, self.shape)
            if found is not None:
                return found
        matrix = like.new_empty(self.shape)
        self.fill(matrix)
        made = matmul8.quantize_rows(matrix, torch.int8)
        return made.codes, made.scale * INT8_LEVELS

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape) in the compute type, (*ids.shape, K); only these rows are dequantized."""
        return self.scheme.rows(self.parts, self.shape, ids, self.dtype)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # Parts are not buffers: .to(dtype) must not convert quantized values and scales, .to(device) must move them.
        for part, tensor in self.parts.items():
            moved = fn(tensor)
            self.parts[part] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def set_host_resident_(self, wanted: bool) -> None:
        """Moves the weight to pinned CPU memory, or back to device memory. No effect on a CPU."""
        if wanted != self.on_host:
            # The scales stay on the GPU: they are small, and a code table is read for every value.
            self.parts["weight"] = (on_host if wanted else on_device)(self.parts["weight"])
            self.on_host = wanted

    def extra_repr(self) -> str:
        return f"{self.outputs}, in_features={self.in_features}, scheme={self.scheme.name}"


class LoraPair(nn.Module):
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
    """y = x W^T + b + LoRA, with W frozen. `bias` names the outputs that have one; their rows are contiguous."""

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
            assert end - self.bias_start == sum(sizes), "the rows of outputs with a bias must be contiguous (one run)"
            self.bias = nn.Parameter(torch.empty(sum(sizes)), requires_grad=False)
        self.lora = nn.ModuleDict()
        self.dropout = 0.0
        self.name = ""  # its path in the blocks of a decoder ("3.qkv"), the key of its 8-bit matmul
        self.bank: AdapterBank | None = None  # of served adapters

    def bias_of(self, name: str) -> Tensor:
        """The bias of one name, a view (rows,)."""
        assert self.bias is not None
        return self.bias.detach().narrow(0, self.matrix.starts[name] - self.bias_start, self.matrix.outputs[name])

    def low_rank(self) -> tuple[LoraSlice, ...]:
        """The LoRA of every name, with the rows of the name."""
        slices = []
        for name, lora in self.lora.items():
            assert isinstance(lora, LoraPair)
            start = self.matrix.starts[name]
            slices.append(LoraSlice(start, start + self.matrix.outputs[name], lora.a, lora.b, lora.scaling))
        return tuple(slices)

    def spec(self, matmul8: Matmul8 | None = None) -> LinearSpec:
        """This layer as a matmul reads it: in 8 bits if `matmul8` is given, with LoRA dropout in training."""
        rows, columns = self.matrix.shape
        dropout = self.dropout if self.training else 0.0
        return LinearSpec(
            rows, columns, self.matrix.fill, self.bias, self.bias_start, self.low_rank(), dropout, self.matrix.codes,
            matmul8,
        )  # fmt: skip

    def forward(self, x: Tensor, ctx: ForwardContext | None = None, residual: Tensor | None = None) -> Tensor:
        """(B, T, K) -> (B, T, N), plus `residual` if given: over a cache by `infer`, else under autograd.

        Names of one matrix share the dropout mask of their input.
        """
        if ctx is None:
            return fused_linear(x, FusedLinear((self.spec(),)), Dropout(), residual)
        if ctx.cache is not None:
            return self.infer(x, phase=ctx.phase, adapter_ids=ctx.adapter_ids, residual=residual)
        return fused_linear(x, FusedLinear((self.spec(ctx.matmul8.get(self.name)),)), ctx.dropout, residual)

    def reference(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The reference of `forward`: one matmul after the other (ops/linear.py)."""
        lora = self.low_rank()
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

        `adapter_ids` (B,) says which served adapter each sequence takes, 0 none. No gradient flows. A row's bits depend
        neither on B nor on T (ops/tiles.py).
        """
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        lora = None
        if self.bank is not None and adapter_ids is not None:
            row_ids = adapter_ids.repeat_interleave(x.shape[1]) if x.shape[1] > 1 else adapter_ids  # (M,)
            lora = self.bank.lora(rows, row_ids, phase)
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
        )
        for part in self.low_rank():
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
    """Rows of a frozen embedding plus LoRA: row i + scaling * B A[:, i]. A is (r, V), B is (K, r)."""

    def __init__(self, matrix: FrozenMatrix) -> None:
        super().__init__()
        assert len(matrix.outputs) == 1
        self.matrix = matrix
        self.lora = nn.ModuleDict()
        self.dropout = 0.0  # embeddings have none, as in PEFT
        self.bank: AdapterBank | None = None

    def forward(self, ids: Tensor, adapter_ids: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, K) in the compute type; `adapter_ids` (B,) as for `FrozenLinear.infer`."""
        x = self.matrix.rows(ids)
        for lora in self.lora.values():
            assert isinstance(lora, LoraPair)
            x = x + self._lora_term(ids, lora, x.dtype)
        if self.bank is not None and adapter_ids is not None:
            self.bank.add_rows_(x, ids, adapter_ids)
        return x

    def _lora_term(self, ids: Tensor, lora: LoraPair, dtype: torch.dtype) -> Tensor:
        t = F.embedding(ids, lora.a.T).to(dtype)  # (B, T, r)
        return (t @ lora.b.T.to(dtype)) * lora.scaling


def _sums(counts: list[int]) -> list[int]:
    """The exclusive cumulative sum: the first row of every name."""
    return [sum(counts[:i]) for i in range(len(counts))]


def _starts(outputs: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(outputs, _sums(list(outputs.values())), strict=True))
