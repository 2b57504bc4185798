"""Training objectives: what training minimizes. Evaluation measures the same next-token loss.

Most labels of supervised fine-tuning are IGNORE_INDEX: prompts and padding. The hidden states of these positions are
removed before the head, so that no logits are computed for them.

Legend: B rows of a batch, T positions, n positions with a label (other than IGNORE_INDEX), d the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.data.loader import Batch
from octavo.data.packing import IGNORE_INDEX
from octavo.fused.loss import cross_entropy_each, cross_entropy_sum
from octavo.layers.context import ForwardOptions
from octavo.layers.fused_linear import FusedLinear
from octavo.models import Decoder
from octavo.ops.attention import Documents, find_documents
from octavo.runtime.transfer import to_device


@dataclass(frozen=True)
class Inputs:
    """A batch on the decoder's device.

    `labelled` are the positions with a label, as indices into the flattened (B T,) positions; `labels` and `weights`
    have one value for each of them. If all positions have a label, `labelled` is None: then nothing is selected.
    """

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    labels: Tensor  # (n,)
    labelled: Tensor | None  # (n,) indices into the flattened (B T,) positions; None: all, n = B T
    documents: Documents | None  # the packed documents, for attention; None: each row is one document
    weights: Tensor | None = None  # (n,) float32, of each label's loss; None: 1


# (decoder, inputs, options) -> the weighted sum of the losses of a batch, a float32 scalar
Objective = Callable[[Decoder, Inputs, ForwardOptions], Tensor]


def inputs_of(batch: Batch, device: torch.device) -> Inputs:
    """The inputs of a batch.

    `labelled` is computed on the CPU: nonzero on a GPU has a result of unknown size, so the CPU would wait for it.
    """
    labels = batch.labels.flatten()  # (B T,)
    labelled = (labels != IGNORE_INDEX).nonzero()[:, 0]  # (n,)
    all_labelled = len(labelled) == len(labels)
    weights = None if batch.weights is None else batch.weights.flatten()  # (B T,)
    if weights is not None:
        weights = to_device(weights if all_labelled else weights[labelled], device)
    return Inputs(
        to_device(batch.ids, device),
        to_device(batch.positions, device),
        to_device(labels if all_labelled else labels[labelled], device),
        None if all_labelled else to_device(labelled, device),
        find_documents(batch.piece, device),
        weights,
    )


def next_token_loss(decoder: Decoder, inputs: Inputs, options: ForwardOptions) -> Tensor:
    """Supervised fine-tuning: the sum over labels of weight times -log p(label), in nats, a float32 scalar."""
    hidden, head = _labelled_hidden(decoder, inputs, options)
    return cross_entropy_sum(
        hidden, inputs.labels, head, options.dropout, inputs.weights, softcap=decoder.config.logit_softcap,
        tiled=options.tiled_head,
    )  # fmt: skip


@torch.no_grad()
def token_losses(decoder: Decoder, batch: Batch, options: ForwardOptions | None = None) -> Tensor:
    """(n,) float32: -log p of each label of a batch in nats, in the order of its flattened (B T,) positions."""
    inputs, options = inputs_of(batch, decoder.embed.matrix.device), options or ForwardOptions()
    hidden, head = _labelled_hidden(decoder, inputs, options)
    return cross_entropy_each(
        hidden, inputs.labels, head, options.dropout, softcap=decoder.config.logit_softcap, tiled=options.tiled_head
    )


def _labelled_hidden(decoder: Decoder, inputs: Inputs, options: ForwardOptions) -> tuple[Tensor, FusedLinear]:
    """(hidden states (n, d) of the positions with a label, the head). The loss computes the logits, in chunks."""
    hidden = decoder.hidden(
        inputs.ids, positions=inputs.positions, documents=inputs.documents, options=options
    ).flatten(0, 1)  # (B T, d)
    if inputs.labelled is not None:
        hidden = hidden[inputs.labelled]  # (n, d)
    return hidden, FusedLinear((decoder.head.spec(),))


def batch_loss(decoder: Decoder, batch: Batch, options: ForwardOptions | None = None) -> Tensor:
    """`next_token_loss` of a batch of the loader."""
    inputs = inputs_of(batch, decoder.embed.matrix.device)
    return next_token_loss(decoder, inputs, options or ForwardOptions())
