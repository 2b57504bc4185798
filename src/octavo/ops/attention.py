"""Rotary position embeddings (RoPE, arXiv 2104.09864), and causal attention over packed documents.

Legend: B rows of a batch, T positions, H query heads, G key/value heads (G divides H), D the size of a head, R the
rotated elements of a head, M = B T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.hardware.capabilities import Capabilities, capabilities_of
from octavo.ops import tiles
from octavo.ops.tiles import Phase
from octavo.runtime.dispatch import backends, kernel, observe
from octavo.runtime.transfer import to_device

ROTATE_INTERLEAVED, ROTATE_HALF = "interleaved", "half"  # pairs (2i, 2i+1) of GPT-J, pairs (i, i + D/2) of Llama

Table = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, frequencies: Tensor) -> Table:
    """(cos, sin), each (B, T, 1, R/2) float32, of positions (B, T) times R/2 frequencies."""
    angles = positions.float()[..., None] * frequencies.float()  # (B, T, R/2)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]


def cached_rotary_table(positions: Tensor, frequencies: Tensor, *, phase: Phase) -> Table:
    """`rotary_table` of new positions over a cache; on a CPU in tiles, for batch invariance (ops/tiles.py)."""
    if capabilities_of(positions.device).is_gpu:
        return rotary_table(positions, frequencies)
    dim = 1 if phase is Phase.PREFILL else 0
    parts = positions.split(tiles.PREFILL_TILE if dim else 1, dim=dim)
    tables = [rotary_table(part, frequencies) for part in parts]
    cos, sin = (torch.cat(each, dim=dim) for each in zip(*tables, strict=True))
    return cos, sin


def rotate_interleaved(x: Tensor, table: Table) -> Tensor:
    """Rotates the first R elements of each head in pairs (2i, 2i+1), GPT-J's form. x is (B, T, H, D)."""
    cos, sin = table
    rotary, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)  # (B, T, H, R), (.., D - R)
    even, odd = rotary.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, R/2) each
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate_half(x: Tensor, table: Table) -> Tensor:
    """Rotates the first R elements of each head in pairs (i, i + R/2), Llama's form. x is (B, T, H, D)."""
    cos, sin = table
    r = cos.shape[-1]
    low, high, rest = x.split([r, r, x.shape[-1] - 2 * r], dim=-1)  # (B, T, H, R/2) twice, (.., D - R)
    rotated = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)
    return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated


def rotate(x: Tensor, table: Table, form: str) -> Tensor:
    """x (B, T, H, D) rotated in the form ROTATE_INTERLEAVED or ROTATE_HALF."""
    return rotate_interleaved(x, table) if form == ROTATE_INTERLEAVED else rotate_half(x, table)


@kernel
def rotate_into(
    x: Tensor, cos: Tensor, sin: Tensor, head_size: int, form: str, out: Tensor, *, back: bool = False
) -> None:
    """out = all heads of x (M, heads * D) rotated; out may be x. The table is of (B, T) positions, or of (1, T) for all
    rows. `back` rotates by the negative angle: the transpose of the rotation, for gradients."""
    heads, target = (
        matrix.unflatten(1, (-1, head_size)).unflatten(0, (-1, cos.shape[0] * cos.shape[1])) for matrix in (x, out)
    )  # (n, rows, heads, D)
    table = cos.flatten(0, 1)[None], (-sin if back else sin).flatten(0, 1)[None]
    target.copy_(rotate(heads, table, form))


