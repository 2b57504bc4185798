"""Causal attention over packed documents, with sliding windows and soft-capped scores.

Legend: B rows of a batch, T positions, H query heads, G key/value heads (G divides H), D the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.hardware.capabilities import NVIDIA, Capabilities, capabilities_of
from octavo.ops.simulated_attention import efficient_attention, flash_attention
from octavo.ops.softcap import CappedSpec, Extents, softcapped_attention
from octavo.runtime.dispatch import backends, simulates_ampere
from octavo.runtime.transfer import to_device


class AttentionSpec(NamedTuple):
    """How the heads of a layer attend: softmax of the scores s over the positions that a query sees.

        s = scale q k^T               without a `softcap`
        s = c tanh(scale q k^T / c)   with a `softcap` c (Gemma 2, arXiv 2408.00118)

    A query sees its own position and those before it in its document: all of them, or with a `window` w the last w with
    its own (sliding-window attention, arXiv 2004.05150).
    """

    scale: float | None = None  # None: 1 / sqrt(D)
    softcap: float | None = None
    window: int | None = None

    def scale_of(self, head_size: int) -> float:
        """The factor of q k^T for heads of `head_size`."""
        return head_size**-0.5 if self.scale is None else self.scale

    def bounded(self, length: int) -> AttentionSpec:
        """This spec for sequences of `length`: a window that covers them all has no effect."""
        return self if self.window is None or self.window < length else self._replace(window=None)


PLAIN = AttentionSpec()


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

    @cached_property
    def lengths(self) -> Tensor:
        """(B, T): the length of the document of each position."""
        spans = self.offsets.diff().long()
        return spans.repeat_interleave(spans, output_size=self.number.numel()).view(self.number.shape)

    @cached_property
    def extents(self) -> Extents:
        """The first position of the document of each position in its row, and the position after its last one."""
        (rows, length), starts = self.number.shape, self.offsets[:-1]
        starts = starts.repeat_interleave(self.offsets.diff().long(), output_size=self.number.numel())
        row = torch.arange(rows, dtype=torch.int32, device=starts.device) * length
        start = starts.view(rows, length) - row[:, None]  # (B, T)
        return Extents(start, start + self.lengths.int())


def seen_mask(length: int, window: int | None, documents: Documents | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, T), true where a query sees a key of its row."""
    if documents is not None:
        seen = documents.mask
    else:
        seen = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


