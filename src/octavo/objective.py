"""Training objectives: what training minimizes. Evaluation measures the same next-token loss.

Legend: B rows of a batch, T positions, n positions with a label, d the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.fused.loss import cross_entropy_sum
from octavo.layers.context import ForwardOptions
from octavo.layers.fused_linear import FusedLinear
from octavo.models import Decoder
from octavo.ops.attention import Documents, find_documents
from octavo.runtime.transfer import to_device


@dataclass(frozen=True)
class Inputs:
    """A batch on the decoder's device. `labels` and `weights` belong to the positions `labelled`, or to all."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    labels: Tensor  # (n,), or (B T,)
    labelled: Tensor | None  # (n,) indices into B T; None: all
    documents: Documents | None
    weights: Tensor | None = None  # (n,) or (B T,) float32, of each label's loss; None: 1


# (decoder, inputs, options) -> the weighted sum of the losses of a batch, a float32 scalar
Objective = Callable[[Decoder, Inputs, ForwardOptions], Tensor]


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """The inputs of a batch. Indices that depend on data are computed on the CPU, so that no kernel is waited for."""
    labels = batch.labels.flatten()  # (B T,)
    labelled = (labels != IGNORE_INDEX).nonzero()[:, 0]  # (n,)
    every = len(labelled) == len(labels)
    weights = None if batch.weights is None else batch.weights.flatten()  # (B T,)
    if weights is not None:
        weights = to_device(weights if every else weights[labelled], device)
    return Inputs(
        to_device(batch.ids, device),
        to_device(batch.positions, device),
        to_device(labels if every else labels[labelled], device),
        None if every else to_device(labelled, device),
        find_documents(batch.document, device),
        weights,
    )


def next_token_loss(decoder: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
    """Supervised fine-tuning: the sum over labels of weight times -log p(label), in nats, a float32 scalar."""
    hidden = decoder.hidden(
        inputs.ids, positions=inputs.positions, documents=inputs.documents, options=options
    ).flatten(0, 1)  # (B T, d)
    if inputs.labelled is not None:
        hidden = hidden[inputs.labelled]  # (n, d)
    head = FusedLinear((decoder.head.spec(),))
    return cross_entropy_sum(hidden, inputs.labels, head, options.dropout, inputs.weights)


def batch_loss(decoder: Decoder, batch: Batch, options: ForwardOptions | None = None) -> Tensor:
    """`next_token_loss` of a batch of the loader."""
    inputs = inputs_of(batch, decoder.embed.matrix.device)
    return next_token_loss(decoder, inputs, options or ForwardOptions())
