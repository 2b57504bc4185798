"""What training lowers and evaluation measures: one definition for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.fused.loss import cross_entropy_sum
from octavo.layers.context import Save, SaveLevels
from octavo.layers.fused_linear import FusedLinear
from octavo.models import Decoder
from octavo.ops.attention import Documents, find_documents
from octavo.runtime.offload import ActivationOffload
from octavo.runtime.transfer import to_device


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
    learned = (labels != IGNORE_INDEX).nonzero()[:, 0]
    every = len(learned) == len(labels)
    return Inputs(
        to_device(batch.ids, device),
        to_device(batch.positions, device),
        to_device(labels if every else labels[learned], device),
        None if every else to_device(learned, device),
        find_documents(batch.document, device),
    )


def loss_of(model: Decoder, inputs: Inputs, *, save: SaveLevels = Save.ALL, offload: bool = False) -> Tensor:
    """Sum of the cross-entropy over the labelled tokens, in nats, a float32 scalar.

    To `offload` is to let the inputs of layers wait for backward in the host's memory.
    """
    activations = ActivationOffload() if offload else None
    hidden = model.hidden(
        inputs.ids, positions=inputs.positions, documents=inputs.documents, save=save, offload=activations
    ).flatten(0, 1)
    if inputs.learned is not None:
        hidden = hidden[inputs.learned]
    return cross_entropy_sum(hidden, inputs.labels, FusedLinear((model.head.frozen(),)))


def batch_loss(model: Decoder, batch: Batch, *, save: SaveLevels = Save.ALL) -> Tensor:
    """`loss_of` a batch as the loader gives it."""
    return loss_of(model, inputs_of(batch, model.embed.matrix.device), save=save)
