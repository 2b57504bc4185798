"""What training lowers and evaluation measures: one definition for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.models import Model
from octavo.ops.attention import Documents, find_documents
from octavo.ops.branch import Keep
from octavo.ops.loss import IGNORE, cross_entropy_sum
from octavo.ops.offload import Away
from octavo.ops.transfer import sent
from octavo.ops.wide import Wide

Kept = Keep | Sequence[Keep]


@dataclass(frozen=True)
class Inputs:
    """A batch on the model's device. `labels` (n,) belong to the positions `learned` (n,), None for all B T of them."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    labels: Tensor
    learned: Tensor | None
    documents: Documents | None


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """What depends on the data is worked out on the CPU, where the batch is, so that a card is never waited for."""
    labels = batch.labels.flatten()
    learned = (labels != IGNORE).nonzero()[:, 0]
    every = len(learned) == len(labels)
    return Inputs(
        sent(batch.ids, device),
        sent(batch.positions, device),
        sent(labels if every else labels[learned], device),
        None if every else sent(learned, device),
        find_documents(batch.document, device),
    )


def loss_of(model: Model, inputs: Inputs, *, keep: Kept = Keep.ALL, offload: bool = False) -> Tensor:
    """Sum of the cross-entropy over the labelled tokens, in nats, a float32 scalar.

    To `offload` is to let the inputs of layers wait for backward in the host's memory.
    """
    away = Away() if offload else None
    hidden = model.hidden(
        inputs.ids, positions=inputs.positions, documents=inputs.documents, keep=keep, away=away
    ).flatten(0, 1)
    if inputs.learned is not None:
        hidden = hidden[inputs.learned]
    return cross_entropy_sum(hidden, inputs.labels, Wide((model.head.frozen(),)))


def batch_loss(model: Model, batch: Batch, *, keep: Kept = Keep.ALL) -> Tensor:
    """`loss_of` a batch as the loader gives it."""
    return loss_of(model, inputs_of(batch, model.embed.matrix.device), keep=keep)
