"""Row orders, against loops over the rows."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from octavo.models.weight_map import RowOrder, layer_of

ORDERS = {
    "q, k, v of a head after each other": (RowOrder((5, 3, 4), (1, 0, 2)), 4),
    "rotary pairs next to each other": (RowOrder((5, 2, 3), (0, 2, 1)), 1),
    "gate and up in turns": (RowOrder((7, 2), (1, 0)), 1),
    "three axes, all moved": (RowOrder((2, 3, 4), (2, 0, 1)), 1),
    "two axes stay": (RowOrder((2, 3, 4, 5), (1, 0, 2, 3)), 20),
    "nothing moves": (RowOrder((2, 3), (0, 1)), 6),
}


@pytest.mark.parametrize("case", ORDERS)
def test_rows_go_where_their_permuted_index_says_and_back(case: str) -> None:
    order, _ = ORDERS[case]
    shape = tuple(order.shape[axis] for axis in order.axes)
    count = torch.Size(shape).numel()
    rows = torch.arange(2 * count).view(count, 2)
    moved = order.from_checkpoint(rows)
    for position, index in enumerate(product(*map(range, shape))):
        there = dict(zip(order.axes, index, strict=True))  # axis of the checkpoint -> index
        source = 0
        for axis, size in enumerate(order.shape):
            source = source * size + there[axis]
        assert torch.equal(moved[position], rows[source])
    assert torch.equal(order.to_checkpoint(moved), rows)
    assert torch.equal(order.from_checkpoint(rows[:, 0]), moved[:, 0])  # a bias


@pytest.mark.parametrize("case", ORDERS)
def test_the_order_of_runs_is_the_order_of_their_rows(case: str) -> None:
    order, run = ORDERS[case]
    assert order.run == run
    count = torch.Size(order.shape).numel()
    rows = torch.arange(count)
    assert torch.equal(order.of_runs.from_checkpoint(rows.view(-1, run)).flatten(), order.from_checkpoint(rows))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.mlp.up_proj", 0),
        ("transformer.h.27.attn.q_proj.weight", 27),
        ("model.embed_tokens", None),
        ("model.layers.3", None),
        ("model.layers.\N{ARABIC-INDIC DIGIT THREE}.mlp.up_proj", None),
        (f"model.layers.{'9' * 5000}.mlp.up_proj", None),  # Python does not read as many digits
    ],
)
def test_the_layer_of_a_name_is_a_number_of_a_few_ascii_digits(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer
