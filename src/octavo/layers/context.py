"""What one forward pass passes to its layers: nothing of it is stored on a layer.

Legend: B sequences of a batch, T positions of each, R rotated values of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor

from octavo.layers.dropout import Dropout
from octavo.layers.kv_cache import CacheView
from octavo.ops.attention import PLAIN, AddedMasks, AttentionSpec, Documents
from octavo.ops.linear_spec import Matmul8
from octavo.ops.tiles import Phase
from octavo.runtime.offload import ActivationOffload


class Save(IntEnum):
    """What a block saves for backward; the more, the less is computed again."""

    INPUT = 0
    ATTENTION = 1
    ALL = 2


SaveLevels = Save | Sequence[Save]  # of every block, or of each

EXACT: Mapping[str, Matmul8] = MappingProxyType({})  # no matmul in 8 bits


@dataclass(frozen=True)
class ForwardOptions:
    """How a training pass runs. The defaults are the exact pass that saves everything on the device.

    `matmul8` has the linears of the blocks that are multiplied in 8 bits, by layer name. With `offload` the blocks'
    inputs are in CPU memory until backward. `dropout` gives the seeds of the masks on LoRA's inputs. Without `fused`
    every block runs as plain PyTorch, which is the reference. With `tiled_head` the loss dequantizes the head in tiles.
    """

    save: SaveLevels = Save.ALL
    offload: bool = False
    matmul8: Mapping[str, Matmul8] = field(default_factory=lambda: EXACT)
    dropout: Dropout = field(default_factory=Dropout)
    fused: bool = True
    tiled_head: bool = False


@dataclass(frozen=True)
class ForwardContext:
    """The arguments of a forward pass. `rotary` and the last four are those of one block (`at`), the others are shared.

    `rotary` is None in a layer without rotary positions. `query_scale` multiplies the queries of each position.
    `documents` are the packed documents of training. `cache` and `adapter_ids`, 0 for the base, are those of inference.
    `offload` takes the blocks' inputs to CPU memory. `masks` are made by the first layers that need them. The rest is
    that of ForwardOptions.
    """

    batch: int
    length: int
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, each (B or 1, T, 1, R/2)
    documents: Documents | None = None
    cache: CacheView | None = None
    adapter_ids: Tensor | None = None  # (B,) int64
    offload: ActivationOffload | None = None
    matmul8: Mapping[str, Matmul8] = field(default_factory=lambda: EXACT)
    dropout: Dropout = field(default_factory=Dropout)
    fused: bool = True
    layer: int = 0
    save: Save = Save.ALL
    attention: AttentionSpec = PLAIN
    query_scale: Tensor | None = None  # (B or 1, T, 1, 1)
    masks: AddedMasks = field(default_factory=AddedMasks)

    @property
    def phase(self) -> Phase:
        return self.cache.phase if self.cache is not None else Phase.PREFILL

    def at(self, layer: int, save: Save, **attention: Any) -> Self:
        """The context of one block: `attention` has `rotary`, `attention` and `query_scale`."""
        return replace(self, layer=layer, save=save, **attention)
