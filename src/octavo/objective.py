"""What training lowers and evaluation measures: one definition for both."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from octavo.data.loader import Batch
from octavo.models import Model
from octavo.ops.loss import cross_entropy_sum, frozen_cross_entropy_sum

Through = Callable[..., Tensor]  # (block, *inputs) -> output: how a forward pass runs its blocks


def batch_loss(model: Model, batch: Batch, *, through: Through = nn.Module.__call__) -> Tensor:
    """Sum of the cross-entropy over the batch's trained tokens, in nats, a float32 scalar."""
    device = model.embed.matrix.parts["weight"].device
    ids, labels, positions, document = (
        tensor.to(device, non_blocking=True) for tensor in (batch.ids, batch.labels, batch.positions, batch.document)
    )
    hidden = model.hidden(ids, positions=positions, document=document, through=through)
    loss = cross_entropy_sum if model.head.trained else frozen_cross_entropy_sum
    return loss(hidden.flatten(0, 1), labels.flatten(), model.head, vocabulary=model.config.vocabulary)
