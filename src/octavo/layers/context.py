"""What one forward pass passes to its layers: nothing of it is stored on a layer.

Legend: B sequences of a batch, T positions of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Self

from torch import Tensor

from octavo.layers.kv_cache import CacheView
from octavo.ops.attention import Documents
from octavo.ops.tiles import Phase
from octavo.runtime.offload import ActivationOffload


class Save(IntEnum):
    """What a block saves for backward; the more, the less is computed again."""

    INPUT = 0
    ATTENTION = 1
    ALL = 2


SaveLevels = Save | Sequence[Save]  # of every block, or of each


@dataclass(frozen=True)
class ForwardContext:
    """The arguments of a forward pass that all blocks share; `layer` and `save` are those of one block.

    `rotary` is (cos, sin), each (B or 1, T, 1, R/2). `documents` are the packed documents of training. `cache` and
    `adapter_ids` (B,) int64, 0 for the base, are those of inference. `offload` takes the blocks' inputs to CPU memory.
    Without `fused` the blocks run as plain PyTorch, which is the reference.
    """

    batch: int
    length: int
    rotary: tuple[Tensor, Tensor]
    documents: Documents | None = None
    cache: CacheView | None = None
    adapter_ids: Tensor | None = None
    offload: ActivationOffload | None = None
    fused: bool = True
    layer: int = 0
    save: Save = Save.ALL

    @property
    def phase(self) -> Phase:
        return self.cache.phase if self.cache is not None else Phase.PREFILL

    def at(self, layer: int, save: Save) -> Self:
        """The context of one block."""
        return replace(self, layer=layer, save=save)
