"""Norms and activations, each in one pass over memory. Reference: ops/pointwise.py.

Legend: one program for a row of a norm, or for the d columns of one head in it, and for WIDTH columns of a row of an
activation; `*_stride` is the stride of a row in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.hardware.capabilities import capabilities_of

WIDTH = 2048  # columns of an activation in one program
# The function f of an activation, in kernels the constant FUNCTION: "silu", "gelu" (its tanh form) or "gelu_erf".
GELU_FORMS = {"tanh": "gelu", "none": "gelu_erf"}


def norm_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, *, zero_centred_weight: bool = False
) -> None:
    _launch_norm(x, weight, bias, eps, None, out, 1.0, zero_centred_weight)


def add_norm_into(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor, out: Tensor, *,
    scale: float = 1.0, zero_centred_weight: bool = False,
) -> None:  # fmt: skip
    _launch_norm(x, weight, bias, eps, residual, out, scale, zero_centred_weight)


def _launch_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, out: Tensor, scale: float,
    zero_centred_weight: bool,
) -> None:  # fmt: skip
    m, d = len(x), weight.numel()
    added = x if residual is None else residual  # without one not read by the kernel, which needs an argument
    _norm[(m, x.shape[1] // d)](
        x, weight, bias if bias is not None else weight, added, out, d, x.stride(0), added.stride(0), out.stride(0),
        eps, scale, bias is not None, zero_centred_weight, residual is not None, triton.next_power_of_2(d),
        num_warps=_warps(d),
    )  # fmt: skip


@triton.jit
def _norm(
    x, weight, bias, residual, out, d, x_stride, residual_stride, out_stride, eps, scale,
    CENTRED: tl.constexpr, ZERO_CENTRED_WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * d
    column = tl.arange(0, WIDTH)
    inside = column < d
    value = tl.load(x + row * x_stride + start + column, mask=inside, other=0).to(tl.float32)
    if CENTRED:  # LayerNorm; RMSNorm has neither mean nor bias
        value = tl.where(inside, value - tl.sum(value) / d, 0)
    value *= tl.rsqrt(tl.sum(value * value) / d + eps)
    value *= _factors(weight, column, inside, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    if CENTRED:
        value += tl.load(bias + column, mask=inside, other=0).to(x.dtype.element_ty).to(tl.float32)
    if RESIDUAL:  # the norm is rounded before the sum, as autograd adds two tensors of this dtype
        value = value.to(x.dtype.element_ty).to(tl.float32) * scale
        value += tl.load(residual + row * residual_stride + start + column, mask=inside, other=0).to(tl.float32)
    # Out may be x: the sums need the elements of all threads, so all of x is loaded before the first store.
    tl.store(out + row * out_stride + start + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _factors(weight, column, inside, kind: tl.constexpr, ZERO_CENTRED_WEIGHT: tl.constexpr):
    """The factors of a norm: 1 + weight, or the float32 weight rounded to the dtype of x, as in the reference."""
    value = tl.load(weight + column, mask=inside, other=0)
    return 1 + value.to(tl.float32) if ZERO_CENTRED_WEIGHT else value.to(kind).to(tl.float32)


def norm_backward_into(
    x: Tensor, weight: Tensor, eps: float, dy: Tensor, residual: Tensor | None, out: Tensor, *,
    centred: bool, zero_centred_weight: bool = False, scale: float = 1.0,
) -> None:  # fmt: skip
    m, d = len(x), weight.numel()
    added = dy if residual is None else residual  # without one not read by the kernel, which needs an argument
    _norm_backward[(m, x.shape[1] // d)](
        x, weight, dy, added, out, d, x.stride(0), dy.stride(0), added.stride(0), out.stride(0), eps, scale,
        centred, zero_centred_weight, residual is not None, slow_float16(x), triton.next_power_of_2(d),
        num_warps=_warps(d),
    )  # fmt: skip


def slow_float16(x: Tensor) -> bool:
    """Whether the GPU may compute in float16 at a fraction of the rate of float32: a GTX 10 has 1/64 of it."""
    return not capabilities_of(x.device).triton_dots


@triton.jit
def as_float32(value, SLOW_FLOAT16: tl.constexpr):
    """`value` in float32. SLOW_FLOAT16: by an instruction that LLVM does not know.

    Else LLVM adds or compares in float16 what was float16 before and is rounded to float16 after: the bits are equal.
    """
    if SLOW_FLOAT16 and value.dtype == tl.float16:
        value = tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=r,h", [value], tl.float32, is_pure=True, pack=1)
    return value.to(tl.float32)


@triton.jit
def _norm_backward(
    x, weight, dy, residual, out, d, x_stride, dy_stride, residual_stride, out_stride, eps, scale,
    CENTRED: tl.constexpr, ZERO_CENTRED_WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, SLOW_FLOAT16: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * d
    column = tl.arange(0, WIDTH)
    inside = column < d
    value = tl.load(x + row * x_stride + start + column, mask=inside, other=0).to(tl.float32)
    if CENTRED:
        value = tl.where(inside, value - tl.sum(value) / d, 0)
    inverse = tl.rsqrt(tl.sum(value * value) / d + eps)
    value *= inverse
    g = tl.load(dy + row * dy_stride + start + column, mask=inside, other=0).to(tl.float32)
    g = (g * scale).to(dy.dtype.element_ty).to(tl.float32)  # rounded, as autograd multiplies a tensor of this dtype
    g *= _factors(weight, column, inside, x.dtype.element_ty, ZERO_CENTRED_WEIGHT)
    # With n = (x - mean) / std and g = dL/dn: dx = (g - n mean(g n) - mean(g)) / std; RMSNorm lacks the last mean.
    dx = g - value * (tl.sum(g * value) / d)
    if CENTRED:
        dx -= tl.sum(g) / d
    # Rounded before the residual's gradient is added, as autograd adds two tensors of this dtype.
    dx = (dx * inverse).to(out.dtype.element_ty).to(tl.float32)
    if RESIDUAL:
        more = tl.load(residual + row * residual_stride + start + column, mask=inside, other=0)
        dx += as_float32(more, SLOW_FLOAT16)
    # Out may be x, as in _norm.
    tl.store(out + row * out_stride + start + column, dx.to(out.dtype.element_ty), mask=inside)


def copy_into(x: Tensor, out: Tensor) -> None:
    m, n = out.shape
    _copy[(m, triton.cdiv(n, WIDTH))](x, out, n, x.stride(0), out.stride(0), WIDTH, num_warps=8)


@triton.jit
def _copy(x, out, n, x_stride, out_stride, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    value = tl.load(x + row * x_stride + column, mask=column < n, other=0)
    tl.store(out + row * out_stride + column, value, mask=column < n)


def gelu_into(x: Tensor, out: Tensor, *, approximate: str = "tanh") -> None:
    m, f = out.shape
    grid = m, triton.cdiv(f, WIDTH)
    _gelu[grid](x, out, f, x.stride(0), out.stride(0), GELU_FORMS[approximate], WIDTH, num_warps=8)


@triton.jit
def _gelu(x, out, f, x_stride, out_stride, FUNCTION: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < f
    value = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    value = value * _factor(value, FUNCTION)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-tl.maximum(x, -80.0)))  # sigmoid is 1e-35 there; exp overflows float32 beyond 88


@triton.jit
def _factor(x, FUNCTION: tl.constexpr):
    """s in f(x) = x s: the sigmoid of x for SiLU, the normal distribution's function for GELU."""
    if FUNCTION == "silu":
        return _sigmoid(x)
    if FUNCTION == "gelu":
        # gelu(x) = x (1 + tanh(z)) / 2 = x sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x^3)
        return _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    # As explicit fused multiply-adds here and in the slope: the compiler would contract them otherwise in each kernel.
    e = tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)
    return tl.fma(e, 0.5, 0.5)


