"""A matrix of frozen weights, stored under a scheme and dequantized for each use.

It may contain several matrices with the same input, stacked on their rows (q, k and v of a block): one matmul computes
them all, and every name has its rows, its bias, its LoRA and its entry in a checkpoint.

Legend: K inputs, N rows in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from octavo.ops import matmul8
from octavo.ops.quantize import Plain
from octavo.ops.scheme import INT8_LEVELS, Parts, Scheme, Shape, parts_of_rows
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
        return sum(tensor.nbytes for tensor in self.parts.values())

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
        # Blocks of a scheme may span two rows, but not two names: a stack whose parts are not whole blocks is
        # dequantized name by name.
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.stacks(shape) for shape in shapes):
            return self.scheme.unpack(self.parts, self.shape, dtype)
        matrix = self.parts["weight"].new_empty(self.shape, dtype=dtype)  # schemes with a row scale always stack
        self.fill(matrix)
        return matrix, None

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """(weight (N, K), absmax (N,)): the int8 weight as it is stored, or a matrix in `dtype` and None."""
        if self.scheme.row_scaled:
            return self.parts["weight"], self.parts["absmax"]  # decode multiplies int8 values and scales the result
        matrix, scale = self.unpack(dtype)
        assert scale is None  # only int8 has a scale for each row
        return matrix, None

    def fill(self, out: Tensor) -> None:
        """Writes the matrix into `out` (N, K), which may be columns of a wider one."""
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.stacks(shape) for shape in shapes):
            self.scheme.fill(self.parts, out)
            return
        for name, rows in self.outputs.items():
            self.scheme.fill(self.of(name), out[self.starts[name] : self.starts[name] + rows])

    def fill_rows(self, first: int, out: Tensor) -> None:
        """Writes the rows from `first` on into `out` (n, K), of a matrix with one output: whole blocks of a scheme."""
        assert len(self.outputs) == 1
        rows = slice(first, first + len(out))
        self.scheme.fill(parts_of_rows(self.parts, self.shape, rows, self.scheme), out)

    def int8_weight(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(int8 weight (N, K), absmax (N,)), for 8-bit matmuls: as stored, or quantized anew from the matrix."""
        shapes = [(rows, self.in_features) for rows in self.outputs.values()]
        if len(shapes) == 1 or all(self.scheme.stacks(shape) for shape in shapes):
            stored = self.scheme.int8_weight(self.parts, self.shape)
            if stored is not None:
                return stored
        matrix = like.new_empty(self.shape)  # (N, K)
        self.fill(matrix)
        quantized = matmul8.quantize_rows(matrix, torch.int8)
        return quantized.values, quantized.scale * INT8_LEVELS

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


def _sums(counts: list[int]) -> list[int]:
    """The exclusive cumulative sum: the first row of every name."""
    return [sum(counts[:i]) for i in range(len(counts))]


def _starts(outputs: Mapping[str, int]) -> dict[str, int]:
    return dict(zip(outputs, _sums(list(outputs.values())), strict=True))