class AddedMasks:
    """The masks that are added to scores on a GPU: each is made once in a pass, for all layers with its window.

    PyTorch would make one of a mask of booleans in every layer, and save it for backward. Its kernels need rows that
    start at multiples of 16 values; others it would copy in every layer.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def get(self, q: Tensor, window: int | None, documents: Documents | None) -> Tensor:
        """(B or 1, 1, T, T) for q (B, T, H, D): 0 where a query sees a key, else -inf."""
        if (window, q.dtype) not in self._made:
            length = q.shape[1]
            seen = seen_mask(length, window, documents, q.device)
            rows = q.new_zeros(*seen.shape[:3], -(-length // 16) * 16)[..., :length]  # (B or 1, 1, T, T)
            self._made[window, q.dtype] = rows.masked_fill_(~seen, float("-inf"))
        return self._made[window, q.dtype]


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


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: AttentionSpec = PLAIN,
    *,
    documents: Documents | None = None,
    masks: AddedMasks | None = None,
) -> Tensor:
    """softmax(s) v, (B, T, H, D), with the scores s and the window of `spec`.

    q is (B, T, H, D), k and v are (B, T, G, D). With `documents` a position sees only its own document; without them
    the whole row is one document. `masks` are those of the pass. Over a cache: ops/cached_attention.py.
    """
    spec = spec.bounded(documents.longest if documents is not None else q.shape[1])
    if spec.softcap is not None:
        capped = CappedSpec(spec.scale_of(q.shape[3]), spec.softcap, spec.window)
        return softcapped_attention(q, k, v, capped, documents.extents if documents is not None else None)
    masked = spec.window is not None or documents is not None
    flash = simulates_ampere() if q.is_meta else capabilities_of(q.device).flash_attention
    call = flash, q.dtype, backends().attention
    if masked and supports_varlen(*call, windows=spec.window is not None, scaled=spec.scale is not None):
        if q.is_meta:
            return flash_attention(q, k, v, len(q) if documents is None else len(documents.offsets) - 1)
        return _varlen(q, k, v, spec, documents)
    if q.is_meta and flash and not masked:
        return flash_attention(q, k, v, 0)
    groups = q.shape[2] // k.shape[2]
    shared = groups > 1 and not masked and supports_shared_keys(*call)
    if groups > 1 and not shared:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    mask = None
    if masked and (q.is_meta or capabilities_of(q.device).is_gpu):
        mask = (masks or AddedMasks()).get(q, spec.window, documents)
    elif masked:
        mask = seen_mask(q.shape[1], spec.window, documents, q.device)
    if q.is_meta:
        return efficient_attention(q, k, v, mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, G, T, D) twice
    causal = mask is None and q.shape[2] > 1
    with _sdpa_backends(q):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared, scale=spec.scale
        )
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
    """For q (B, H, T, D)."""
    if not capabilities_of(q.device).is_gpu:
        return nullcontext()
    wanted = backends().attention
    if wanted != "auto":
        return sdpa_kernel([_ORDER[wanted], SDPBackend.MATH] if q.shape[2] == 1 else _ORDER[wanted])
    order = implementations(capabilities_of(q.device), q.shape[3])
    return sdpa_kernel([_ORDER[name] for name in order], set_priority=True)


def implementations(capabilities: Capabilities, head_size: int) -> list[str]:
    """PyTorch's implementations of attention that a GPU has kernels of, the fastest first.

    FlashAttention and cuDNN begin with compute capability 8.0, cuDNN's heads of 256 with 9.0. PyTorch would refuse the
    others by itself, except on a newer GPU that runs in place of this one (hardware/pretend.py).
    """
    if capabilities.vendor != NVIDIA:
        return list(_ORDER)
    names = {"cudnn": capabilities.cudnn_attention(head_size), "flash": capabilities.flash_attention}
    return [name for name in _ORDER if names.get(name, True)]


def supports_shared_keys(flash: bool, dtype: torch.dtype, wanted: str) -> bool:
    """Whether the implementations for a call accept fewer key heads than query heads; else key heads are repeated.

    `flash`: the GPU has FlashAttention (Capabilities).
    """
    return flash and dtype != torch.float32 and wanted in ("auto", "cudnn", "flash")


def supports_varlen(
    flash: bool, dtype: torch.dtype, wanted: str, *, windows: bool = False, scaled: bool = False
) -> bool:
    """Whether FlashAttention runs on packed documents, with sliding `windows`, and `scaled` by another number than
    1 / sqrt(D); else attention has a mask. PyTorch 2.8 has no such function, that of 2.10 neither of the two options.
    """
    if not (flash and dtype != torch.float32 and wanted in ("auto", "flash")):
        return False
    if _varlen_function() is None:
        return False
    options = {"window_size": windows, "scale": scaled}
    return all(name in _varlen_parameters() for name, needed in options.items() if needed)


@cache
def _varlen_function() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., Tensor], varlen_attn)


def _varlen(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, documents: Documents | None) -> Tensor:
    """FlashAttention over documents, or over the rows, which are one document each."""
    function = _varlen_function()
    assert function is not None
    rows, length = q.shape[:2]
    if documents is not None:
        offsets, longest = documents.offsets, documents.longest
    else:
        offsets, longest = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * length, length  # (B + 1,)
    options = _varlen_options(q.shape[2] != k.shape[2])
    if spec.window is not None:
        options = {**options, "window_size": (spec.window - 1, 0)}
    if spec.scale is not None:
        options = {**options, "scale": spec.scale}
    flat = [x.flatten(0, 1) for x in (q, k, v)]  # (B T, H or G, D)
    return function(*flat, offsets, offsets, longest, longest, **options).view(q.shape)


@cache
def _varlen_options(grouped: bool) -> dict[str, Any]:
    """The arguments for a causal mask and for shared key heads: their names changed after PyTorch 2.11."""
    known = _varlen_parameters()
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


@cache
def _varlen_parameters() -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(_varlen_function() or _varlen).parameters)