@dataclass(frozen=True)
class Documents:
    """The boundaries of the n documents in packed rows. `number` is the document of each position, -1 on padding."""

    number: Tensor  # (B, T)
    offsets: Tensor  # (n + 1,) int32: the start of each document in the B T positions of all rows
    longest: int

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T), true where a query sees a key: its own position and those before it in its document."""
        return (self.number[:, None, :, None] == self.number[:, None, None, :]).tril()


def find_documents(document: Tensor | None, device: torch.device) -> Documents | None:
    """The documents of rows (B, T) numbered by `document`, for attention on `device`.

    None if each row is one document, followed only by padding: plain causal attention is the same then. With `document`
    on the CPU, nothing waits for the GPU.
    """
    if document is None:
        return None
    change = document[:, 1:] != document[:, :-1]  # (B, T - 1)
    if not bool((change & (document[:, 1:] >= 0)).any()):
        return None
    starts = F.pad(change, (1, 0), value=True).flatten().nonzero()[:, 0]
    offsets = F.pad(starts, (0, 1), value=document.numel()).int()
    longest = int(offsets.diff().max())
    return Documents(to_device(document, device), to_device(offsets, device), longest)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, documents: Documents | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, T, H, D), with a causal mask.

    q is (B, T, H, D), k and v are (B, T, G, D). With `documents` a position sees only its own document; without them
    the whole row is one document. Over a cache: ops/cached_attention.py.
    """
    if q.is_meta:
        simulated: Tensor = _Simulated.apply(q, k, v)  # type: ignore[no-untyped-call]
        return simulated
    call = capabilities_of(q.device), q.dtype, backends().attention
    if documents is not None and supports_varlen(*call):
        return _varlen(q, k, v, documents)
    mask = documents.mask if documents is not None else None
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, G, T, D) twice
    shared = groups > 1 and mask is None and supports_shared_keys(*call)
    if groups > 1 and not shared:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    causal = mask is None and q.shape[2] > 1
    with _sdpa_backends(q):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2)


# cuDNN is the fastest on Hopper, head size 256 included. It does not support one query over a cache, nor that head size
# on older GPUs: a call goes to the first implementation that supports it.
_ORDER = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def _sdpa_backends(q: Tensor) -> Any:
    if not capabilities_of(q.device).is_gpu:
        return nullcontext()
    wanted = backends().attention
    if wanted != "auto":
        return sdpa_kernel([_ORDER[wanted], SDPBackend.MATH] if q.shape[2] == 1 else _ORDER[wanted])
    return sdpa_kernel(list(_ORDER.values()), set_priority=True)


def supports_shared_keys(capabilities: Capabilities, dtype: torch.dtype, wanted: str) -> bool:
    """Whether the implementations for a call accept fewer key heads than query heads; else key heads are repeated."""
    return capabilities.flash_attention and dtype != torch.float32 and wanted in ("auto", "cudnn", "flash")


def supports_varlen(capabilities: Capabilities, dtype: torch.dtype, wanted: str) -> bool:
    """Whether FlashAttention runs on packed documents; else attention has a mask."""
    supported = capabilities.flash_attention and dtype != torch.float32 and wanted in ("auto", "flash")
    return supported and _varlen_function() is not None


@cache
def _varlen_function() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., Tensor], varlen_attn)


def _varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    function = _varlen_function()
    assert function is not None
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    span = documents.offsets, documents.offsets, documents.longest, documents.longest
    out = function(*flat, *span, **_varlen_options(q.shape[2] != k.shape[2]))
    return out.view(q.shape)


@cache
def _varlen_options(grouped: bool) -> dict[str, Any]:
    """The arguments for a causal mask and for shared key heads: their names changed after PyTorch 2.11."""
    import inspect

    known = inspect.signature(_varlen_function() or _varlen).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


class _Simulated(torch.autograd.Function):
    """Attention on the meta device with the memory of cuDNN's: forward saves the log-sums; backward makes dq in float32
    first and, if key heads are shared, dk and dv for every query head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        observe("attention", [q, k, v, q])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        observe("attention_backward", [q, k, v, q, q, k, v, q])
        wide = [q.new_empty(q.shape, dtype=torch.float32)]
        if k.shape[2] != q.shape[2]:
            wide += [q.new_empty(q.shape) for _ in range(2)]
        return tuple(x.new_empty(x.shape) for x in (q, k, v))
