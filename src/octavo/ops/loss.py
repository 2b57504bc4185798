"""Cross-entropy over the logits, in place.

Legend: logits are (M, V), labels (M,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.runtime.dispatch import kernel


@kernel(on_meta=lambda logits: logits.new_empty(len(logits), dtype=torch.float32))
def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[label] of each row, (M,) float32; 0 if the label is negative (ignored).

    With `gradient`, the gradient of the losses is written over the logits.
    """
    log_softmax = F.log_softmax(logits.float(), dim=1)  # (M, V)
    counts = labels >= 0
    losses = F.nll_loss(log_softmax, labels.clamp_min(0), reduction="none").masked_fill_(~counts, 0.0)
    if gradient:
        slope = log_softmax.exp_().masked_fill_(~counts[:, None], 0.0)
        slope[torch.arange(len(labels), device=labels.device), labels.clamp_min(0)] -= counts.to(slope.dtype)
        logits.copy_(slope)
    return losses
