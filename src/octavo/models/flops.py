"""The floating-point operations of a training step over frozen weights, which a speed is measured by.

A frozen matmul y = x W^T has 2 N K operations a token forward, and as many backward for the gradient of x; W has none.
Attention has two matmuls forward, over the keys that a query sees, and four backward. Recomputed matmuls do not count,
nor LoRA (1 % at rank 16), norms and activations.

Legend: N outputs and K inputs of a matrix, T positions of a row, w the window of a layer, H heads, D the size of a
head.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.models.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class ModelFlops:
    """Operations a token of a row, forward and backward."""

    body: float  # the linears of the blocks
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.body + self.head + self.attention


def model_flops(model: Decoder, length: int) -> ModelFlops:
    """Those of rows of `length` tokens that are one document each."""
    head = model.head.matrix
    tables = {id(head), id(model.embed.matrix)}
    body = sum(float(n) * k for n, k in (m.shape for m in model.matrices if id(m) not in tables))
    return ModelFlops(4 * body, 4.0 * head.shape[0] * head.shape[1], _attention(model.config, length))


def _attention(config: DecoderConfig, length: int) -> float:
    """6 matmuls of 2 H D operations for each key that a query sees: (T + 1) / 2 of them on average without a window."""
    seen = 0.0
    for layer in config.attention:
        w = min(layer.spec.window or length, length)
        seen += w - w * (w - 1) / (2 * length)  # the mean over positions i of min(i + 1, w)
    return 12.0 * config.heads * config.head_size * seen