@triton.jit
def _gelu_slope(x, s, FUNCTION: tl.constexpr):
    """gelu'(x), where s is its factor."""
    if FUNCTION == "gelu":
        return s + x * s * (1 - s) * 1.5957691216057308 * (1 + 3 * 0.044715 * x * x)
    return tl.fma(x * 0.3989422804014327, tl.exp(-0.5 * x * x), s)  # s' is the normal density


def gelu_backward_(x: Tensor, dy: Tensor, *, approximate: str = "tanh") -> None:
    m, f = dy.shape
    grid = m, triton.cdiv(f, WIDTH)
    _gelu_backward[grid](x, dy, f, x.stride(0), dy.stride(0), GELU_FORMS[approximate], WIDTH, num_warps=8)


@triton.jit
def _gelu_backward(x, dy, f, x_stride, dy_stride, FUNCTION: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < f
    x_at, dy_at = x + row * x_stride + column, dy + row * dy_stride + column
    value = tl.load(x_at, mask=inside, other=0).to(tl.float32)
    g = tl.load(dy_at, mask=inside, other=0).to(tl.float32)
    tl.debug_barrier()  # in place: the thread of a store may not be that of the load from the same address
    s = _factor(value, FUNCTION)
    tl.store(x_at, (g * _gelu_slope(value, s, FUNCTION)).to(x.dtype.element_ty), mask=inside)
    tl.store(dy_at, (value * s).to(dy.dtype.element_ty), mask=inside)


def swiglu_into(x: Tensor, out: Tensor) -> None:
    _gated_into(x, out, "silu")


def geglu_into(x: Tensor, out: Tensor) -> None:
    _gated_into(x, out, "gelu")


def _gated_into(x: Tensor, out: Tensor, function: str) -> None:
    m, f = out.shape
    _gated[(m, triton.cdiv(f, WIDTH))](x, out, f, x.stride(0), out.stride(0), function, WIDTH, num_warps=8)


@triton.jit
def _gated(x, out, f, x_stride, out_stride, FUNCTION: tl.constexpr, WIDTH: tl.constexpr):
    """f(gate) * up, where x is [gate | up]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < f
    gate = tl.load(x + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(x + row * x_stride + f + column, mask=inside, other=0).to(tl.float32)
    value = gate * _factor(gate, FUNCTION) * up
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), mask=inside)


def swiglu_backward_(x: Tensor, dy: Tensor) -> None:
    _gated_backward_(x, dy, "silu")


def geglu_backward_(x: Tensor, dy: Tensor) -> None:
    _gated_backward_(x, dy, "gelu")


def _gated_backward_(x: Tensor, dy: Tensor, function: str) -> None:
    m, f = dy.shape
    _gated_backward[(m, triton.cdiv(f, WIDTH))](x, dy, f, x.stride(0), dy.stride(0), function, WIDTH, num_warps=8)


@triton.jit
def _gated_backward(x, dy, f, x_stride, dy_stride, FUNCTION: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < f
    x_at, dy_at = x + row * x_stride + column, dy + row * dy_stride + column
    gate = tl.load(x_at, mask=inside, other=0).to(tl.float32)
    up = tl.load(x_at + f, mask=inside, other=0).to(tl.float32)
    g = tl.load(dy_at, mask=inside, other=0).to(tl.float32)
    tl.debug_barrier()  # in place, as in _gelu_backward
    s = _factor(gate, FUNCTION)  # y = gate s up
    kind = x.dtype.element_ty
    dgate = g * up * s * (1 + gate * (1 - s)) if FUNCTION == "silu" else g * up * _gelu_slope(gate, s, FUNCTION)
    tl.store(x_at, dgate.to(kind), mask=inside)
    tl.store(x_at + f, (g * gate * s).to(kind), mask=inside)
    tl.store(dy_at, (gate * s * up).to(dy.dtype.element_ty), mask=inside)


def _warps(d: int) -> int:
    return 1 if d <= 256 else 4 if d <= 1024 else 8 if d <= 8192 else 16
