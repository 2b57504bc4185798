"""Cross-entropy over the logits, in place, with a soft-cap of the logits (Gemma 2, arXiv 2408.00118).

Legend: logits are (M, V), labels (M,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.runtime.dispatch import kernel


@kernel(on_meta=lambda logits: logits.new_empty(len(logits), dtype=torch.float32))
def cross_entropy_(logits: Tensor, labels: Tensor, *, gradient: bool, softcap: float | None = None) -> Tensor:
    """-log softmax(s)[label] of each row, (M,) float32; 0 if the label is negative (ignored).

    s = logits, or with a `softcap` c: s = c tanh(logits / c), ds = 1 - (s / c)^2. With `gradient`, the gradient of the
    losses is written over the logits.
    """
    values = logits.float()
    if softcap is not None:
        values = torch.tanh(values / softcap).mul_(softcap)
    log_softmax = F.log_softmax(values, dim=1)  # (M, V)
    counts = labels >= 0
    losses = F.nll_loss(log_softmax, labels.clamp_min(0), reduction="none").masked_fill_(~counts, 0.0)
    if gradient:
        slope = log_softmax.exp_().masked_fill_(~counts[:, None], 0.0)
        slope[torch.arange(len(labels), device=labels.device), labels.clamp_min(0)] -= counts.to(slope.dtype)
        if softcap is not None:
            slope *= 1 - (values / softcap).square_()
        logits.copy_(slope)
    return losses
