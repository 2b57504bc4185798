"""What is kept for backward and what is computed again: the policy that a forward pass runs its blocks through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from octavo.objective import Through


def keep_all(block: nn.Module, *inputs: Any) -> Tensor:
    """Runs a block and keeps all that its backward needs: fastest, most memory."""
    x: Tensor = block(*inputs)
    return x


def recompute(block: nn.Module, *inputs: Any) -> Tensor:
    """Runs a block and keeps its input alone; backward runs it again (arXiv 1604.06174), dropout included."""
    if not torch.is_grad_enabled():
        return keep_all(block, *inputs)
    x: Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=block.training)
    return x


def policy(*, checkpointing: bool) -> Through:
    """The policy of a run: every block computed again in backward, or none."""
    return recompute if checkpointing else keep_all
