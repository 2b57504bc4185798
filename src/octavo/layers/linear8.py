"""The matmuls of a `FusedLinear` in 8 bits, and their error against the exact ones.

    forward     y = sum over parts of q(x_i) q(W_i)^T + LoRA + bias      q quantizes rows; W_i is stored as int8
    backward    dx_i = q(dy absmax_i / 127) q(W_i) + dt_i A_i

The parts of the input are multiplied one after the other, each with the scales of its own rows, and added up in the
output. LoRA, the bias and the residual are added in float32 before a result is rounded (ops/matmul8.py).

Legend: M rows of input; part i is a frozen linear with weight (N, K_i); C extra columns (layers/fused_linear.py), or
outlier channels; r the sum of the LoRA ranks of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from octavo.layers.dropout import Seed, mask
from octavo.ops import matmul8
from octavo.ops.linear_spec import OUTLIERS, LinearSpec, Matmul8, Outliers, split_outliers
from octavo.ops.lora_factors import stack_a
from octavo.ops.matmul8 import LowRankTerm
from octavo.ops.scheme import INT8_LEVELS


def matmul_8bit(
    parts: Sequence[LinearSpec], inputs: Sequence[Tensor], lora: LowRankTerm | None, residual: Tensor | None = None
) -> Tensor:
    """(M, N) of the `inputs` (M, K_i), plus the low-rank term of all parts, plus `residual` (M, N)."""
    out = inputs[0].new_empty(len(inputs[0]), parts[0].rows)  # (M, N)
    for part, x in zip(parts, inputs, strict=True):
        assert part.int8_weight is not None
        assert part.matmul8 is not None
        weight, absmax = part.int8_weight(x)  # (N, K_i), (N,)
        outliers, prescale = part.matmul8.outliers, None
        if outliers is not None:
            lora, prescale = _with_outliers(lora, x, weight, absmax, outliers), outliers.prescale
        quantized = matmul8.quantize_rows(x, torch.int8, prescale=prescale)  # (M, K_i)
        matmul8.matmul_8bit_into(*quantized, weight, out, absmax, part.bias, part.bias_start, lora, residual)
        # The first matmul adds LoRA and the residual; each later one adds to what is in `out`.
        residual, lora = out, None
    return out


def grad_input_8bit(dy: Tensor, part: LinearSpec, dt: Tensor, seed: Seed | None) -> Tensor:
    """The gradient to one part of the input (M, K_i), from dy (M, N) and its columns of dt (M, r)."""
    assert part.int8_weight is not None
    assert part.matmul8 is not None
    dx = dy.new_empty(len(dy), part.columns)  # (M, K_i)
    kind = matmul8.gradient_type(dy.device)
    transposed, absmax = part.matmul8.transposed or transposed_weight(part.int8_weight, dy)  # (K_i, N), (N,)
    in_matmul = part.rank and not part.dropout  # the kernel multiplies by no dropout mask
    lora = LowRankTerm(dt, stack_a(part.lora, dy, transposed=True)) if in_matmul else None
    # absmax is on the axis of the sum, so it is multiplied into dy before dy is quantized.
    quantized = matmul8.quantize_rows(dy, kind, prescale=absmax, groups=kind == torch.int8)  # (M, N)
    matmul8.matmul_8bit_into(*quantized, transposed, dx, low_rank=lora)
    if part.rank and part.dropout:
        add_lora_gradient_(dx, dt, part, seed)
    return dx


def transposed_weight(int8_weight: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> tuple[Tensor, Tensor]:
    """(weight (K, N) as backward multiplies with it, absmax (N,)), written anew."""
    weight, absmax = int8_weight(like)  # (N, K), (N,)
    transposed = weight.new_empty(weight.shape[::-1], dtype=matmul8.gradient_type(like.device))  # (K, N)
    matmul8.transpose_into(weight, transposed)
    return transposed, absmax


def add_lora_gradient_(dx: Tensor, dt: Tensor, part: LinearSpec, seed: Seed | None) -> None:
    """dx (M, K_i) += dt (M, r) A, through the dropout mask."""
    if part.dropout:
        dx += mask(dx, part.dropout, seed).mul_(dt @ stack_a(part.lora, dx))
    else:
        dx.addmm_(dt, stack_a(part.lora, dx))


def probe_forward(
    parts: Sequence[LinearSpec], inputs: Sequence[Tensor], lora: LowRankTerm | None, exact: Tensor
) -> None:
    """Writes the errors of the 8-bit output against `exact` (M, N) into the parts' probes: of the plain 8-bit matmul,
    and of the one that keeps the channels with the largest inputs exact."""
    with_outliers = []
    for part, x in zip(parts, inputs, strict=True):
        assert part.matmul8 is not None
        assert part.matmul8.probe is not None
        channels = x.abs().amax(dim=0).topk(min(OUTLIERS, part.columns)).indices.sort().values  # (C,)
        part.matmul8.probe.channels = channels
        with_outliers.append(part._replace(matmul8=Matmul8(split_outliers(channels, part.columns))))
    _write_error(parts, "forward", matmul_8bit(parts, inputs, lora), exact)
    _write_error(parts, "outliers", matmul_8bit(with_outliers, inputs, lora), exact)


def probe_backward(parts: Sequence[LinearSpec], dx8: Sequence[Tensor], exact: Tensor) -> None:
    """Writes the error of the 8-bit gradients (M, K_i) against `exact` (M, K) into the parts' probes."""
    _write_error(parts, "backward", torch.cat(list(dx8), dim=1), exact)


def _write_error(parts: Sequence[LinearSpec], name: str, result: Tensor, exact: Tensor) -> None:
    """One relative error, in the probe of every part: the parts are 8-bit together or not at all."""
    exact, tiny = exact.float(), torch.finfo(torch.float32).tiny
    signal = exact if name == "backward" else exact - exact.mean(dim=0)  # see QuantErrorProbe
    error = torch.linalg.vector_norm(result.float() - exact) / torch.linalg.vector_norm(signal).clamp_min(tiny)
    for part in parts:
        assert part.matmul8 is not None
        setattr(part.matmul8.probe, name, error)


def _with_outliers(
    lora: LowRankTerm | None, x: Tensor, weight: Tensor, absmax: Tensor, outliers: Outliers
) -> LowRankTerm:
    """The outlier channels as C further columns of the low-rank term; x (M, K_i), weight (N, K_i) int8."""
    t = x.index_select(1, outliers.channels)  # (M, C)
    b = (weight.index_select(1, outliers.channels) * (absmax / INT8_LEVELS)[:, None]).to(x.dtype)  # (N, C)
    if lora is None:
        return LowRankTerm(t, b)
    return LowRankTerm(torch.cat([lora.t, t], dim=1), torch.cat([lora.b, b], dim=1))
